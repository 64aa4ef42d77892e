"""Every method whose plug reads a person is served as it was evaluated."""

import dataclasses
import functools
import json
import queue
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from pplug_jax import Personalizer
from pplug_jax.data.lamp import Example, Item
from pplug_jax.data.sources import read_split
from pplug_jax.data.tasks import TASKS, Task
from pplug_jax.errors import InputError
from pplug_jax.run import run
from pplug_jax.serve.build import load_plug, make_service
from pplug_jax.serve.engine import Sampling, Token
from pplug_jax.serve.engine.jax_engine import JaxEngine
from pplug_jax.serve.handover import SERVED
from pplug_jax.serve.metrics import Metrics
from pplug_jax.serve.people import People
from pplug_jax.serve.personalizer import export
from pplug_jax.serve.store import Store
from pplug_jax.settings import Settings
from pplug_jax.storage.files import read_object
from pplug_jax.storage.workdir import CONFIG, predictions_path
from tests.support.once import Once
from tests.support.runs import small_config
from tests.support.server import Running

BOTH = "task_lora+pplug+answers"
TITLED = dataclasses.replace(TASKS["custom"], answer="title")
METHODS = {
    "front": ("task_lora+pplug", "instruction_only+answers"),
    "behind": (BOTH, "pplug+answers"),
}
CASES = [(place, method) for place, methods in METHODS.items() for method in methods]


def compare(place: str, workdir: Path) -> None:
    config = small_config(
        methods=METHODS[place],
        plug__place=place,
        data__max_input_length=160,
        eval__num_beams=1,
        eval__top_k=2,
        seeds=(3,),
        train__learning_rate=0.01,
    )
    run(config, workdir, "compare")


def seed_of(once: Once, place: str) -> Path:
    """The seed's directory of a small comparison at this place; don't write to it."""
    return once(f"compared_{place}", functools.partial(compare, place)) / "seed_3"


def examples_of(personalizer: Personalizer) -> list[Example]:
    config = read_object(personalizer.models.workdir / CONFIG)  # the sample depends on its seed
    return list(read_split(Settings.of(config), "eval"))


@pytest.mark.slow
@pytest.mark.parametrize(("place", "method"), CASES)
def test_it_answers_as_in_the_evaluation(once: Once, place: str, method: str) -> None:
    directory = seed_of(once, place)
    path = predictions_path(directory, "dev", method)
    expected = {row["id"]: row["output"] for row in json.loads(path.read_text())["golds"]}
    personalizer = Personalizer.from_checkpoint(directory, method=method)
    examples = examples_of(personalizer)
    found = {
        example.id: personalizer.generate(example.input, example.profile) for example in examples
    }
    assert found == expected
    assert len(set(found.values())) > 1
    a, b = examples[:2]
    together = personalizer.generate_many(a.input, [a.profile, b.profile, ()])
    assert together == [
        personalizer.generate(a.input, profile) for profile in (a.profile, b.profile, ())
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("place", "method"), CASES)
def test_an_engine_answers_so_too(once: Once, place: str, method: str) -> None:
    personalizer = Personalizer.from_checkpoint(seed_of(once, place), method=method)
    models = personalizer.models
    length = models.config.eval.max_new_tokens
    limits = {"longest_prompt": personalizer.longest_prompt, "max_new_tokens": length, "slots": 4}
    settings = {"reader": models.llm, "own_rows": personalizer.own_rows}
    engine = JaxEngine(personalizer.llm, models.mesh, **settings, **limits)
    for example in examples_of(personalizer)[:4]:
        prompt = personalizer.prompt(example.input, example.profile)
        soft = personalizer.soft_prompt(example.input, example.profile)
        events: queue.SimpleQueue = queue.SimpleQueue()
        engine.submit(personalizer.inputs_embeds(prompt, soft), Sampling(length), events.put)
        tokens = []
        while isinstance(event := events.get(timeout=60), Token):
            tokens.append(event.id)
        answer = models.tokenizer.decode(np.array(tokens, np.int32))
        assert answer == personalizer.generate(example.input, example.profile)
    engine.close()


@pytest.mark.slow
def test_the_words_are_those_of_the_person(once: Once) -> None:
    personalizer = Personalizer.from_checkpoint(seed_of(once, "behind"), method=BOTH)
    example = examples_of(personalizer)[0]
    prompt = personalizer.prompt(example.input, example.profile)
    titles = [item["title"] for item in example.profile]
    assert prompt.startswith(example.input)
    assert sum(f"- {title}" in prompt for title in titles) == 2
    # Vectors that are given are those of the items in their order, whatever their dates.
    dated = [item | {"date": 2020 - i} for i, item in enumerate(example.profile)]
    vectors = personalizer.encode_items(personalizer.item_texts(dated))
    asked = personalizer.encode_inputs([example.input])[0]
    assert personalizer.personal(example.input, asked, dated, vectors).prompt == prompt
    assert personalizer.prompt(example.input) == example.input
    assert personalizer.prompt(example.input, titles) == example.input  # texts say no answer


@pytest.mark.slow
@pytest.mark.parametrize("part", ["persona", "words", "LoRA"])
def test_every_part_counts(once: Once, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the other tests would show little."""
    whole = Personalizer.from_checkpoint(seed_of(once, "behind"), method=BOTH)
    less = whole
    if part == "LoRA":
        less = Personalizer(whole.models, whole.persona, SERVED["pplug+answers"])
    if part == "words":
        less = Personalizer(whole.models, whole.plug, SERVED["task_lora+pplug"])
    examples = examples_of(whole)
    answers = [whole.generate(example.input, example.profile) for example in examples]
    if part == "persona":
        zeros = np.zeros_like(whole.soft_prompt(examples[0].input))
        monkeypatch.setattr(
            "pplug_jax.serve.personalizer._soft_prompts",
            lambda plug, inputs, reading: zeros[None],
        )
    assert answers != [less.generate(example.input, example.profile) for example in examples]


@pytest.mark.slow
def test_it_is_handed_on(once: Once, tmp_path: Path) -> None:
    directory = seed_of(once, "behind")
    export(directory, tmp_path / "plug", BOTH)
    about = json.loads((tmp_path / "plug" / "plug_config.json").read_text())
    assert (about["format"], about["method"], about["config"]["seed"]) == (2, BOTH, 3)
    card = (tmp_path / "plug" / "README.md").read_text()
    assert "The seed was 3" in card
    assert "Means of the seeds 3." in card
    assert "**Not run here: task_lora+instruction_only+answers, " in card
    with pytest.raises(InputError, match=f"is a plug of '{re.escape(BOTH)}'"):
        load_plug(str(tmp_path / "plug"), method="pplug")
    trained = Personalizer.from_checkpoint(directory, method=BOTH)
    loaded = Personalizer.from_pretrained(tmp_path / "plug")
    assert loaded.method == trained.method
    for example in examples_of(trained)[:3]:
        soft = trained.soft_prompt(example.input, example.profile)
        np.testing.assert_array_equal(loaded.soft_prompt(example.input, example.profile), soft)
        expected = trained.generate(example.input, example.profile)
        assert loaded.generate(example.input, example.profile) == expected


@pytest.mark.slow
def test_it_answers_over_http(once: Once, tmp_path: Path) -> None:
    personalizer = load_plug(str(seed_of(once, "behind")), method=BOTH)
    store = Store(f"sqlite:///{tmp_path / 'store.sqlite'}")
    running = Running(make_service("both", personalizer, store, slots=4))
    try:
        (example, *_) = examples_of(personalizer)
        items = [{k: v for k, v in item.items() if k != "id"} for item in example.profile]
        running.ask("POST", "/v1/personas/ann/items", json={"items": items}).raise_for_status()
        for user, history in (("ann", items), ("nobody", [])):
            answer = running.openai().completions.create(
                model="both", prompt=example.input, user=user
            )
            assert answer.choices[0].text == personalizer.generate(example.input, history)
        one = {"input": example.input, "users": ["ann"]}
        (line,) = running.ask("POST", "/v1/personalize", json=one).text.splitlines()
        assert json.loads(line)["answer"] == personalizer.generate(example.input, items)
        refused = running.ask("POST", "/v1/personas/ann/soft_prompt", json={"input": example.input})
        assert refused.status_code == 400
        assert "a LoRA" in refused.json()["error"]["message"]
    finally:
        running.stop()
    with pytest.raises(InputError, match="changes its LLM by a LoRA, which a server does not"):
        make_service("both", personalizer, store, engine_url="http://127.0.0.1:1/v1")


@pytest.mark.slow
def test_what_cannot_be_served(once: Once, tmp_path: Path) -> None:
    directory = seed_of(once, "behind")
    for name in ("none", "instruction_only", "shuffled_user", "pplug+retrieval", "nothing"):
        known = f"the method '{re.escape(name)}' cannot be served.*: pplug, "
        with pytest.raises(InputError, match=known):
            Personalizer.from_checkpoint(directory, method=name)
    with pytest.raises(
        InputError, match=rf"'pplug' was not trained here .*; take {re.escape(BOTH)} or"
    ):
        Personalizer.from_checkpoint(directory, method="pplug")
    assert Personalizer.from_checkpoint(directory).method.name == BOTH  # the run's first
    config = json.loads((directory.parent / "config.json").read_text())
    export(directory, tmp_path / "plug", BOTH)
    about = json.loads((tmp_path / "plug" / "plug_config.json").read_text())
    (tmp_path / "plug" / "plug_config.json").write_text(json.dumps(about | {"method": "none"}))
    with pytest.raises(InputError, match="the method 'none' cannot be served"):
        Personalizer.from_pretrained(tmp_path / "plug")
    with pytest.raises(InputError, match=r"was not trained here .*; take \S+/seed_3, or train it"):
        Personalizer.from_checkpoint(directory.parent)
    shutil.copytree(directory.parent, tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(
        json.dumps(config | {"methods": ["none", "pplug+answers"]})
    )
    for method in (None, BOTH):  # it was trained there, perhaps by another command since
        found = Personalizer.from_checkpoint(tmp_path / "run" / "seed_3", method=method)
        assert found.method.name == (method or "pplug+answers")
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(InputError, match=r"run/config\.json: no such file"):
        Personalizer.from_checkpoint(tmp_path / "run" / "seed_3", method=BOTH)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "item", "shown"),
    [
        (TASKS["LaMP_5"], {"title": "A title", "abstract": "What of."}, "- A title"),
        (TASKS["LaMP_3"], {"text": "Good.", "score": 5}, "- 5"),  # a score may be a number
        (TITLED, {"text": "No title."}, "input"),  # and an optional field may be missing
    ],
)
def test_a_stored_item_is_read_as_a_files_is(
    once: Once, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: Task, item: Item, shown: str
) -> None:
    personalizer = Personalizer.from_checkpoint(seed_of(once, "behind"), method=BOTH)
    monkeypatch.setattr(personalizer.models, "task", task)
    store = Store(f"sqlite:///{tmp_path / 'store.sqlite'}")
    people = People(personalizer, store, Metrics())
    tenant = store.tenant("tenant")
    store.add(tenant, "ann", people.check([item]))
    found = people.persona(tenant, "ann", "input")
    assert (found.known, len(found.items), found.made.weights.tolist()) == (True, 1, [1])
    assert found.made.prompt == personalizer.prompt("input", [item])
    assert found.made.prompt.endswith(shown)
    np.testing.assert_array_equal(found.made.soft, personalizer.soft_prompt("input", [item]))
    people.close()
    store.close()
