"""Methods over several seeds in one table; what is done is not done again."""

import json
import shutil
from pathlib import Path

import ml_collections
import numpy as np
import pytest

from pplug_jax.data.sources import read_split
from pplug_jax.errors import ConfigError
from pplug_jax.evaluate.compare import commit
from pplug_jax.feed.batches import PlugInputs, Tokenized
from pplug_jax.feed.store import History
from pplug_jax.methods.table import METHODS as ALL
from pplug_jax.methods.table import configured
from pplug_jax.run import run
from pplug_jax.scoring.metrics import example_statistics
from pplug_jax.session import Models
from pplug_jax.session.inputs import tokenize
from pplug_jax.session.weights import abstract_weights
from pplug_jax.settings import Settings
from pplug_jax.storage.checkpoint import Checkpoints
from pplug_jax.train.validate import validation_loss
from tests.support.lamp_files import write_split
from tests.support.once import Once
from tests.support.runs import results_of, small_config

pytestmark = pytest.mark.slow

PPLUG = ALL["pplug"]
METHODS = ("none", "bm25", "shuffled_user", "pplug", "task_lora", "user_lora")


def comparison(**overrides: object) -> ml_collections.ConfigDict:
    settings = {"methods": METHODS, "seeds": (0, 1), "train__epochs": 1.0, "lora__rank": 2}
    settings["lora__user_epochs"] = 1
    return small_config(**settings | overrides)


@pytest.fixture(scope="module")
def compared(once: Once) -> Path:
    return once("compared", lambda workdir: run(comparison(), workdir, "compare"))


def times(workdir: Path) -> dict[str, int]:
    found = [*workdir.glob("seed_*/predictions/*"), *workdir.glob("seed_*/checkpoints/*/*")]
    return {str(path.relative_to(workdir)): path.stat().st_mtime_ns for path in found}


def test_the_table_is_the_mean_over_seeds(compared: Path) -> None:
    results = results_of(compared)
    assert results["seeds"] == [0, 1] and list(results["methods"]) == list(METHODS)
    golds = [example.target for example in read_split(Settings.of(comparison()), "eval")]
    for name in ("none", "pplug", "user_lora"):
        found = []
        for seed in (0, 1) if name != "none" else (0,):
            path = compared / f"seed_{seed}" / "predictions" / f"dev.{name}.json"
            texts = [gold["output"] for gold in json.loads(path.read_text())["golds"]]
            found.append(example_statistics("LaMP_5", texts, golds)["rouge1"].mean())
        entry = results["methods"][name]["rouge1"]
        np.testing.assert_allclose(entry["seeds"], found)
        np.testing.assert_allclose(entry["value"], np.mean(found))
        assert entry["low"] <= entry["value"] <= entry["high"]


def test_the_golds_loss_is_that_of_all_their_tokens(compared: Path) -> None:
    models = Models(Settings.of(comparison()), compared)
    tokenized = tokenize(models, read_split(Settings.of(comparison()), "eval"))
    loss = validation_loss(models, ALL["none"], models.config, None, shown_bare(tokenized))
    entry = results_of(compared)["methods"]["none"]["loss"]
    np.testing.assert_allclose(entry["value"], loss, rtol=1e-5)


def shown_bare(tokenized: list[Tokenized]) -> list[Tokenized]:
    return [each.with_history_of(None) for each in tokenized]


def test_differences_are_paired_with_the_references(compared: Path) -> None:
    entries = results_of(compared)["methods"]
    versus = entries["pplug"]["versus"]
    assert list(versus) == ["none", "shuffled_user"]
    for other, found in versus.items():
        difference = entries["pplug"]["rouge1"]["value"] - entries[other]["rouge1"]["value"]
        np.testing.assert_allclose(found["rouge1"]["difference"], difference)
        assert found["loss"]["difference"] != 0
        assert found["style"].keys() == {"difference", "low", "high", "p_value"}
    assert list(entries["none"]["versus"]) == ["shuffled_user", "pplug"]


def test_what_a_method_costs(compared: Path) -> None:
    entries = results_of(compared)["methods"]
    config = Settings.of(comparison())
    tokenizer = Models(config, compared).tokenizer
    examples = read_split(config, "eval")
    length = config.data.max_input_length
    read = np.mean([len(tokenizer.prompt(example.input, length)) for example in examples])
    assert entries["none"]["prompt_tokens"] == entries["user_lora"]["prompt_tokens"] == read
    soft_tokens = 1 + 4  # the instruction's and the persona's
    assert entries["pplug"]["prompt_tokens"] == read + soft_tokens
    assert entries["bm25"]["prompt_tokens"] > read
    items = [len(example.profile) for example in examples]
    assert entries["none"]["bytes_per_user"] == entries["none"]["trainable"] == 0
    assert entries["pplug"]["bytes_per_user"] == np.mean(items) * 128 * 2
    assert entries["pplug"]["trainable"] > entries["task_lora"]["trainable"] > 0
    assert entries["task_lora"]["bytes_per_user"] == 0
    assert entries["user_lora"]["bytes_per_user"] == 2 * entries["task_lora"]["trainable"]
    assert "train_seconds" not in entries["bm25"]
    assert entries["pplug"]["train_seconds"] == entries["shuffled_user"]["train_seconds"] > 0
    table = (compared / "results.md").read_text()
    for name in METHODS:
        assert f"| {name} |" in table


def test_seeds_differ_and_methods_without_weights_run_once(compared: Path) -> None:
    assert not (compared / "seed_1" / "predictions" / "dev.none.json").exists()
    losses = [
        json.loads((compared / f"seed_{seed}" / "metrics.jsonl").read_text().splitlines()[-3])
        for seed in (0, 1)
    ]
    assert losses[0]["name"] == losses[1]["name"] == "task_lora/loss"
    assert losses[0]["value"] != losses[1]["value"]


def test_another_split_leaves_the_results_of_the_workdirs_own(
    compared: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(compared, workdir)
    before = results_of(workdir)
    run(comparison(methods=("none",), data__eval_split="test"), workdir, "compare")
    assert results_of(workdir) == before
    assert json.loads((workdir / "results.test.json").read_text())["split"] == "test"
    assert (workdir / "results.test.md").is_file()


def test_what_a_plug_made_of_the_users_is_written(compared: Path) -> None:
    examples = read_split(Settings.of(comparison()), "eval")
    found = np.load(compared / "seed_1" / "personas" / "dev.pplug.npz")
    lengths = [len(example.profile) for example in examples]
    assert found["lengths"].tolist() == lengths
    assert found["other_item"].tolist() == [length - 1 for length in lengths]
    assert len(np.unique(found["persona"].round(6), axis=0)) == len(examples)

    config = configured(Settings.of(comparison()), PPLUG, 1)
    models = Models(config, compared)
    checkpoints = Checkpoints(compared / "seed_1" / "checkpoints" / "pplug")
    plug = checkpoints.restore_weights(abstract_weights(models, PPLUG, config))
    ends = np.cumsum(lengths)[:-1]
    for i, name in ((2, "weights"), (5, "other")):
        profile = examples[i].profile
        input = models.task.query_text(examples[i].input)
        query = models.encoder.queries([input if name == "weights" else profile[-1]["abstract"]])
        items = models.store.vectors(History.of(*models.history_texts(examples[i])))
        there = np.ones((1, len(profile)), bool)
        inputs = PlugInputs(
            np.array(query), np.ones((1, len(query[0])), bool), items[None], there, {}
        )
        wanted = plug.attention(inputs)
        np.testing.assert_allclose(np.split(found[name], ends)[i], wanted[0], atol=1e-5)


def test_only_what_is_missing_is_done_again(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compared = shutil.copytree(compared, tmp_path / "run")
    before, table = times(compared), (compared / "results.md").read_text()
    gone = "seed_1/predictions/dev.user_lora.json"
    (compared / gone).unlink()
    run(comparison(), compared, "compare")
    after = times(compared)
    assert {name for name in before if before[name] != after[name]} == {
        gone,
        gone.replace(".json", ".about.json"),
    }
    # All but how long it took.
    again = (compared / "results.md").read_text()
    assert again.partition("## costs")[0] == table.partition("## costs")[0]
    # More methods and seeds may come later.
    run(comparison(methods=("none", "random"), seeds=(2,)), compared, "compare")
    assert list(results_of(compared)["methods"]) == ["none", "random"]
    assert (compared / "seed_2" / "predictions" / "dev.random.json").is_file()
    assert "training" not in capsys.readouterr().out


def test_the_learning_rate_with_the_lowest_validation_loss_is_taken(tmp_path: Path) -> None:
    config = comparison(
        methods=("none", "task_lora"),
        seeds=(0,),
        tune__learning_rates=(1e-6, 1e-3, 1.0),
        train__validation=0.25,
    )
    run(config, tmp_path, "compare")
    losses = json.loads((tmp_path / "tune.json").read_text())["task_lora"]
    assert losses["0.001"] < losses["1e-06"]
    assert losses["1.0"] is None  # it diverges
    assert results_of(tmp_path)["methods"]["task_lora"]["learning_rate"] == 0.001
    assert not list((tmp_path / "tune").glob("*/checkpoints/*"))


def test_users_who_are_held_out_are_not_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def user(i: int, split: str) -> dict:
        items = [{"id": "x", "title": f"T{i} {n}", "abstract": f"A{i} {n}"} for n in range(3)]
        input = f"Generate a title for the following abstract of a paper: {split} {i}"
        return {"id": f"{split}{i}", "input": input, "profile": items}

    def write(split: str, users: range) -> None:
        questions = [user(i, split) for i in users]
        golds = [{"id": question["id"], "output": "A title"} for question in questions]
        write_split(tmp_path / "data", split, questions, {"task": "LaMP_5", "golds": golds})

    write("train", range(12))
    write("dev", range(10, 14))
    config = comparison(
        data__path=str(tmp_path / "data"), methods=("none", "task_lora"), seeds=(0,)
    )
    run(config, tmp_path / "run", "compare")
    assert "2 training examples are left out" in capsys.readouterr().out
    write("dev", range(12))
    with pytest.raises(ConfigError, match="all users of the training split are held out too"):
        run(config, tmp_path / "other", "compare")


def test_variants_are_trained_on_what_they_say(tmp_path: Path) -> None:
    names = (
        "pplug+retrieval",
        "pplug+answers",
        "own_items",
        "difference",
        "task_lora+pplug",
        "behind",
    )
    variants = str(
        {
            "own_items": {"train.own_items": 2},
            "difference": {"plug.features": ("difference",)},
            "behind": {"plug.place": "behind"},
        }
    )
    run(comparison(methods=names, seeds=(0,), variants=variants), tmp_path, "compare")
    steps = {name: Checkpoints(tmp_path / "seed_0" / "checkpoints" / name).latest for name in names}
    # 24 users in batches of 8, and 2 items of each.
    assert steps == dict.fromkeys(names, 3) | {"own_items": 9}
    entries = results_of(tmp_path)["methods"]
    assert entries["difference"]["trainable"] > entries["pplug+retrieval"]["trainable"]
    # The prompt's suffix stands behind these soft tokens, and is read as well.
    assert entries["behind"]["prompt_tokens"] == entries["own_items"]["prompt_tokens"]
    kept = [entries[name]["bytes_per_user"] for name in names[:3]]
    assert kept[0] > kept[1] > kept[2]
    sizes = [entries[name]["trainable"] for name in ("task_lora+pplug", "own_items")]
    assert sizes[0] > sizes[1]
    assert (tmp_path / "seed_0" / "personas" / "dev.task_lora+pplug.npz").is_file()
    about = tmp_path / "seed_0" / "predictions" / "dev.pplug+answers.about.json"
    held_out = read_split(Settings.of(comparison()), "eval")
    for example, places in zip(held_out, json.loads(about.read_text())["shown"], strict=True):
        assert len(set(places)) == min(comparison().eval.top_k, len(example.profile))
        assert all(place < len(example.profile) for place in places)
    examples = read_split(Settings.of(comparison()), "train")
    pool = {text for example in examples for text in map(str, example.profile)}
    assert len(np.load(tmp_path / "peers.npy")) == len(pool)


def test_without_git_the_commit_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert commit()
    monkeypatch.setenv("PATH", "")
    assert commit() == ""
