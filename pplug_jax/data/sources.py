"""Read the splits that a config names: the task's files, a TFDS data set, the embedded sample."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from etils import epath

from pplug_jax.data import lamp, sample
from pplug_jax.data.lamp import Example, Subset
from pplug_jax.data.records import raise_bad
from pplug_jax.data.tasks import TASKS
from pplug_jax.errors import ConfigError, DataError
from pplug_jax.runtime.console import say
from pplug_jax.settings import Settings
from pplug_jax.storage.files import write_json_lines
from pplug_jax.storage.workdir import BAD_RECORDS


def data_directory(config: Settings) -> Path | None:
    """Return the directory of the task's files, or None for the embedded sample."""
    if config.data.path:
        return Path(config.data.path)
    if config.data.sample_eval_users:
        return None
    return Path("data", *(["time"] if config.data.time_based else []), config.task)


def data_name(config: Settings) -> str:
    """Return what the data are, in words."""
    return config.data.path or str(data_directory(config) or "the embedded sample")


def part_of(split: str) -> tuple[str, int | None]:
    """Return a split's name and how many records of it are meant: `train[:300]` is the first 300.

    TFDS writes parts so; None means all.

    Raises:
        ConfigError: another part than the first records.
    """
    match = re.fullmatch(r"(.+)\[:(\d+)\]", split)
    if not match and split.endswith("]"):
        raise ConfigError(
            f"{split!r}: of a split the first records alone can be named, as in train[:300]"
        )
    return (match[1], int(match[2])) if match else (split, None)


def existing_directory(config: Settings, split: str) -> Path:
    """Return the directory of the task's files.

    Raises:
        ConfigError: it does not exist.
    """
    directory = data_directory(config)
    if directory is None or not directory.is_dir():
        names = lamp.expected_files(TASKS[config.task], part_of(split)[0])
        is_lamp = config.task.startswith("LaMP_")
        hint = "; --mode=download brings LaMP's public files" if is_lamp else ""
        raise ConfigError(
            f"config.data.path: there is no directory {str(directory)!r}; it should hold "
            f"{names} (docs/data.md){hint}"
        )
    return directory


def read_split(
    config: Settings,
    role: str,
    on_bad: Callable[[DataError], None] = raise_bad,
) -> Sequence[Example]:
    """Return the split to train on or to answer.

    Args:
        config: the settings.
        role: `train` or `eval`.
        on_bad: called with each record that is left out.

    Raises:
        ConfigError: a directory is missing.
        DataError: a file is broken, or there is no example at all.
    """
    split, task = getattr(config.data, f"{role}_split"), TASKS[config.task]
    if data_directory(config) is None:
        return list(sample.users(config.seed, split, getattr(config.data, f"sample_{role}_users")))
    sort_by_date = config.data.sort_by_date
    if (epath.Path(data_name(config)) / "dataset_info.json").exists():
        from pplug_jax.data.tfds_builder import read_tfds  # slow to import

        return read_tfds(data_name(config), split, task, sort_by_date=sort_by_date)
    directory = existing_directory(config, split)
    name, count = part_of(split)
    examples = lamp.read(directory, name, task, sort_by_date=sort_by_date, on_bad=on_bad)
    if not examples or count == 0:
        raise DataError(directory, f"the split {split} has no questions")
    return examples if count is None else Subset(examples, range(min(count, len(examples))))


def report_bad(workdir: Path, bad: Sequence[DataError]) -> None:
    """List the records that were left out in `bad_records.jsonl`."""
    path = workdir / BAD_RECORDS
    write_json_lines(
        path,
        ({"file": e.file, "line": e.line, "record": e.where, "problem": e.problem} for e in bad),
    )
    say(
        f"bad records left out (config.data.on_error=skip): {len(bad)}, listed in {path}; "
        f"the first: {bad[0]}"
    )
