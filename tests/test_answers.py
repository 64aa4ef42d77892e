"""What the data say of a task: the field that is what the output is, and the instruction."""

import json
from pathlib import Path

import numpy as np
import pytest

from configs import custom
from pplug_jax.config import check_answers, check_config
from pplug_jax.data.answers import find_answer, find_instruction, learnt, task_of
from pplug_jax.data.form import form
from pplug_jax.data.lamp import Example
from pplug_jax.data.tasks import TASKS
from pplug_jax.errors import ConfigError
from pplug_jax.feed.features import item_forms
from pplug_jax.methods.users import own_items
from pplug_jax.settings import Settings

CUSTOM = Settings.of(custom.get_config())
TASK = TASKS["custom"]
INPUTS = ("Write a title. Text: It rains {now}.", "Write a title. Text: It is dry.")


def item(text: str, title: str = "", label: str = "") -> dict[str, str]:
    return {"text": text, "title": title, "label": label}


def example(
    *profile: dict[str, str], input: str = INPUTS[0], target: str | None = "Rain again"
) -> Example:
    return Example("0", input, target, profile)


RAIN, SUN = item("Text: It rained.", "Rain today"), item("Text: It shone.", "Sun today")
EXAMPLES = [example(RAIN, SUN), example(SUN, input=INPUTS[1])]


@pytest.mark.parametrize(
    ("examples", "answer"),
    [
        (EXAMPLES, "title"),
        ([example(), example(RAIN)], "title"),
        ([example(RAIN, item("Text: no title"))], ""),
        ([example(RAIN, target="word " * 5)], ""),
        ([example(RAIN, target="word " * 4)], "title"),
        ([example(RAIN, target=None)], ""),
        ([example()], ""),
    ],
)
def test_the_answer_is_what_all_items_have_and_is_as_short(
    examples: list[Example], answer: str
) -> None:
    assert find_answer(TASK, examples) == answer


@pytest.mark.parametrize(
    ("inputs", "texts", "instruction"),
    [
        (INPUTS, ("Text: a", "Text: b"), "Write a title. "),
        (INPUTS, ("a", "b"), "Write a title. Text: "),
        (INPUTS, (), "Write a title. Text: "),
        (("Write: cats", "Write: cars"), ("a",), "Write: "),
        (("Write it:\na", "Write it:\nb"), ("x", "y"), "Write it:\n"),
        (("cats", "cars"), ("a",), ""),
        (("One. Only.", "One. Only."), ("a",), ""),
        (("3.14 is", "3.15 is"), ("a",), ""),
    ],
)
def test_the_instruction_is_what_every_input_begins_with(
    inputs: tuple[str, ...], texts: tuple[str, ...], instruction: str
) -> None:
    profile = [item(text) for text in texts]
    examples = [example(*profile, input=input) for input in inputs]
    assert find_instruction(TASK, examples) == instruction


def test_what_is_learnt_is_used_everywhere(tmp_path: Path) -> None:
    task = task_of(learnt(CUSTOM, tmp_path, EXAMPLES))
    assert task.query_text(INPUTS[0]) == "Text: It rains {now}."
    assert task.query_text("Name it: x") == "Name it: x"
    first, second = own_items(task, EXAMPLES[0], 512)
    assert (first.input, first.target) == ("Write a title. Text: It rained.", "Rain today")
    assert second.profile == (RAIN,)
    assert task.demonstration(RAIN) == '"Rain today" is the title for "Text: It rained." '
    expected = [form("Rain today"), form("Sun today")]
    np.testing.assert_array_equal(item_forms(task, EXAMPLES[0].profile), expected)
    braces = TASK.learnt("title", "Write {it}: ").own_example(RAIN)
    assert braces == ("Write {it}: Text: It rained.", "Rain today")


def test_a_texts_own_item_would_show_its_answer() -> None:
    assert TASK.learnt("text", "Write: ").question == ""
    assert TASK.learnt("", "").query_text(" all ") == "all"


def test_the_config_and_the_workdir_go_before_the_data(tmp_path: Path) -> None:
    def found(config: Settings = CUSTOM) -> tuple[str, str]:
        data = learnt(config, tmp_path, EXAMPLES).data
        return data.answer, data.instruction

    assert found(CUSTOM.changed({"data.answer": "text"})) == ("text", "Write a title. ")
    saved = {"data": {"answer": "text", "instruction": "Say "}}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert found() == ("text", "Say ")
    # One that was made before anything was learnt goes on as it began.
    (tmp_path / "config.json").write_text("{}")
    assert found() == ("", "")


def test_an_answer_that_no_item_has(tmp_path: Path) -> None:
    config = CUSTOM.changed({"data.answer": "label"})
    with pytest.raises(ConfigError, match=r"config\.data\.answer: none of 3 items has a label"):
        learnt(config, tmp_path, EXAMPLES)
    assert learnt(config, tmp_path, [example()]).data.answer == "label"


def test_own_items_need_an_answer() -> None:
    config = CUSTOM.changed({"methods": ("task_lora", "user_lora")})
    check_config(config)
    with pytest.raises(ConfigError, match=r"'user_lora' .* name one of title, label with --conf"):
        check_answers(config)
    check_answers(config.changed({"data.answer": "title"}))
    with pytest.raises(ConfigError, match="no field of theirs"):
        check_answers(config.changed({"data.answer": "text"}))
    with pytest.raises(ConfigError, match=r"'answers' shows what .* those of LaMP_1 are no"):
        check_config(CUSTOM.changed({"task": "LaMP_1", "methods": ("answers",)}))


@pytest.mark.parametrize(
    ("task", "message"), [("custom", "known: title, label, text"), ("LaMP_5", "LaMP_5 has its own")]
)
def test_an_answer_that_cannot_be(task: str, message: str) -> None:
    config = CUSTOM.changed({"task": task, "data.answer": "titel"})
    with pytest.raises(ConfigError, match=rf"config\.data\.answer 'titel': {message}"):
        check_config(config)
