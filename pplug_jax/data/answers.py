"""Find out what the data say of a task: which field of an item is what the output is."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np

from pplug_jax.data.lamp import Example, Subset
from pplug_jax.data.tasks import TASKS, Task
from pplug_jax.errors import ConfigError
from pplug_jax.settings import Settings, upgraded
from pplug_jax.storage.files import read_object
from pplug_jax.storage.workdir import CONFIG

READ = 1000  # examples, spread evenly over the split
AS_SHORT = 2  # the most that the outputs' median length may be of the items' fields, or the reverse


def task_of(config: Settings) -> Task:
    """Return the config's task; where its data say what an answer is, with what they say."""
    task = TASKS[config.task]
    return task.learnt(config.data.answer, config.data.instruction) if task.answers else task


def learnt(config: Settings, workdir: Path, examples: Sequence[Example]) -> Settings:
    """Return the settings with `data.answer` and `data.instruction`, where they are empty.

    What a workdir began with stays, whatever split is read now.

    Raises:
        ConfigError: no item has the field that `data.answer` names.
    """
    task = TASKS[config.task]
    if not task.answers:
        return config
    path = workdir / CONFIG
    if path.is_file():
        data = Settings.of(upgraded(read_object(path))).data
        answer, instruction = data.answer, data.instruction
    else:
        places = np.unique(np.linspace(0, len(examples) - 1, READ).round().astype(int))
        read = list(Subset(examples, places.tolist()))
        _check_answer(config.data.answer, read)
        answer, instruction = find_answer(task, read), find_instruction(task, read)
    return config.changed(
        {
            "data.answer": config.data.answer or answer,
            "data.instruction": config.data.instruction or instruction,
        }
    )


def _check_answer(field: str, examples: Sequence[Example]) -> None:
    items = [item for example in examples for item in example.profile]
    if field and items and not any(item[field].strip() for item in items):
        raise ConfigError(f"config.data.answer: none of {len(items)} items has a {field}")


def find_answer(task: Task, examples: Sequence[Example]) -> str:
    """Return the optional field that every item has and that is as short as the outputs.

    Returns:
        the field; empty if none is so, or there are no outputs or no items.
    """
    items = [item for example in examples for item in example.profile]
    outputs = [len(example.target.split()) for example in examples if example.target]
    for field in task.optional if items and outputs else ():
        words = [len(item[field].split()) for item in items]
        if all(words) and 1 / AS_SHORT <= median(outputs) / median(words) <= AS_SHORT:
            return field
    return ""


def find_instruction(task: Task, examples: Sequence[Example]) -> str:
    """Return the sentences that all inputs begin with, but for those that all items begin with.

    Of `Write a title. Text: It rains.` it is `Write a title. `, if all items' texts begin with
    `Text: `.
    """
    inputs = {example.input for example in examples}
    texts = [item[task.cut] for example in examples for item in example.profile]
    return _beginning([*inputs]).removesuffix(_beginning(texts)) if len(inputs) > 1 else ""


def _beginning(texts: Sequence[str]) -> str:
    """Return the sentences, the last of which may end with a colon, that all texts begin with."""
    sentences = re.match(r".*[.:?!\n]\s*(?<=\s)", os.path.commonprefix(texts), re.DOTALL)
    return sentences[0] if sentences else ""
