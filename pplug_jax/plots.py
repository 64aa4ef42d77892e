"""The pictures of a run: every method's score with its interval, and the loss curves."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pplug_jax.metrics import METRICS


def plot_results(results: dict[str, Any], metric: str, path: Path) -> None:
    """Each method's score and 95% bootstrap interval."""
    names = list(results["methods"])
    entries = [results["methods"][name][metric] for name in names]
    values = [entry["value"] for entry in entries]
    errors = [
        [value - entry["low"] for value, entry in zip(values, entries, strict=True)],
        [entry["high"] - value for value, entry in zip(values, entries, strict=True)],
    ]
    figure = Figure(figsize=(7, 0.5 * len(names) + 1.2), layout="constrained")
    axes = figure.subplots()
    axes.errorbar(values, range(len(names)), xerr=errors, fmt="o", capsize=4)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    better = ", lower is better" if METRICS[metric].lower_is_better else ""
    axes.set_xlabel(f"{metric}{better}, 95% bootstrap interval, n = {results['n']}")
    axes.set_title(f"{results['task']}: {results['data']}, {results['split']}")
    axes.grid(axis="x", alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def plot_losses(metrics: Path, path: Path) -> None:
    """The training loss of every trained method, from `metrics.jsonl`."""
    curves: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for line in metrics.read_text().splitlines():
        record = json.loads(line)
        method, _, name = record["name"].rpartition("/")
        if name == "loss":
            curves[method].append((record["step"], record["value"]))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for method, points in curves.items():
        axes.plot(*zip(*points, strict=True), label=method)
    axes.set_xlabel("step")
    axes.set_ylabel("loss per target token")
    axes.legend()
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
