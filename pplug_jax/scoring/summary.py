"""Turn examples' statistics into scores, columns of tables, and differences in words."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pplug_jax.data.tasks import TASKS
from pplug_jax.scoring.metrics import METRICS, compare, interval, value_of


def scores(
    statistics: dict[str, np.ndarray], samples: int, users: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Return {metric: {value, low, high}}."""
    intervals = {}
    for metric, rows in statistics.items():
        low, high = interval(metric, rows, samples, users=users)
        intervals[metric] = {"value": value_of(metric, rows), "low": low, "high": high}
    return intervals


def mean_statistics(seeds: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return {metric: each example's statistics, averaged over the seeds}."""
    return {metric: np.mean([seed[metric] for seed in seeds], axis=0) for metric in seeds[0]}


def title_of(results: dict[str, Any]) -> str:
    return f"{results['task']}: {results['data']}, split {results['split']}, {results['llm']}"


def metric_columns(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the metrics that all methods have, as a header and a list of cells for each method.

    The task's own metrics have their intervals.
    """
    entries = list(results["methods"].values())
    metrics = [metric for metric in METRICS if all(metric in entry for entry in entries)]
    task_metrics = TASKS[results["task"]].metrics
    header = [
        f"{metric} (95% interval)" if metric in task_metrics else metric for metric in metrics
    ]
    forms = [
        "{value:.3f} [{low:.3f}, {high:.3f}]" if metric in task_metrics else "{value:.3f}"
        for metric in metrics
    ]
    cells = [
        [form.format(**entry[metric]) for metric, form in zip(metrics, forms, strict=True)]
        for entry in entries
    ]
    return header, cells


def verdicts(
    statistics: dict[str, dict[str, np.ndarray]],
    metric: str,
    samples: int,
    users: Sequence[str] = (),
) -> list[str]:
    """Say in words what the paired differences between pplug and every other method mean."""
    if "pplug" not in statistics:
        return []
    said = []
    for name in statistics:
        if name == "pplug":
            continue
        both = statistics["pplug"][metric], statistics[name][metric]
        comparison = compare(metric, *both, samples, users=users)
        better = (comparison.difference > 0) != METRICS[metric].lower_is_better
        word = "better than" if better else "worse than"
        if comparison.p_value >= 0.05:
            word = "not significantly different from"
        said.append(
            f"pplug is {word} {name}: {metric} {comparison.difference:+.3f} "
            f"[{comparison.low:+.3f}, {comparison.high:+.3f}], p = {comparison.p_value:.4f}"
        )
        if name == "shuffled_user" and word != "better than":
            said.append("So nothing here shows that the plug learnt the user rather than the task.")
    return said
