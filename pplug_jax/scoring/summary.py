"""Turn examples' statistics into scores, columns of tables, and differences in words."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from pplug_jax.data.tasks import TASKS
from pplug_jax.scoring.metrics import METRICS, interval, paired_difference, value_of


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
    patterns = [
        "{value:.3f} [{low:.3f}, {high:.3f}]" if metric in task_metrics else "{value:.3f}"
        for metric in metrics
    ]
    cells = [
        [pattern.format(**entry[metric]) for metric, pattern in zip(metrics, patterns, strict=True)]
        for entry in entries
    ]
    return header, cells


def verdicts(
    statistics: dict[str, dict[str, np.ndarray]],
    metric: str,
    samples: int,
    users: Sequence[str] = (),
    *,
    plug: str,
    controls: Collection[str],
) -> list[str]:
    """Say in words what the paired differences between a plug and every other method mean.

    They are judged by loss, the task's metric and style, where measured. The p-values of a method
    are corrected for looking so often (Holm 1979).

    Args:
        statistics: each example's statistics, by method and metric.
        metric: the task's.
        samples: how many swaps and bootstrap samples are drawn.
        users: the examples' users.
        plug: the method that is compared; without it there is nothing to say.
        controls: those that it must be better than, or it has not learnt the user.
    """
    if plug not in statistics:
        return []
    lines, equals = list[str](), list[str]()
    judged = [name for name in ("loss", metric, "style") if name in statistics[plug]]
    for name in statistics:
        if name == plug:
            continue
        comparisons = [
            paired_difference(
                measure,
                statistics[plug][measure],
                statistics[name][measure],
                samples,
                users=users,
            )
            for measure in judged
        ]
        by_verdict: dict[str, list[str]] = {
            "better": [],
            "worse": [],
            "not significantly different": [],
        }
        p_values = holm([comparison.p_value for comparison in comparisons])
        for measure, comparison, p_value in zip(judged, comparisons, p_values, strict=True):
            better = (comparison.difference > 0) != METRICS[measure].lower_is_better
            word = "better" if better else "worse"
            by_verdict[word if p_value < 0.05 else "not significantly different"].append(
                f"{measure} {comparison.difference:+.3f} "
                f"[{comparison.low:+.3f}, {comparison.high:+.3f}] p = {p_value:.4f}"
            )
        parts = (
            f"{word} in {', '.join(figures)}" for word, figures in by_verdict.items() if figures
        )
        lines.append(f"{plug} against {name}: {'; '.join(parts)}")
        if name in controls and not by_verdict["better"]:
            equals.append(name)
    if equals:
        lines.append(
            f"So nothing here shows that the plug of {plug} learnt the user rather than the task: "
            f"it is not better than {' and '.join(equals)}."
        )
    return lines


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number: the least times n, the next times n - 1, and so on."""
    corrected, least = [1.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values, kind="stable")):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = least
    return corrected
