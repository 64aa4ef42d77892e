"""What a method's examples show, whose users count as seen, and users' own items."""

import dataclasses
import re
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest

from pplug_jax.data.lamp import Example, Subset
from pplug_jax.data.tasks import TASKS
from pplug_jax.feed.batches import Tokenized
from pplug_jax.feed.store import History
from pplug_jax.methods.shown import shown
from pplug_jax.methods.table import METHODS
from pplug_jax.methods.users import own_items, split_users, unseen
from pplug_jax.settings import Settings
from pplug_jax.train.inputs import TrainingInputs, WithOwnItems
from tests.support.words import WordTokenizer

TASK = TASKS["LaMP_5"]
TOKENIZER = SimpleNamespace(tokenizer=WordTokenizer(), prompt=lambda text, *_: text)


def example(i: int, items: int) -> Example:
    profile = tuple({"title": f"T{i}.{n}", "abstract": f"about {n}"} for n in range(items))
    return Example(f"u{i}", f"the abstract of a paper: {i}", f"gold {i}", profile, f"name {i}")


def tokenized(*rows: list[int]) -> list[Tokenized]:
    token = np.array([1], np.int32)
    return [
        Tokenized(
            token, token, token, History(0, np.array(r, int)), {"age": np.array(r, np.float32)}
        )
        for r in rows
    ]


@pytest.mark.parametrize(
    ("method", "rows"),
    [
        ("pplug", [[0, 1], [2], []]),
        ("pplug_mean", [[0, 1], [2], []]),
        ("instruction_only", [[], [], []]),
        ("none", [[], [], []]),
        ("task_lora", [[], [], []]),
        ("shuffled_user", [[2], [0, 1], None]),
    ],
)
def test_whose_history_is_shown(method: str, rows: list[list[int] | None]) -> None:
    config = Settings()
    found = shown(TASK, None, None, METHODS[method], config, [], tokenized([0, 1], [2], []))
    for each, wanted in zip(found, rows, strict=True):
        assert wanted is None or each.history.texts.tolist() == wanted
        # An item's age goes with it.
        assert each.item_features["age"].tolist() == each.history.texts.tolist()


@pytest.mark.parametrize(
    ("method", "titles"),
    [
        ("answers", [["T0.0", "T0.1"], ["T1.0"], []]),
        ("shuffled_user+answers", [["T1.0"], ["T0.0", "T0.1"], None]),
    ],
)
def test_whose_answers_are_shown(
    monkeypatch: pytest.MonkeyPatch, method: str, titles: list[list[str] | None]
) -> None:
    monkeypatch.setattr(
        "pplug_jax.methods.shown.retrievers",
        lambda *_: {"dense": lambda task, examples, top_k: [places_of(e) for e in examples]},
    )

    def places_of(example: Example) -> list[int]:
        return list(range(len(example.profile)))

    examples = [example(0, 2), example(1, 1), example(2, 0)]
    found = shown(
        TASK,
        TOKENIZER,
        None,
        METHODS[method],
        Settings(),
        examples,
        tokenized([0, 1], [2], []),
    )
    for each, asked, wanted in zip(found, examples, titles, strict=True):
        assert each.prompt.startswith(asked.input)
        assert wanted is None or re.findall(r"T[\d.]+", each.prompt) == wanted[::-1]
        assert wanted is None or each.shown == list(range(len(wanted)))


def test_a_prompt_without_room_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "pplug_jax.methods.shown.retrievers",
        lambda *_: {name: lambda *_: [[1, 0]] for name in ("dense", "bm25")},
    )

    def places(method: str, max_length: int, asked: Example) -> Sequence[int]:
        config = Settings().changed({"data.max_input_length": max_length})
        given = TASK, TOKENIZER, None, METHODS[method], config, [asked], tokenized([0, 1])
        return shown(*given)[0].shown

    asked = example(0, 2)
    for method in ("answers", "bm25"):
        assert places(method, 100, asked) == [1, 0]
        assert places(method, 1, asked) == []
    untitled = dataclasses.replace(
        asked, profile=(asked.profile[0], asked.profile[1] | {"title": ""})
    )
    assert places("answers", 100, untitled) == [0]


def test_some_training_examples_are_as_a_new_user_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "pplug_jax.methods.shown.retrievers",
        lambda *_: {"dense": lambda task, examples, top_k: [[0] for _ in examples]},
    )
    monkeypatch.setattr(
        "pplug_jax.train.inputs.tokenize",
        lambda models, examples, layout: [
            one._replace(prompt=each.input)
            for one, each in zip(tokenized(*[[0, 1]] * 400), examples, strict=True)
        ],
    )
    examples = [example(i, 2) for i in range(400)]

    def train(share: float, seed: int = 0, method: str = "pplug+answers") -> list[Tokenized]:
        config = Settings().changed({"plug.persona_dropout": share, "seed": seed})
        models = SimpleNamespace(task=TASK, tokenizer=TOKENIZER, store=None, config=config)
        return TrainingInputs(models, examples)(METHODS[method], config)

    def new(found: list[Tokenized]) -> list[bool]:
        for each, asked in zip(found, examples, strict=True):
            bare = each.prompt == asked.input
            assert bare == (not each.shown) == (not len(each.history.texts))
            assert bare == (not len(each.item_features["age"]))
        return [not each.shown for each in found]

    assert not any(new(train(0.0)))
    assert all(new(train(1.0)))
    some = new(train(0.1))
    assert 20 < sum(some) < 60
    assert new(train(0.1)) == some != new(train(0.1, seed=1))
    # The control is trained on the same prompts.
    control = train(0.1, method="instruction_only+answers")
    assert [each.prompt for each in control] == [each.prompt for each in train(0.1)]


def test_users_with_half_a_history_in_common_are_one() -> None:
    held_out = [np.array(r, int) for r in ([1, 2, 3, 4], [10], [])]
    train = [np.array(r, int) for r in ([5, 6], [1, 7, 8], [1, 2, 8, 9], [4, 5], [9, 10], [])]
    assert unseen(train, held_out) == [0, 1, 5]
    assert unseen(train, []) == list(range(6))


def test_a_share_of_the_users_is_held_out_with_all_they_have() -> None:
    # 20 users of 1 to 5 questions, whose histories differ by an item or two; one without history.
    users = [user for user in range(20) for _ in range(user % 5 + 1)]
    histories = [np.arange(10 * user + i % 2, 10 * user + 8) for i, user in enumerate(users)]
    histories.append(np.zeros(0, np.int64))
    kept, held = split_users(histories, 0.3, seed=1)
    assert sorted([*kept, *held]) == list(range(len(histories)))
    assert 0.3 * len(histories) <= len(held) < 0.3 * len(histories) + 5
    assert not {users[i] for i in kept if i < 60} & {users[i] for i in held if i < 60}
    assert split_users(histories, 0.3, seed=1) == (kept, held) != split_users(histories, 0.3, 2)


def test_own_items_are_examples_of_the_task_without_their_answer() -> None:
    found = list(own_items(TASK, example(3, 3), 512))
    assert [e.target for e in found] == ["T3.0", "T3.1", "T3.2"]
    assert found[1].input == "Generate a title for the following abstract of a paper: about 1"
    assert [item["title"] for item in found[1].profile] == ["T3.0", "T3.2"]
    assert found[1].user == "name 3"
    assert TASK.query_text(found[1].input) == "about 1"


def test_own_items_are_in_the_history_of_their_user() -> None:
    nameless = dataclasses.replace(example(3, 9), user="")
    (found, *_), others = own_items(TASK, nameless, 4), own_items(TASK, example(3, 9), 4)
    assert [item["title"] for item in found.profile] == ["T3.6", "T3.7", "T3.8"]
    assert found.owner == nameless.owner != example(3, 9).owner
    assert {other.owner for other in others} == {"name 3"}


def test_an_item_that_stands_twice_is_no_history_of_itself() -> None:
    item = {"title": "T", "abstract": "A"}
    twice = Example("u", "", "", (item, dict(item), item | {"title": ""}))
    found = list(own_items(TASK, twice, 512))
    assert len(found) == 2  # what has no answer is no example
    assert all(len(e.profile) == 1 for e in found)


def test_some_own_items_stand_behind_the_examples() -> None:
    examples = [example(0, 5), example(1, 1), example(2, 0)]
    assert list(WithOwnItems(TASK, examples, 0, 0, 9)) == examples
    more = WithOwnItems(TASK, examples, 2, 0, 9)
    found = list(more)
    assert found[:3] == examples
    assert [e.user for e in found[3:]] == ["name 0", "name 0", "name 1"]
    assert found[3].target != found[4].target
    assert list(more) == found
    other = WithOwnItems(TASK, [example(0, 50)], 2, 1, 99)
    first = WithOwnItems(TASK, [example(0, 50)], 2, 0, 99)
    assert [e.id for e in other][1:] != [e.id for e in first][1:]


def test_a_subset_reads_what_it_is_asked_for() -> None:
    examples = [example(i, 1) for i in range(5)]
    some = Subset(examples, np.array([3, 1]))
    assert [e.id for e in some] == ["u3", "u1"]
    assert len(some) == 2
