"""Read a task's files to the end, and say what is in them and what is wrong with them."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pplug_jax.data import lamp
from pplug_jax.data.keys import text_key
from pplug_jax.data.lamp import Examples
from pplug_jax.data.tasks import Task
from pplug_jax.errors import DataError
from pplug_jax.runtime.console import say

BAR = 40  # characters


def check_data(directory: Path, task: Task, splits: Sequence[str] = ()) -> int:
    """Print counts, histograms of lengths and every bad record of the splits in the directory.

    Args:
        directory: the task's files.
        task: the task.
        splits: the splits to read; none means all.

    Returns:
        The number of bad records.

    Raises:
        DataError: there is no split, or a file cannot be read to its end.
    """
    splits = splits or lamp.splits(directory, task)
    if not splits:
        names = lamp.expected_files(task, "SPLIT")
        raise DataError(directory, f"no data there: {task.name} is read from {names}")
    count = 0
    for split in splits:
        bad: list[DataError] = []
        examples = lamp.read(directory, split, task, sort_by_date=False, on_bad=bad.append)
        _describe(split, examples, len(bad))
        for error in bad:
            line, place = f"line {error.line}", error.where
            if error.line is not None and not place.startswith(line):
                place = f"{line}: {place}"
            say(f"  {Path(error.file).name}: {place}: {error.problem}")
        count += len(bad)
    return count


def _describe(split: str, examples: Examples, bad: int) -> None:
    task = examples.task
    lengths: dict[str, Counter[int]] = {
        name: Counter() for name in ("input", "output", "profile", "item")
    }
    users: set[str] = set()
    texts: set[bytes] = set()
    labels: Counter[str] = Counter()
    dated = 0
    odd: Counter[str] = Counter()
    for example in examples:
        users.add(example.user)
        lengths["input"][len(example.input.split())] += 1
        lengths["profile"][len(example.profile)] += 1
        if example.target is not None:
            lengths["output"][len(example.target.split())] += 1
            labels[example.target.strip()] += bool(task.labels)
        for item in example.profile:
            text = task.item_text(item)
            texts.add(text_key(text))
            lengths["item"][len(text.split())] += 1
            if "date" in item:
                dated += 1
                odd[str(item["date"])] += lamp.is_misleading(item["date"])
    items = lengths["item"].total()
    say(f"{examples.path}")
    say(f"  {len(examples):,} good records, {bad:,} bad ones" + (", listed below" if bad else ""))
    if users != {""}:
        say(f"  {len(users - {''}):,} users")
    say(f"  {lengths['output'].total():,} outputs")
    say(f"  {items:,} history items, {len(texts):,} different texts, {dated:,} with a date")
    if odd.total():
        such = ", ".join(repr(date) for date, count in odd.most_common(3) if count)
        say(
            f"  {odd.total():,} dates are not as 2024-01-31 or Unix time, so they do not tell the "
            f"order of items: {such}"
        )
    for label in task.labels:
        say(f"  output {label}: {labels[label]:,}")
    for name, unit in (
        ("profile", "history items of a record"),
        ("input", "words of an input"),
        ("output", "words of an output"),
        ("item", "words of a history text"),
    ):
        for line in _histogram(unit, lengths[name]):
            say(f"  {line}")


def _histogram(title: str, lengths: Counter[int]) -> list[str]:
    """Return rows for the lengths 0, 1, 2-3, 4-7, 8-15 and so on."""
    if not lengths:
        return []
    values = np.array(sorted(lengths))
    counts = np.array([lengths[value] for value in values])
    middle = values[np.searchsorted(np.cumsum(counts), (counts.sum() + 1) // 2)]
    mean = (values * counts).sum() / counts.sum()
    bins = np.bincount([int(value).bit_length() for value in values], counts).astype(int)
    lines = [f"{title}: {values[0]} to {values[-1]}, median {middle}, mean {mean:.1f}"]
    for bits in range(int(values[0]).bit_length(), len(bins)):
        low, high = (1 << bits) // 2, (1 << bits) - 1
        span = str(low) if low >= high else f"{low}-{high}"
        bar = "#" * -(-BAR * bins[bits] // bins.max())
        lines.append(f"  {span:>13} {bins[bits]:>9,} {bar}".rstrip())
    return lines
