"""Read LaMP's files, and those of benchmarks with one table a split, as examples.

Examples are read from their file whenever they are asked for, as a split may be larger than the
memory.
"""

import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pplug_jax.data import parquet, records
from pplug_jax.data.records import Place, raise_bad
from pplug_jax.data.tasks import Task
from pplug_jax.errors import DataError, InputError
from pplug_jax.runtime.console import say

T = TypeVar("T")

Item = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Example:
    """A question of a user.

    Attributes:
        id: names the example in its file.
        input: what the LLM is asked, instruction included.
        target: the right output; None if it is withheld.
        profile: the user's history items, as the files have them.
        user: who asks; empty if the files do not say.
    """

    id: str
    input: str
    target: str | None
    profile: tuple[Item, ...]
    user: str = ""

    @property
    def owner(self) -> str:
        """Names whose items the history store keeps together: the user, or else this profile."""
        return self.user or hashlib.sha256(json.dumps(self.profile).encode()).hexdigest()


TWICE = "the id stands there more than once; ids must be unique"


class _Bad(Exception):
    """A record that is not as the format says: (where, problem)."""

    def error(self, path: Path, line: int | None = None) -> DataError:
        where, problem = self.args
        return DataError(path, problem, where, line)


def _field(record: Any, field: str, kind: type | tuple[type, ...], where: str) -> Any:
    if not isinstance(record, dict):
        raise _Bad(where, f"expected an object, found {type(record).__name__}")
    if field not in record:
        raise _Bad(where, f"the field {field!r} is missing")
    value = record[field]
    # JSON's true and false are no numbers, though Python's are.
    if not isinstance(value, kind) or isinstance(value, bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        names = " or ".join(k.__name__ for k in kinds)
        raise _Bad(where, f"the field {field!r} must be {names}, not {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise _Bad(where, f"the field {field!r} is {value}, no value; leave the field out")
    if isinstance(value, str):
        _check_text(value, f"the field {field!r}", where)
    return value


def _check_text(text: str, what: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _Bad(
            where,
            f"{what} holds half of a surrogate pair at character {error.start}, "
            "which no tokenizer reads: mend or remove that character",
        ) from error


def date_order(item: Item) -> list[int]:
    """Return a key that orders items by the numbers in their `date`; one without is the oldest."""
    return [int(part) for part in re.findall(r"\d+", str(item["date"]))]


# 2024, 2024-1-31, 20240131T12:30:00.5+01:00; or Unix time, in seconds to milliseconds.
ORDERLY = re.compile(
    r"\s*(?:[12]\d{3}(?:[-/.]?\d{1,2}){0,2}"
    r"(?:[T ]\d{1,2}(?::?\d{2}){0,2}(?:[.,]\d+)?)?\s*(?:Z|UTC|GMT|[+-]\d{2}:?\d{2})?"
    r"|\d{9,13}(?:\.\d+)?)\s*",
    re.ASCII,
)


def is_misleading(date: Any) -> bool:
    """Return whether a date's numbers do not order by time, as in March 1, 2024, or are missing."""
    return not ORDERLY.fullmatch(str(date))


def by_date(profile: Sequence[Item]) -> list[Item]:
    """Return the profile oldest first if every item has a date, and otherwise unchanged."""
    return [profile[i] for i in places_by_date(profile)]


def places_by_date(profile: Sequence[Item]) -> list[int]:
    """Return the items' places, oldest first if every item has a date, and otherwise as they are.

    LaMP's readers take the file's order for that of time.
    """
    dated = all("date" in item for item in profile)
    places = range(len(profile))
    return sorted(places, key=lambda i: date_order(profile[i])) if dated else list(places)


def _item(item: Any, task: Task, where: str) -> Item:
    """Return the item with every field of the task as a string; an optional field may be empty."""
    texts = {}
    for field in (*task.fields, *task.optional, task.label):
        given = isinstance(item, dict) and item.get(field) is not None
        if field and (given or field in task.fields):
            # Scores come as numbers too.
            kind = (str, int, float) if field == task.label else str
            texts[field] = str(_field(item, field, kind, where))
        elif field:
            texts[field] = ""
    if item.get("date") is not None:
        _field(item, "date", (str, int, float), where)
    return {key: value for key, value in item.items() if (key, value) != ("date", None)} | texts


def check_input(text: Any) -> None:
    """Check an input that did not come from a file as those that do.

    Raises:
        InputError: it is no text that a tokenizer reads.
    """
    if not isinstance(text, str):
        raise InputError(f"the input must be a text, not {type(text).__name__}")
    try:
        _check_text(text, "it", "the input")
    except _Bad as bad:
        raise InputError(": ".join(bad.args)) from bad


def check_history(task: Task, history: Any, *, sort_by_date: bool) -> list[str | Item]:
    """Check and order a history that did not come from a file as those that do.

    Args:
        task: the task whose fields the items have.
        history: items as the task's files have them, or texts alone.
        sort_by_date: order items that all have dates.

    Raises:
        InputError: an item is wrong; the message names its place and field.
    """
    # An array of no dimension looks iterable and is not.
    if (
        isinstance(history, (str, bytes, dict))
        or not isinstance(history, Iterable)
        or (getattr(history, "ndim", 1) == 0)
    ):
        raise InputError(
            f"the history must be a list of items, not one {type(history).__name__}; "
            "put it into a list"
        )
    checked: list[Any] = []
    for i, item in enumerate(history):
        where = f"history item {i}"
        try:
            if isinstance(item, str):
                _check_text(item, "the text", where)
                checked.append(item)
            else:
                checked.append(_item(item, task, where))
        except _Bad as bad:
            raise InputError(": ".join(bad.args)) from bad
    if sort_by_date and all(isinstance(item, dict) for item in checked):
        return list(in_order(checked, "history"))
    return checked


def in_order(profile: Sequence[Item], where: str) -> Sequence[Item]:
    """Return `by_date` of the profile, and warn if its dates do not tell the order.

    Args:
        profile: the items.
        where: names the profile in the warning.
    """
    if all("date" in item for item in profile):
        for i, item in enumerate(profile):
            if is_misleading(item["date"]):
                _warn_of_dates(f"{where} item {i}: {item['date']!r}")
                break
    return by_date(profile)


@functools.lru_cache(maxsize=1)
def _warned() -> list[str]:
    """Return the warnings about dates so far, one list for the whole process."""
    return []


def _warn_of_dates(date: str) -> None:
    if not _warned():
        _warned().append(date)
        say(
            f"warning: {date} is no date as 2024-01-31 or Unix time, so such items are not in the "
            "order of time; write them as these, or give --config.data.sort_by_date=False where "
            "the items are in order already (--mode=check_data counts such dates)"
        )


def parse(
    task: Task, record: Any, where: str, *, default_id: str = "", sort_by_date: bool = True
) -> Example:
    """Return a record as an example.

    LaMP's questions get no target, as their outputs stand in another file.

    Args:
        task: the task.
        record: the record.
        where: names the record before its id is known.
        default_id: the id if the format asks for none.
        sort_by_date: order a profile whose items all have dates.

    Raises:
        _Bad: a missing or mistyped field.
    """
    if default_id and isinstance(record, dict) and record.get("id") is None:
        id = default_id
    else:
        id = str(_field(record, "id", (str, int) if default_id else str, where))
        where = where if default_id else f"id {id!r}"
    user, target = "", None
    if record.get(task.user_key) is not None:
        user = str(_field(record, task.user_key, (str, int), where))
    if not task.questions_and_outputs and record.get(task.output_key) is not None:
        target = _field(record, task.output_key, str, where)
    input = _field(record, task.input_key, str, where)
    profile = [
        _item(item, task, f"{where}, profile item {i}")
        for i, item in enumerate(_field(record, "profile", list, where))
    ]
    if sort_by_date:
        profile = [*in_order(profile, f"{where}, profile")]
    return Example(id, input, target, tuple(profile), user)


class Examples(Sequence[Example]):
    """The examples at given places of files, each read and parsed when it is asked for."""

    def __init__(
        self,
        path: Path,
        task: Task,
        read: Sequence[tuple[Place, Example]],
        sort_by_date: bool,
        load: Callable[[Place], Item],
    ):
        self.path, self.task, self.sort_by_date, self.load = path, task, sort_by_date, load
        self.places = [place for place, _ in read]
        self.ids_and_targets = [(example.id, example.target) for _, example in read]

    def __len__(self) -> int:
        return len(self.places)

    def record(self, index: int) -> Item:
        """Return the record as the file has it."""
        return self.load(self.places[index])

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]  # no slices
        id, target = self.ids_and_targets[index]
        try:
            record = self.record(index)
            example = parse(self.task, record, "", default_id=id, sort_by_date=self.sort_by_date)
        except (_Bad, ValueError, StopIteration) as error:
            raise DataError(self.path, "it was changed while it was in use; start again") from error
        return dataclasses.replace(example, target=target)


def _outputs(path: Path, task: Task, on_bad: Callable[[DataError], None]) -> dict[str, str]:
    """Return the outputs by id, from a submission or, as in LongLaMP's e-mails, a list."""
    golds = records.document(path)
    if not isinstance(golds, list):
        try:
            name = _field(golds, "task", str, "the file")
            golds = _field(golds, "golds", list, "the file")
        except _Bad as bad:
            raise bad.error(path) from bad
        if name != task.name:
            raise DataError(path, f"the task is {name!r}, the config's is {task.name!r}")
    outputs: dict[str, str] = {}
    for n, gold in enumerate(golds):
        try:
            id = _field(gold, "id", str, f"gold number {n}")
            output = _field(gold, "output", str, f"id {id!r}")
            _check_label(task, output, f"id {id!r}")
            if id in outputs:
                raise _Bad(f"id {id!r}", TWICE)
            outputs[id] = output
        except _Bad as bad:
            on_bad(bad.error(path))
    return outputs


def _check_label(task: Task, output: str, where: str) -> None:
    if task.labels and output.strip() not in task.labels:
        raise _Bad(where, f"the output {output!r} is none of {', '.join(task.labels)}")


def file_names(task: Task, split: str) -> list[str]:
    """Return the names of a split's JSON files; if it has one, the first name that exists."""
    if task.questions_and_outputs:
        return [f"{split}_questions.json", f"{split}_outputs.json"]
    return [f"{split}.jsonl", f"{split}.json"]


def expected_files(task: Task, split: str) -> str:
    """Return the names of a split's files in words."""
    names = file_names(task, split)
    if task.questions_and_outputs:
        return " and ".join(names)
    return " or ".join([*names, f"{split}.parquet"])  # or by another name of `parquet.files`


def splits(directory: str | Path, task: Task) -> list[str]:
    """Return the splits whose files are in the directory."""
    ends = [name.removeprefix("*") for name in file_names(task, "*")]
    if task.questions_and_outputs:
        ends = ends[:1]
    names = sorted(path.name for path in Path(directory).iterdir())
    splits = [name.removesuffix(end) for end in ends for name in names if name.endswith(end)]
    return splits if task.questions_and_outputs else [*splits, *parquet.files(Path(directory))]


def read(
    directory: str | Path,
    split: str,
    task: Task,
    *,
    sort_by_date: bool = True,
    on_bad: Callable[[DataError], None] = raise_bad,
) -> Examples:
    """Return the examples of `split`, in the file's order.

    Without outputs (benchmarks withhold those of the test split) the targets are None. An empty
    profile is allowed.

    Args:
        directory: the task's files.
        split: the split.
        task: the task.
        sort_by_date: order a profile whose items all have dates.
        on_bad: called with each record that is not as the format says; the record is left out.

    Raises:
        DataError: a missing or broken file. By default also a missing or mistyped field, a
            duplicate id, an output that is no label of the task, a question without an output or
            the reverse.
    """
    path, other_path = (Path(directory) / name for name in file_names(task, split))
    load: Callable[[Place], Item] = records.load
    rows: Iterable[tuple[Place, Any]]
    outputs: dict[str, str] | None = None
    if task.questions_and_outputs:
        outputs_path = other_path
        if split != "test" or outputs_path.is_file():
            outputs = _outputs(outputs_path, task, on_bad)
        rows = records.array(path)
    elif path.is_file() or other_path.is_file():
        path = path if path.is_file() else other_path
        rows = records.records(path, on_bad)
    elif tables := parquet.files(Path(directory)).get(split):
        path = tables[0] if len(tables) == 1 else tables[0].parent
        rows, load = parquet.records(tables, on_bad), parquet.Reader().load
    else:
        raise DataError(path, f"no such file, nor another of {expected_files(task, split)}")

    examples: dict[str, tuple[Place, Example]] = {}
    asked = set()
    for n, (place, record) in enumerate(rows):
        try:
            if task.questions_and_outputs:
                if isinstance(record, dict) and isinstance(record.get("id"), str):
                    asked.add(record["id"])
                example = parse(task, record, f"question number {n}")
                where = f"id {example.id!r}"
            else:
                where = place.where
                example = parse(task, record, where, default_id=str(n + 1))
            if example.id in examples:
                raise _Bad(where, TWICE)
            if outputs is not None and example.id not in outputs:
                raise _Bad(where, f"it has no output in {outputs_path.name}")
            if outputs is not None:
                example = dataclasses.replace(example, target=outputs[example.id])
            elif example.target is not None:
                _check_label(task, example.target, where)
            # Its profile is read again when it is asked for.
            examples[example.id] = place, dataclasses.replace(example, profile=())
        except _Bad as bad:
            on_bad(bad.error(place.path, place.line))
    for id in sorted((outputs or {}).keys() - asked):
        on_bad(DataError(outputs_path, f"it has no question in {path.name}", f"id {id!r}"))
    unanswered = [id for id, (_, example) in examples.items() if example.target is None]
    if len(unanswered) < len(examples):
        for id in unanswered:
            place = examples.pop(id)[0]
            problem = f"the field {task.output_key!r} is missing, which other records have"
            on_bad(DataError(place.path, problem, place.where, place.line))
    return Examples(path, task, list(examples.values()), sort_by_date, load)


@dataclasses.dataclass(frozen=True)
class Subset(Sequence[T]):
    """Some of the examples, or of what is made of them, read when they are asked for."""

    examples: Sequence[T]
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> T:  # type: ignore[override]  # no slices
        return self.examples[self.indices[i]]

    def record(self, i: int) -> Item:
        """Return the record as the file has it, where the examples are of one."""
        return self.examples.record(self.indices[i])  # type: ignore[attr-defined]
