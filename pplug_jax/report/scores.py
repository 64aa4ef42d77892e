"""Compute scores that results.json lacks: by length of history, by number of retrieved items."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pplug_jax.methods.table import METHODS
from pplug_jax.report.runs import Run
from pplug_jax.scoring.summary import mean_statistics, scores

# {metric: (n, S)}, of `example_statistics`.
Statistics = dict[str, np.ndarray]
Score = dict[str, float]


class Bin(NamedTuple):
    """The examples whose history has `low` to `high` items, at the places `members`, (m,) int."""

    low: int
    high: int
    members: np.ndarray

    @property
    def name(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}\N{EN DASH}{self.high}"


def length_bins(lengths: np.ndarray) -> list[Bin]:
    """Return the quarters of the examples by length of history; fewer if many are equally long."""
    edges = np.unique(np.quantile(lengths, [0.25, 0.5, 0.75], method="inverted_cdf"))
    place = np.searchsorted(edges, lengths)
    bins = (np.flatnonzero(place == i) for i in range(len(edges) + 1))
    return [
        Bin(int(lengths[members].min()), int(lengths[members].max()), members)
        for members in bins
        if len(members)
    ]


def over_seeds(seeds: Sequence[Mapping[str, Statistics]]) -> dict[str, Statistics]:
    """Return {method: each example's statistics, averaged over the seeds that have the method}."""
    names = dict.fromkeys(name for methods in seeds for name in methods)
    return {
        name: mean_statistics([methods[name] for methods in seeds if name in methods])
        for name in names
    }


def scores_by_length(
    bins: Sequence[Bin], statistics: Mapping[str, Statistics], samples: int, users: Sequence[str]
) -> dict[str, dict[str, list[Score]]]:
    """Return {metric: {method: each bin's score}}."""
    by_length: dict[str, dict[str, list[Score]]] = defaultdict(lambda: defaultdict(list))
    for name, rows in statistics.items():
        for group in bins:
            members = {metric: of[group.members] for metric, of in rows.items()}
            theirs = [users[i] for i in group.members]
            for metric, score in scores(members, samples, theirs).items():
                by_length[metric][name].append(score)
    return by_length


def scores_by_top_k(runs: Sequence[Run]) -> dict[str, dict[str, dict[int, Score]]]:
    """Return {metric: {method: {top_k: score}}} of the runs like the first; {} for one run."""
    first = runs[0].results
    alike: dict[int, dict[str, Any]] = {}
    for run in runs:
        if all(run.results[field] == first[field] for field in ("task", "data", "split", "llm")):
            alike.setdefault(run.config.eval.top_k, run.results["methods"])
    known = [METHODS[name] for name in first["methods"] if name in METHODS]
    names = [method.name for method in known if method.retrieval and not method.top_k]
    if len(alike) < 2 or not names:
        return {}
    return {
        metric: {
            name: {
                top_k: alike[top_k][name][metric]
                for top_k in sorted(alike)
                if metric in alike[top_k].get(name, {})
            }
            for name in names
        }
        for metric in runs[0].metrics
    }
