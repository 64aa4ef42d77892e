"""Write the page: one file with its texts, figures and script, without network or server."""

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import stdev
from typing import Any

import jinja2

from pplug_jax.errors import InputError
from pplug_jax.report import explorer, figures
from pplug_jax.report.runs import (
    Run,
    losses_of,
    read_abouts,
    read_curves,
    read_examples,
    read_personas,
    read_predictions,
    read_run,
    shown_of,
    spread,
)
from pplug_jax.report.scores import length_bins, over_seeds, scores_by_length, scores_by_top_k
from pplug_jax.runtime.console import say
from pplug_jax.scoring.metrics import METRICS, example_statistics
from pplug_jax.storage.files import write_text
from pplug_jax.storage.workdir import REPORT

MAX_POINTS = 400  # of a loss curve

# What an entry of results.json holds besides its metrics, as columns of tables.
COSTS = {
    "trainable": "trainable parameters",
    "bytes_per_user": "bytes per user",
    "prompt_tokens": "prompt tokens",
    "train_seconds": "training, s",
    "milliseconds": "ms per example",
}
SETTINGS = {"learning_rate": "learning rate", "step": "answered at step"}
HERE = Path(__file__).parent


def report(workdirs: Sequence[Path]) -> Path:
    """Write the page and the files behind it into the first workdir's `report`.

    Args:
        workdirs: the run that the page is about, and others to compare it with.

    Returns:
        The page's path.

    Raises:
        InputError: a workdir was not evaluated, or by an older version.
    """
    runs = [read_run(workdir) for workdir in workdirs]
    run, folder = runs[0], runs[0].workdir / REPORT
    figures.write_results(folder, runs, COSTS)
    curves = read_curves(run)
    if curves:
        figures.write_losses(folder, curves)
    by_top_k = scores_by_top_k(runs)
    if by_top_k:
        methods = next(iter(by_top_k.values())).values()
        places = sorted({top_k for scores in methods for top_k in scores})
        figures.write_scores(folder / "top_k", "top_k", "retrieved items", places, by_top_k)
    problem = ""
    examples: dict[str, Any] = {"bins": [], "by_length": {}, "explorer": None}
    try:
        examples = _examples(run, folder)
    except InputError as error:
        # A workdir may be looked at where its data are not.
        problem = str(error)
        say(f"the report lacks history lengths, users and map: {problem}")
    losses = {name: [_thinned(seed) for seed in seeds.values()] for name, seeds in curves.items()}
    evaluated = [name for shown in runs for name in shown.results["methods"]]
    lower = [name for name, metric in METRICS.items() if metric.lower_is_better]
    data = {
        # Each has a colour; what was only trained, too.
        "methods": list(dict.fromkeys([*evaluated, *losses])),
        "metrics": run.metrics,
        "lower": lower,
        "runs": [{"metrics": shown.metrics, "methods": shown.results["methods"]} for shown in runs],
        "losses": losses,
        "bins": [group.name for group in examples["bins"]],
        "lengths": examples["by_length"],
        "top_k": by_top_k,
        "explorer": examples["explorer"],
    }
    page = _render(
        data=_finite(data),
        runs=runs,
        metrics=run.metrics,
        lower=lower,
        costs=COSTS,
        settings=SETTINGS,
        losses=losses,
        by_top_k=by_top_k,
        problem=problem,
        limits={
            "items": explorer.MAX_ITEMS,
            "item_text": explorer.MAX_ITEM_TEXT,
            "text": explorer.MAX_TEXT,
        },
        config=run.config.flat(),
        **examples,
    )
    write_text(folder / "index.html", [page])
    return folder / "index.html"


def _examples(run: Run, folder: Path) -> dict[str, Any]:
    """Write what is known of single examples as files; return for the page bins, scores, explorer.

    Raises:
        InputError: the data are missing, or not those of the results, predictions or personas.
    """
    split = read_examples(run)
    answers = [read_predictions(run, path, split) for path in run.folders.values()]
    abouts = [read_abouts(run, path) for path in run.folders.values()]
    personas = read_personas(run, next(iter(run.folders.values())), split)
    bins, by_length = [], {}
    statistics: list[dict[str, Any]] = [{}]
    golds = [gold for gold in split.golds if gold is not None]
    if any(answers) and run.metrics and len(golds) == len(split.golds):
        statistics = [
            {
                name: example_statistics(run.task.name, texts, golds)
                for name, texts in methods.items()
            }
            for methods in answers
        ]
        losses = [losses_of(of, split) for of in abouts]
        pairs = list(zip(statistics, losses, strict=True))
        if all(methods.keys() <= of.keys() for methods, of in pairs):
            for methods, of in pairs:
                for name, rows in methods.items():
                    rows["loss"] = of[name]
        bins = length_bins(split.lengths)
        by_length = scores_by_length(
            bins, over_seeds(statistics), run.config.eval.bootstrap_samples, split.users
        )
        names = [group.name for group in bins]
        named = {
            metric: {name: dict(zip(names, scores, strict=True)) for name, scores in of.items()}
            for metric, of in by_length.items()
        }
        figures.write_scores(folder / "history_length", "items", "items of history", names, named)
    users = explorer.explorer(
        run, split, answers[0], statistics[0], personas, shown_of(abouts[0], split)
    )
    figures.write_map(folder, users)
    return {"bins": bins, "by_length": by_length, "explorer": users}


def _render(**content: Any) -> str:
    """Return the page; `data` is for its script, everything else for the template."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    # `tojson` writes <, >, & and ' as \uXXXX, and all that is not ASCII.
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters |= {"stdev": stdev, "figure": _figure}
    script, style = ((HERE / name).read_text("utf-8") for name in ("page.js", "page.css"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page.html").render(
        script=script, style=style, digest=digest, **content
    )


def _figure(value: float, sign: str = "") -> str:
    """Format a score for people; one may be huge, for a rating of 200 digits, or not exist."""
    if math.isnan(value):
        return "\N{EN DASH}"
    return f"{value:{sign}.3f}" if abs(value) < 1e6 else f"{value:{sign}.3g}"


def _thinned(curve: Mapping[int, float]) -> list[tuple[int, float]]:
    points = list(curve.items())
    return [points[i] for i in spread(len(points), MAX_POINTS)]


def _finite(tree: Any) -> Any:
    """Replace infinity and NaN, which JSON lacks."""
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
