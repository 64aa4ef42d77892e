"""Write the page's charts as files: a PNG to look at, a CSV to go on from."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pplug_jax.report.runs import Run
from pplug_jax.report.scores import Score
from pplug_jax.scoring.plots import DASHES, error_bars, figure_for, plot_curves, plot_results, save
from pplug_jax.storage.files import write_text


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, [text.getvalue()])


def write_results(folder: Path, runs: Sequence[Run], costs: Mapping[str, str]) -> None:
    """Write all runs to results.csv, and a picture of each to results.png, results2.png, ..."""
    others = list(dict.fromkeys(other for run in runs for other in run.others))
    known = [field for field in costs if any(field in run.known(costs) for run in runs)]
    ends = ("difference", "low", "high", "p_value")
    header = ["workdir", "method", "metric", "value", "low", "high", "seeds"]
    header += [f"{end}_against_{other}" for other in others for end in ends]
    rows = []
    for i, run in enumerate(runs):
        if run.metrics:
            name = f"results{i + 1 if i else ''}.png"
            plot_results(run.results, run.metrics[0], folder / name)
        for name, entry in run.results["methods"].items():
            for metric in run.metrics:
                score = entry.get(metric, {})
                versus = [
                    entry.get("versus", {}).get(other, {}).get(metric, {}) for other in others
                ]
                rows.append(
                    [
                        run.workdir,
                        name,
                        metric,
                        *(score.get(end) for end in ("value", "low", "high")),
                        " ".join(map(str, score.get("seeds", []))),
                        *(difference.get(end) for difference in versus for end in ends),
                        *(entry.get(cost) for cost in known),
                    ]
                )
    _write_csv(folder / "results.csv", header + known, rows)


def write_losses(folder: Path, curves: Mapping[str, Mapping[str, Mapping[int, float]]]) -> None:
    """Write the loss curves, {method: {seed: {step: loss}}}."""
    rows = (
        (name, seed, *point)
        for name, seeds in curves.items()
        for seed, losses in seeds.items()
        for point in losses.items()
    )
    _write_csv(folder / "losses.csv", ["method", "seed", "step", "loss"], rows)
    plot_curves(
        {name: list(seeds.values()) for name, seeds in curves.items()}, folder / "losses.png"
    )


def write_scores(
    stem: Path,
    column: str,
    label: str,
    places: Sequence[Any],
    scores: Mapping[str, Mapping[str, Mapping[Any, Score]]],
) -> None:
    """Write the scores {metric: {method: {place: score}}} as CSV, and plot the first metric's."""
    rows = (
        (metric, name, place, score["value"], score["low"], score["high"])
        for metric, names in scores.items()
        for name, of_places in names.items()
        for place, score in of_places.items()
    )
    header = ["metric", "method", column, "value", "low", "high"]
    _write_csv(stem.with_suffix(".csv"), header, rows)
    metric = next(iter(scores))
    _plot_lines((label, metric), places, scores[metric], stem.with_suffix(".png"))


def _plot_lines(
    labels: tuple[str, str],
    ticks: Sequence[Any],
    lines: Mapping[str, Mapping[Any, Score]],
    path: Path,
) -> None:
    """Plot each method's scores with their intervals over the places `ticks` on the x axis."""
    figure = figure_for(lines)
    axes = figure.subplots()
    for i, (name, scores) in enumerate(lines.items()):
        shift = min(0.06, 0.8 / len(lines)) * (i - (len(lines) - 1) / 2)
        axes.errorbar(
            [ticks.index(x) + shift for x in scores],
            [score["value"] for score in scores.values()],
            error_bars(scores.values()),
            marker="o",
            ls=DASHES[i // 10 % 3],
            capsize=3,
            label=name,
        )
    axes.set_xticks(range(len(ticks)), ticks)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    figure.legend(loc="outside right upper")
    axes.grid(axis="y", alpha=0.3)
    save(figure, path)


def write_map(folder: Path, users: Mapping[str, Any]) -> None:
    """Write every map of `explorer` to map.csv, the first as a picture."""
    rows = []
    for name, plane in users["maps"].items():
        gains = plane.get("gain") or [None] * len(plane["points"])
        for example, point, gain in zip(users["examples"], plane["points"], gains, strict=True):
            rows.append([name, example["id"], example["user"], *point, example["length"], gain])
    if rows:
        header = ["method", "id", "user", "x", "y", "items", "gain"]
        _write_csv(folder / "map.csv", header, rows)
        name = next(iter(users["maps"]))
        _plot_map(f"personas of {name}", users["maps"][name], folder / "map.png")


def _plot_map(title: str, plane: Mapping[str, Any], path: Path) -> None:
    """Plot the personas' plane, coloured by gain if there is one."""
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    gain = plane.get("gain")
    colours: dict[str, Any] = {}
    if gain is not None:
        largest = max(map(abs, gain))
        colours = {"c": gain, "cmap": "coolwarm_r", "vmin": -largest, "vmax": largest}
    across, up = zip(*plane["points"], strict=True)
    dots = axes.scatter(across, up, s=12, **colours)
    if gain is not None:
        figure.colorbar(dots, label="gain over none")
    axes.set_title(title)
    save(figure, path)
