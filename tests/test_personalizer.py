"""A served user is read as in training and evaluation."""

import contextlib
import copy
import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from filelock import FileLock

from configs import lamp5
from pplug_jax import Personalizer
from pplug_jax.config import claim_workdir
from pplug_jax.data.keys import text_keys
from pplug_jax.data.lamp import Example
from pplug_jax.errors import InputError
from pplug_jax.feed.batches import Assemble
from pplug_jax.feed.features import FEATURES
from pplug_jax.feed.peers import Peers
from pplug_jax.methods.shown import Layout, layout_of
from pplug_jax.methods.table import METHODS
from pplug_jax.plugs.persona import UserEmbedder
from pplug_jax.session import Models
from pplug_jax.session.inputs import buckets_of, histories, tokenize
from pplug_jax.session.weights import new_weights
from pplug_jax.settings import Settings
from pplug_jax.storage.checkpoint import Checkpoints, _named
from pplug_jax.storage.files import write_json
from tests.support.runs import noting_compiled
from tests.support.tiny import OPTIONS

INPUT = "Generate a title for the following abstract of a paper: Rivers are measured."
SETTINGS = OPTIONS | {"frozen": {"encoder_rate": 0.0}}
SHARED = {"title": "A joint paper", "abstract": "By two authors.", "date": "2004"}


def item(user: str, i: int) -> dict[str, str]:
    return {"title": f"{user} on rivers {i}", "abstract": f"River {i}.", "date": f"200{i}-05"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """With a history store and pool of five training users."""
    config = lamp5.get_config()
    config.data.max_history = 4
    config.plug.update(num_persona_tokens=2, projector_size=128)
    models = Models(Settings.of(config), tmp_path_factory.mktemp("run"))
    train = [
        Example(user, INPUT, "A title", (*(item(user, i) for i in range(3)), SHARED))
        for user in "abcde"
    ]
    models.store.add(map(models.history_texts, train))
    Peers.of(models.store, histories(models, train)).save(models.workdir)
    return models


def trained_plug(models: Models, **settings: Any) -> UserEmbedder:
    """As if: no parameter is 0 or the identity any more."""
    config = models.config.changed({f"plug.{name}": value for name, value in settings.items()})
    plug = new_weights(models, METHODS["pplug"], config)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), plug)


def serving(models: Models, **settings: Any) -> Personalizer:
    """Such a plug as a run with these settings would leave it."""
    of_run = copy.copy(models)
    of_run.config = models.config.changed({f"plug.{name}": x for name, x in settings.items()})
    return Personalizer(of_run, trained_plug(models, **settings))


@pytest.mark.slow
@pytest.mark.parametrize("option", SETTINGS)
def test_a_served_soft_prompt_is_that_of_the_evaluation(models: Models, option: str) -> None:
    plug = trained_plug(models, **SETTINGS[option])
    personalizer = serving(models, **SETTINGS[option])
    profile = tuple(sorted([*(item(option, i) for i in range(7)), SHARED], key=lambda x: x["date"]))
    texts = [models.item_text(item) for item in profile]
    # New texts, but for the one that is in the pool too; the order of the dates is found.
    assert np.isin(models.peers.pool[:, 1], text_keys(texts)).sum() == 1
    served = personalizer.soft_prompt(INPUT, profile[::-1])
    as_texts = personalizer.soft_prompt(INPUT, texts)

    undated = tuple({k: v for k, v in item.items() if k != "date"} for item in profile)
    examples = [Example("0", INPUT, None, history) for history in (profile, undated, ())]
    models.store.add(map(models.history_texts, examples))
    encoded = layout_of(METHODS["pplug"], personalizer.models.config).encoded
    tokenized = tokenize(models, examples, Layout(encoded=encoded, features=tuple(FEATURES)))
    buckets = buckets_of(models, tokenized, 1)
    peers = Peers.load(models.store, models.workdir)
    extended = {"features": tuple(FEATURES), "peers": peers}
    extended["queries"] = models.queries if encoded else None
    batch = Assemble(tokenized, buckets, models.store, range(8), **extended)((0, 0, np.arange(3)))
    soft = np.asarray(jax.jit(lambda plug, inputs: plug(inputs))(plug, batch.plug_inputs))
    empty = personalizer.soft_prompt(INPUT)
    by_form = "form" in plug.features
    for found, expected in zip((served, as_texts, empty), soft[:3], strict=True):
        assert found.dtype == np.float32
        if not (found is as_texts and by_form):  # a text alone does not tell its answer
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(served - empty)[1:].max(axis=1).min() > 0.1  # in every token but I
    told = by_form or "age" in plug.features or plug.recency_rate is not None
    assert (np.abs(served - as_texts).max() > 1e-3) == told


INPUTS = [INPUT, INPUT + " " + "Rivers are measured again, and at greater length. " * 3]


@pytest.mark.slow
@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("place", ["front", "behind"])
def test_users_of_one_input_get_what_each_gets_alone(
    models: Models, place: str, num_beams: int
) -> None:
    personalizer = serving(models, place=place, encoder_rate=0.0)
    decoding = {"eval.max_new_tokens": 12, "eval.num_beams": num_beams, "eval.batch_size": 2}
    personalizer.models.config = personalizer.models.config.changed(decoding)
    histories = [[item(user, i) for i in range(count)] for user, count in zip("xyz", (3, 0, 7))]
    for input in INPUTS:
        together = personalizer.generate_many(input, histories)
        assert together == [personalizer.generate(input, history) for history in histories]
        assert len(set(together)) > 1
        soft = personalizer.soft_prompts(input, histories)
        for found, history in zip(soft, histories, strict=True):
            expected = personalizer.soft_prompt(input, history)
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert personalizer.generate_many(INPUT, []) == []
    assert personalizer.soft_prompts(INPUT, []).shape == (0, *soft.shape[1:])


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_soon_no_request_compiles_anything(models: Models, rate: float) -> None:
    personalizer = serving(models, place="behind", encoder_rate=rate)
    personalizer.models.config = personalizer.models.config.changed(
        {"eval.max_new_tokens": 4, "eval.num_beams": 1, "data.max_history": 40}
    )

    def request(words: int, items: int) -> tuple[str, list[str]]:
        history = [f"text {i}" + " and more" * (words % 7) for i in range(items)]
        return INPUT + " word" * words, history

    for words in range(0, 120, 4):
        personalizer.generate(*request(words, 0))
    for words, items in itertools.product(range(7), (1, 2, 4, 8, 16, 32)):
        personalizer.soft_prompt(*request(words, items))
    with noting_compiled() as compiled:
        for number in range(10):
            personalizer.generate(*request(11 * number + 5, 3 * number))
        assert not compiled
        jax.jit(lambda x: x + 1)(np.ones(3))
        assert compiled


def test_a_plug_that_needs_peers_says_so(models: Models, tmp_path: Path) -> None:
    elsewhere = Models(models.config, tmp_path)
    with pytest.raises(InputError, match=r"peers\.npy: no such file; train first"):
        serving(elsewhere, features=("difference",))


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ([{"text": "t"}], "history item 0: the field 'title' is missing"),
        ([item("a", 0), {"title": "t"}], "history item 1: the field 'abstract' is missing"),
        ([{"title": "t", "abstract": 7}], "history item 0: the field 'abstract' must be str, not"),
        ([{"title": "t", "abstract": None}], "history item 0: the field 'abstract' must be str"),
        ([item("a", 0) | {"date": ["2004"]}], "history item 0: the field 'date' must be"),
        (["a text", None], "history item 1: expected an object, found NoneType"),
        (["half of a pair \ud83d"], "history item 0: the text holds half of a surrogate pair"),
        ("a text", "the history must be a list of items, not one str"),
        (item("a", 0), "the history must be a list of items, not one dict"),
        (None, "the history must be a list of items, not one NoneType"),
        (7, "the history must be a list of items, not one int"),
        (np.array("a text"), "the history must be a list of items, not one ndarray"),
    ],
)
def test_a_served_history_is_checked_as_a_file_is(
    models: Models, history: Any, message: str
) -> None:
    personalizer = Personalizer(models, trained_plug(models))
    for serve in (personalizer.soft_prompt, personalizer.generate):
        with pytest.raises(InputError, match=message):
            serve(INPUT, history)


def test_an_input_that_is_no_text(models: Models) -> None:
    personalizer = Personalizer(models, trained_plug(models))
    with pytest.raises(InputError, match="the input must be a text, not list"):
        personalizer.generate([INPUT])
    with pytest.raises(InputError, match="the input: it holds half of a surrogate pair"):
        personalizer.generate("half of a pair \ud83d")


@pytest.mark.slow
def test_an_older_workdir_is_served(models: Models, tmp_path: Path) -> None:
    """Features had a setting each, and the same names in checkpoints."""
    plug = trained_plug(models, features=("difference", "form"))
    old = dataclasses.asdict(models.config) | {
        "methods": ("pplug", "pplug_form"),
        "plug": {k: v for k, v in vars(models.config.plug).items() if k != "features"}
        | {"heads": 0, "difference": True, "form": True},
    }
    del old["variants"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    models.store.add([])
    shutil.copytree(models.workdir, tmp_path, dirs_exist_ok=True)
    with contextlib.closing(Checkpoints(tmp_path / "checkpoints" / "pplug")) as kept:
        kept.save(1, plug, {"moment": jax.numpy.zeros(1)})
        kept.wait()
        paths = set(_named(plug))
    names = (".form_projector.up", ".null_form", ".difference_projector.down_bias")
    assert {f"{name}.value" for name in names} <= paths
    served = Personalizer.from_checkpoint(tmp_path).soft_prompt(INPUT, [item("a", 1)])
    expected = serving(models, features=("difference", "form")).soft_prompt(INPUT, [item("a", 1)])
    np.testing.assert_allclose(served, expected, rtol=1e-5, atol=1e-5)
    (tmp_path / "config.json").write_text(json.dumps(old | {"plug": old["plug"] | {"heads": 4}}))
    with pytest.raises(InputError, match=r"config\.plug\.heads is gone"):
        Personalizer.from_checkpoint(tmp_path)


def test_a_workdir_that_cannot_be_written_is_served(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(models.workdir, tmp_path, dirs_exist_ok=True)
    write_json(tmp_path / "config.json", dataclasses.asdict(models.config))
    plug = trained_plug(models)
    with contextlib.closing(Checkpoints(tmp_path / "checkpoints" / "pplug")) as kept:
        kept.save(1, plug, {"moment": jax.numpy.zeros(1)})
        kept.wait()

    def refused(*args: object, **settings: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(FileLock, "acquire", refused)
    monkeypatch.setattr(Path, "touch", refused)
    history = [item("a", 1), item("z", 1)]
    personalizer = Personalizer.from_checkpoint(tmp_path)
    assert len(personalizer.models.store) == len(models.store)
    served = personalizer.soft_prompt(INPUT, history)
    expected = Personalizer(models, plug).soft_prompt(INPUT, history)
    np.testing.assert_allclose(served, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("content", ["", '{"data": {', "\ufffe", "[]"])
def test_a_broken_config_is_named(models: Models, tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    for read in (
        Personalizer.from_checkpoint,
        lambda workdir: claim_workdir(workdir, models.config),
    ):
        with pytest.raises(
            InputError, match=rf"{tmp_path}/config\.json: (not JSON|expected an obj)"
        ):
            read(tmp_path)


def test_a_checkpoint_that_holds_an_encoder_that_was_never_trained(
    models: Models, tmp_path: Path
) -> None:
    """Plugs once kept it, with moments."""
    with_encoder, plug = trained_plug(models), trained_plug(models, encoder_rate=0.0)
    assert plug.input_encoder is None
    with contextlib.closing(Checkpoints(tmp_path)) as kept:
        kept.save(1, with_encoder, {"mu": with_encoder})
        kept.wait()
        weights, state, _ = kept.restore(plug, {"mu": plug})
        alone = kept.restore_weights(plug)
    for restored in (weights, state["mu"], alone):
        assert restored.input_encoder is None
        np.testing.assert_array_equal(restored.projector.up[...], with_encoder.projector.up[...])
