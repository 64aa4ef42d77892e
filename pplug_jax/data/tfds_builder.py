"""The tasks' files as TFDS data sets of array_record files; nothing here needs TensorFlow.

To prepare a task from the directory of its files:

    import tensorflow_datasets as tfds
    import pplug_jax.data.tfds_builder  # registers `personal_texts`; only preparing needs it

    tfds.builder("personal_texts/LaMP_4_time", data_dir="tfds").download_and_prepare(
        file_format="array_record",
        download_config=tfds.download.DownloadConfig(manual_dir="data/time/LaMP_4"),
    )

`tfds.data_source("personal_texts/LaMP_4_time", split="dev", data_dir="tfds")` gives its elements
as TFDS does, texts as bytes; `read_tfds("tfds/personal_texts/LaMP_4_time/1.0.0", "dev", task)`
gives what `lamp.read` gives.
"""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

from pplug_jax.data import lamp
from pplug_jax.data.lamp import Example, Examples, Item
from pplug_jax.data.tasks import TASKS, Task
from pplug_jax.errors import DataError

SHARD = 512  # examples a file; TFDS holds those of one in memory while it writes it
MAY_LACK = ("id", "date")  # an item's fields that are no texts of the task


@dataclasses.dataclass(eq=False, kw_only=True)
class TaskConfig(tfds.core.BuilderConfig):
    """A task in one of its settings."""

    task: Task


def _configs() -> Iterator[TaskConfig]:
    for name, task in TASKS.items():
        yield TaskConfig(name=name, task=task)
        if re.fullmatch(r"LaMP_\d", name):
            yield TaskConfig(name=f"{name}_time", task=task)


# TFDS's GeneratorBasedBuilder would hold a split in memory, and above 1 GB need TensorFlow.
class PersonalTexts(tfds.core.ShardBasedBuilder):
    """LaMP, LongLaMP, LaMP-QA and your own users, with a configuration for each task.

    LaMP_4 is LaMP-4's user-based setting and LaMP_4_time its time-based one; likewise the other
    tasks.

    The elements have the file's order and the texts `id`, `user` (empty if the files name no
    users), `input` and `target`. If the output is withheld, `has_target` is False and `target`
    empty. `profile` is the sequence of the items in the file's order: the task's fields, and `id`
    and `date`, empty if an item lacks them. What LaMP-QA's judge needs stands under its own names,
    as JSON.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "Initial release."}
    BUILDER_CONFIGS: ClassVar = list(_configs())
    MANUAL_DOWNLOAD_INSTRUCTIONS = """\
    manual_dir is the directory of this one task's files, of which every split is prepared:
    {split}_questions.json and {split}_outputs.json for LaMP, {split}.jsonl, {split}.json or
    {split}.parquet for the other tasks. `python -m pplug_jax.main --mode=download
    --config=configs/lamp4.py` brings LaMP's time-based files to data/time/LaMP_4; with
    --config.data.time_based=False, the user-based ones to data/LaMP_4.
    """
    # Nothing is downloaded, and to look for checksums would need a package that TFDS 4.9.10 forgets
    # to require (github.com/tensorflow/datasets/issues/11212).
    url_infos = None

    def _info(self) -> tfds.core.DatasetInfo:
        text, task = tfds.features.Text, self.builder_config.task
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"The users' texts and questions of the task {task.name}.",
            features=tfds.features.FeaturesDict(
                {
                    "id": text(),
                    "user": text(),
                    "input": text(),
                    "target": text(),
                    "has_target": np.bool_,
                    "profile": tfds.features.Sequence({field: text() for field in _fields(task)}),
                    **{field: text(doc="JSON") for field in task.judged},
                }
            ),
            disable_shuffling=True,
        )

    def _shard_iterators_per_split(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, list[Callable[[], Iterator[tuple[str, Item]]]]]:
        directory, task = os.fspath(dl_manager.manual_dir), self.builder_config.task
        shards: dict[str, list[Callable[[], Iterator[tuple[str, Item]]]]] = {}
        for split in lamp.splits(directory, task):
            examples = lamp.read(directory, split, task, sort_by_date=False)
            if not examples:
                raise DataError(directory, f"the split {split} has no questions")
            shards[split] = [
                functools.partial(_elements, examples, range(len(examples))[start : start + SHARD])
                for start in range(0, len(examples), SHARD)
            ]
        if not shards:
            names = lamp.expected_files(task, "{split}")
            raise DataError(directory, f"there is no {names} of any split")
        return shards


def _fields(task: Task) -> list[str]:
    return [field for field in (*task.fields, *task.optional, task.label, *MAY_LACK) if field]


def _elements(examples: Examples, indices: range) -> Iterator[tuple[str, Item]]:
    """Yield the examples as TFDS takes them, each after its key."""
    task = examples.task
    for index in indices:
        example = examples[index]
        record = examples.record(index) if task.judged else {}
        yield (
            example.id,
            {
                "id": example.id,
                "user": example.user,
                "input": example.input,
                "target": example.target or "",
                "has_target": example.target is not None,
                "profile": [_item(item, task) for item in example.profile],
                **{field: json.dumps(record.get(field)) for field in task.judged},
            },
        )


def _item(item: Item, task: Task) -> dict[str, str]:
    texts = {field: str(item.get(field, "")) for field in _fields(task)}
    # A profile is sorted if all its items have a date, though it be an empty one.
    return texts | {"date": "none"} if item.get("date") == "" else texts


class TfdsExamples(Sequence[Example]):
    """The examples of a prepared split, each read and decoded when it is asked for."""

    def __init__(self, elements: Sequence[Item], task: Task, sort_by_date: bool):
        self.elements, self.task, self.sort_by_date = elements, task, sort_by_date

    def __len__(self) -> int:
        return len(self.elements)

    def record(self, index: int) -> Item:
        """Return the id, the question, and what its judge needs, named as in the file."""
        element = self.elements[index]
        texts = {"id": element["id"].decode(), self.task.input_key: element["input"].decode()}
        return texts | {field: json.loads(element[field]) for field in self.task.judged}

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]  # no slices
        # A range knows negative indices, and raises IndexError at the end.
        element = self.elements[range(len(self))[index]]
        fields = element["profile"].keys()
        profile = [
            {
                field: text.decode()
                for field, text in zip(fields, texts, strict=True)
                if text or field not in MAY_LACK
            }
            for texts in zip(*element["profile"].values(), strict=True)
        ]
        return Example(
            id=element["id"].decode(),
            input=element["input"].decode(),
            target=element["target"].decode() if element["has_target"] else None,
            profile=tuple(lamp.in_order(profile, "profile") if self.sort_by_date else profile),
            user=element["user"].decode(),
        )


def read_tfds(
    directory: str | os.PathLike[str], split: str, task: Task, *, sort_by_date: bool = True
) -> TfdsExamples:
    """Return the examples of a prepared `split`, as `lamp.read` returns them and in its order.

    A profile's items have the task's fields, `id` and `date`, all as strings.

    Args:
        directory: one version of the data set, as .../personal_texts/LaMP_4_time/1.0.0; a gs:// one
            needs the package gcsfs.
        split: a split, or a part of one in TFDS's notation, as train[:10%].
        task: the task.
        sort_by_date: order a profile whose items all have dates.

    Raises:
        DataError: no such data set or split, a file format without random access, or the data of
            another task.
    """
    directory = os.fspath(directory)
    try:
        builder = tfds.builder_from_directory(directory)
        elements = builder.as_data_source(split)
    except (ImportError, OSError, ValueError, NotImplementedError) as error:
        raise DataError(directory, f"no TFDS data set to read from: {error}") from error
    config = PersonalTexts.builder_configs.get(builder.info.config_name)
    if builder.name != PersonalTexts.name or not config or config.task.name != task.name:
        name = f"{builder.name}/{builder.info.config_name}"
        raise DataError(directory, f"the data set is {name}, the config's task is {task.name!r}")
    return TfdsExamples(elements, task, sort_by_date)
