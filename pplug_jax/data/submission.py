"""Write predictions as the benchmarks' own evaluations read them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pplug_jax.data.tasks import Task
from pplug_jax.storage.files import write_json, write_json_lines


def write(path: Path, task: Task, answers: Mapping[str, str]) -> None:
    """Write {id: answer} in LaMP's format, which LongLaMP shares, or in LaMP-QA's."""
    if task.judged:
        content: Any = {id: [{"output": answer}] for id, answer in answers.items()}
    else:
        golds = [{"id": id, "output": answer} for id, answer in answers.items()]
        content = {"task": task.name, "golds": golds}
    write_json(path, content)


def read(path: Path, task: Task) -> dict[str, str]:
    """Return {id: answer} of a file that `write` made."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if task.judged:
        return {id: outputs[0]["output"] for id, outputs in content.items()}
    return {gold["id"]: gold["output"] for gold in content["golds"]}


def write_judged(path: Path, task: Task, examples: Any, answers: Mapping[str, str]) -> None:
    """Write what a judge needs, a line for each example: question, answer, and rubric."""
    fields = ("id", task.input_key, *task.judged)
    records = map(examples.record, range(len(examples)))
    write_json_lines(
        path,
        (
            {field: record.get(field) for field in fields} | {"response": answer}
            for record, answer in zip(records, answers.values(), strict=True)
        ),
    )
