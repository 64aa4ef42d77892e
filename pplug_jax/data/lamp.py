"""LaMP-format files: `{split}_questions.json` and `{split}_outputs.json` as examples."""

import collections
import dataclasses
import json
from pathlib import Path
from typing import Any

from pplug_jax.data.tasks import Task
from pplug_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Example:
    """A question of a user.

    target: None where the outputs are withheld.
    profile: the user's history items, as LaMP gives them.
    """

    id: str
    input: str
    target: str | None
    profile: tuple[dict[str, Any], ...]


class DataError(InputError):
    """A file or record that is not as LaMP's format says; the message names where."""


def _load(path: Path) -> Any:
    if not path.is_file():
        raise DataError(
            f"{path}: no such file; "
            "a LaMP directory holds {split}_questions.json and {split}_outputs.json"
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: not JSON: {error.msg} at line {error.lineno}, column {error.colno}; "
            "if the file ends there, it was cut off in a download: fetch it again"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}") from error


def _field(record: Any, field: str, kind: type, path: Path, where: str) -> Any:
    if not isinstance(record, dict):
        raise DataError(f"{path}: {where}: expected an object, found {type(record).__name__}")
    if field not in record:
        raise DataError(f"{path}: {where}: the field {field!r} is missing")
    if not isinstance(record[field], kind):
        raise DataError(
            f"{path}: {where}: the field {field!r} must be {kind.__name__}, "
            f"not {type(record[field]).__name__}"
        )
    if kind is str:
        try:
            record[field].encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{path}: {where}: the field {field!r} holds half of a surrogate pair "
                f"at character {error.start}, "
                "which no tokenizer reads: mend or remove that character"
            ) from error
    return record[field]


def _unique(ids: list[str], path: Path) -> None:
    if twice := [id for id, count in collections.Counter(ids).items() if count > 1]:
        raise DataError(
            f"{path}: the id {twice[0]!r} stands there more than once ({len(twice)} such ids); "
            "ids must be unique"
        )


def read(directory: str | Path, split: str, task: Task) -> list[Example]:
    """The examples of `split`, in the questions' order.

    Without an outputs file (LaMP withholds those of the test split) the targets are None. An empty
    profile is allowed.

    Raises:
        DataError: a missing or broken file, a missing or mistyped field, a duplicate id, a question
            without an output or an output without a question.
    """
    questions_path = Path(directory) / f"{split}_questions.json"
    outputs_path = Path(directory) / f"{split}_outputs.json"
    questions = _load(questions_path)
    if not isinstance(questions, list):
        raise DataError(
            f"{questions_path}: expected a list of questions, found {type(questions).__name__}"
        )

    targets: dict[str, str] | None = None
    if split != "test" or outputs_path.is_file():
        outputs = _load(outputs_path)
        if _field(outputs, "task", str, outputs_path, "the file") != task.name:
            raise DataError(
                f"{outputs_path}: the task is {outputs['task']!r}, the config's is {task.name!r}"
            )
        golds = _field(outputs, "golds", list, outputs_path, "the file")
        ids = [
            _field(gold, "id", str, outputs_path, f"gold number {n}")
            for n, gold in enumerate(golds)
        ]
        _unique(ids, outputs_path)
        targets = {
            id: _field(gold, "output", str, outputs_path, f"id {id!r}")
            for id, gold in zip(ids, golds, strict=True)
        }

    examples = []
    for n, question in enumerate(questions):
        id = _field(question, "id", str, questions_path, f"question number {n}")
        where = f"id {id!r}"
        input = _field(question, "input", str, questions_path, where)
        profile = _field(question, "profile", list, questions_path, where)
        for i, item in enumerate(profile):
            for field in task.fields:
                _field(item, field, str, questions_path, f"{where}, profile item {i}")
        if targets is not None and id not in targets:
            raise DataError(
                f"{outputs_path}: the question {where} of {questions_path.name} has no output there"
            )
        examples.append(
            Example(id, input, None if targets is None else targets[id], tuple(profile))
        )
    _unique([example.id for example in examples], questions_path)
    if targets is not None and (extra := targets.keys() - {example.id for example in examples}):
        raise DataError(
            f"{outputs_path}: the output of id {min(extra)!r} has no question in "
            f"{questions_path.name} ({len(extra)} such)"
        )
    return examples
