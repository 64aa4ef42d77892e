"""Read what a run has left in its workdir, and the examples that it was evaluated on."""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pplug_jax.data import submission
from pplug_jax.data.answers import task_of
from pplug_jax.data.lamp import Example, Item
from pplug_jax.data.records import raise_bad
from pplug_jax.data.sources import read_split
from pplug_jax.data.tasks import TASKS, Task
from pplug_jax.errors import InputError
from pplug_jax.scoring.metrics import METRICS
from pplug_jax.settings import Settings, flatten
from pplug_jax.storage.scalars import read_scalars
from pplug_jax.storage.workdir import (
    CONFIG,
    about_path,
    personas_path,
    predictions_path,
    results_path,
    seed_path,
)
from pplug_jax.storage.workdir import METRICS as CURVES

# What the page shows of a split; the rest would only make it slow. All examples are scored.
MAX_EXAMPLES = 500

# What the report reads of a config, `read_split` included.
FIELDS = (
    "seed",
    "data.path",
    "data.time_based",
    "data.on_error",
    "data.eval_split",
    "data.sample_eval_users",
    "data.max_history",
    "data.sort_by_date",
    "data.history_labels",
    "eval.top_k",
    "eval.bootstrap_samples",
)


@dataclasses.dataclass(frozen=True)
class Run:
    """A workdir's config and results."""

    workdir: Path
    config: Settings
    results: dict[str, Any]

    @property
    def task(self) -> Task:
        return task_of(self.config)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that were measured, the task's own first; none if the golds are withheld."""
        entries = self.results["methods"].values()
        known = dict.fromkeys((*self.task.metrics, *METRICS))
        return tuple(m for m in known if any(isinstance(e.get(m), dict) for e in entries))

    @property
    def others(self) -> list[str]:
        """The methods that some method was compared with."""
        entries = self.results["methods"].values()
        compared = {name for entry in entries for name in entry.get("versus", {})}
        return [name for name in self.results["methods"] if name in compared]

    @property
    def folders(self) -> dict[str, Path]:
        """The directories of each seed's predictions, personas and losses, by the seed's name."""
        seeds = self.results.get("seeds")
        if not seeds:
            return {"": self.workdir}
        return {str(seed): seed_path(self.workdir, seed) for seed in seeds}

    def known(self, fields: Mapping[str, str]) -> dict[str, str]:
        """Return the fields {field: name} that some method has."""
        entries = self.results["methods"].values()
        return {
            field: name
            for field, name in fields.items()
            if any(entry.get(field) is not None for entry in entries)
        }

    def history(self, example: Example) -> tuple[Item, ...]:
        """Return the items that a plug reads, oldest first."""
        return example.profile[-self.config.data.max_history :]


class Split(NamedTuple):
    """The evaluated examples.

    Attributes:
        ids: their ids.
        users: their users.
        golds: the right outputs.
        lengths: (n,) int, the history items that each user has for a method to read.
        older: (n,) int, the older items of their profiles, which a plug does not read.
        shown: the examples that the page shows, by their place in the split.
    """

    ids: list[str]
    users: list[str]
    golds: list[str | None]
    lengths: np.ndarray
    older: np.ndarray
    shown: dict[int, Example]


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(
            f"{path} is missing: the report is about a workdir that `python -m pplug_jax.main` has "
            "evaluated (--mode=train_and_evaluate or --mode=evaluate)"
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is no JSON ({error}): evaluate again") from error


def read_run(workdir: Path) -> Run:
    """Read a workdir's config and results.

    Raises:
        InputError: the workdir was not evaluated, or by an older version; the message says which
            file or field is missing.
    """
    config, results = map(_load, (workdir / CONFIG, results_path(workdir)))
    if config.get("task") not in TASKS or not results.get("methods"):
        raise InputError(f"{workdir} has no results of a known task: evaluate again")
    settings = flatten(config)
    if missing := [field for field in FIELDS if field not in settings]:
        raise InputError(
            f"{workdir / CONFIG} has no {', '.join(missing)}: the workdir was made by an "
            "older version; run the command again with a new --workdir"
        )
    return Run(workdir, Settings.of(config), results)


def spread(count: int, most: int) -> list[int]:
    """Return the places of at most `most` of `count` things, evenly over them."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()


def read_examples(run: Run) -> Split:
    """Go through the split once and keep some examples, spread evenly over it.

    Raises:
        InputError: the data are missing, or not those of the results.
    """
    skip = run.config.data.on_error == "skip"
    examples = read_split(run.config, "eval", (lambda bad: None) if skip else raise_bad)
    if len(examples) != run.results["n"]:
        raise InputError(
            f"the split {run.results['split']} has {len(examples)} examples, the results are of "
            f"{run.results['n']}: the data have changed, evaluate again"
        )
    kept = set(spread(len(examples), MAX_EXAMPLES))
    lengths, older = np.zeros((2, len(examples)), int)
    split = Split([], [], [], lengths, older, {})
    for i, example in enumerate(examples):
        split.ids.append(example.id)
        split.users.append(example.user)
        split.golds.append(example.target)
        lengths[i] = len(run.history(example))
        older[i] = len(example.profile) - lengths[i]
        if i in kept:
            split.shown[i] = example
    return split


def read_predictions(run: Run, folder: Path, split: Split) -> dict[str, list[str]]:
    """Return each method's answers in the split's order, without the methods that have no file.

    Raises:
        InputError: a file answers other examples.
    """
    answers = {}
    for name in run.results["methods"]:
        path = predictions_path(folder, run.results["split"], name)
        if path.is_file():
            given = submission.read(path, run.task)
            if missing := [id for id in split.ids if id not in given]:
                raise InputError(f"{path} has no answer to id {missing[0]!r}: evaluate again")
            answers[name] = [given[id] for id in split.ids]
    return answers


def read_abouts(run: Run, folder: Path) -> dict[str, dict[str, Any]]:
    """Return what stands beside each method's answers (`evaluate.predict.Answers`), if it does."""
    split = run.results["split"]
    paths = {
        name: about_path(predictions_path(folder, split, name)) for name in run.results["methods"]
    }
    return {name: _load(path) for name, path in paths.items() if path.is_file()}


def losses_of(abouts: Mapping[str, Mapping[str, Any]], split: Split) -> dict[str, np.ndarray]:
    """Return each method's losses, (n, 2): the sum and number of a gold's tokens.

    Methods of other examples have none.
    """
    losses = {name: np.array(about["losses"], float) for name, about in abouts.items()}
    return {name: rows for name, rows in losses.items() if rows.shape == (len(split.ids), 2)}


def shown_of(abouts: Mapping[str, Mapping[str, Any]], split: Split) -> dict[str, list[list[int]]]:
    """Return, for the methods that say it, the items of each profile that a prompt shows, by place.

    They are best first, and places are those of `Run.history`; what it lacks is left out.
    """
    shown = {name: about.get("shown", []) for name, about in abouts.items()}
    return {
        name: [
            [place - older for place in places if place >= older]
            for places, older in zip(of, split.older.tolist(), strict=True)
        ]
        for name, of in shown.items()
        if len(of) == len(split.ids) and any(of)
    }


def read_personas(run: Run, folder: Path, split: Split) -> dict[str, dict[str, np.ndarray]]:
    """Return the arrays of each method that left personas, as `predict.write_personas` writes them.

    Raises:
        InputError: a file is of other examples.
    """
    personas = {}
    for name in run.results["methods"]:
        path = personas_path(folder, run.results["split"], name)
        if path.is_file():
            with np.load(path) as arrays:
                personas[name] = dict(arrays)
            if not np.array_equal(personas[name]["lengths"], split.lengths):
                raise InputError(f"{path} is of other histories than the data's: evaluate again")
    return personas


def read_curves(run: Run) -> dict[str, dict[str, dict[int, float]]]:
    """Return {method: {seed: {step: loss}}}."""
    curves: dict[str, dict[str, dict[int, float]]] = defaultdict(dict)
    for seed, folder in run.folders.items():
        if (path := folder / CURVES).is_file():
            for method, losses in read_scalars(path, "loss").items():
                curves[method][seed] = losses
    return dict(curves)
