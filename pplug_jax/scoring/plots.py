"""The pictures of a run: every method's score with its interval, and the loss curves."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pplug_jax.runtime.primary import is_primary
from pplug_jax.scoring.metrics import METRICS
from pplug_jax.storage.scalars import read_scalars

DASHES = ("-", "--", ":")  # of the first ten methods, of the second, of the third


def figure_for(methods: Collection[str]) -> Figure:
    """Make a figure that is high enough for a legend of the methods."""
    return Figure(figsize=(9, max(4.5, 0.3 * len(methods))), layout="constrained")


def error_bars(scores: Collection[Mapping[str, float]]) -> list[list[float]]:
    """Return how far intervals reach below and above; a macro-F1 may lie outside its own."""
    return [
        [max(0, score["value"] - score["low"]) for score in scores],
        [max(0, score["high"] - score["value"]) for score in scores],
    ]


def save(figure: Figure, path: Path) -> None:
    if not is_primary():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        figure.savefig(file, dpi=120, format="png")


def plot_results(results: dict[str, Any], metric: str, path: Path) -> None:
    """Plot each method's score and 95% bootstrap interval."""
    names = list(results["methods"])
    entries = [results["methods"][name][metric] for name in names]
    values = [entry["value"] for entry in entries]
    figure = Figure(figsize=(7, 0.5 * len(names) + 1.2), layout="constrained")
    axes = figure.subplots()
    axes.errorbar(values, range(len(names)), xerr=error_bars(entries), fmt="o", capsize=4)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    better = ", lower is better" if METRICS[metric].lower_is_better else ""
    axes.set_xlabel(f"{metric}{better}, 95% bootstrap interval, n = {results['n']}")
    axes.set_title(f"{results['task']}: {results['data']}, {results['split']}")
    axes.grid(axis="x", alpha=0.3)
    save(figure, path)


def plot_losses(metrics: Path, path: Path) -> None:
    """Plot the training loss of every trained method, from `metrics.jsonl`."""
    plot_curves(
        {method: [losses] for method, losses in read_scalars(metrics, "loss").items()}, path
    )


def plot_curves(curves: Mapping[str, Sequence[Mapping[int, float]]], path: Path) -> None:
    """Plot each method's losses {step: loss}, one for each seed, a method's in one colour."""
    figure = figure_for(curves)
    axes = figure.subplots()
    for i, (name, seeds) in enumerate(curves.items()):
        for k, losses in enumerate(seeds):
            look: dict[str, Any] = {"color": f"C{i % 10}", "ls": DASHES[i // 10 % 3]}
            look |= {"lw": 1.5 if len(seeds) == 1 else 0.8, "label": name if k == 0 else None}
            axes.plot(*zip(*losses.items(), strict=True), **look)
    axes.set_xlabel("step")
    axes.set_ylabel("loss per target token")
    figure.legend(loc="outside right upper")
    axes.grid(alpha=0.3)
    save(figure, path)
