"""Compare methods over several seeds, on users that no training has seen, in one table."""

import functools
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from pplug_jax.data.lamp import Example, Subset
from pplug_jax.data.tasks import TASKS
from pplug_jax.errors import ConfigError
from pplug_jax.evaluate.predict import Answers, answer_examples
from pplug_jax.evaluate.run import empty_results, results_of_split, statistics_of
from pplug_jax.feed.batches import Tokenized
from pplug_jax.methods.shown import Layout
from pplug_jax.methods.table import CONTROLS, Method, asked_for, configured, methods_of
from pplug_jax.methods.users import unseen
from pplug_jax.runtime.console import say
from pplug_jax.scoring.metrics import paired_difference, value_of
from pplug_jax.scoring.plots import plot_losses, plot_results
from pplug_jax.scoring.summary import mean_statistics, metric_columns, scores, title_of
from pplug_jax.scoring.tables import markdown, show_table
from pplug_jax.session import Models
from pplug_jax.session.inputs import histories, tokenize
from pplug_jax.session.weights import restore_weights
from pplug_jax.settings import Settings
from pplug_jax.storage.files import write_json, write_text
from pplug_jax.storage.workdir import (
    METRICS,
    plot_path,
    predictions_path,
    seed_path,
    table_path,
)
from pplug_jax.train.inputs import TrainingInputs
from pplug_jax.train.loop import Trainer
from pplug_jax.train.meter import training_seconds
from pplug_jax.train.tune import tune

# What differences are from: the LLM alone, and for each plug its controls and itself.
REFERENCES = (
    "none",
    *(name for plug, controls in CONTROLS.items() for name in (*controls, plug)),
)


class SeedRun(NamedTuple):
    """A method's result with one seed.

    Attributes:
        answers: the answers and their costs.
        train_seconds: the training time of the weights that it uses, if any.
        learning_rate: their learning rate, if any.
    """

    answers: Answers
    train_seconds: float | None
    learning_rate: float | None


def compare_methods(models: Models, train: Sequence[Example], held_out: Sequence[Example]) -> None:
    """Train and evaluate what is not done yet, and write results.json and results.md.

    Each seed has a directory like a run's. A method without weights is run once.
    """
    config, workdir = models.config, models.workdir
    tokenized = functools.cache(lambda layout: tokenize(models, held_out, layout))
    training = None
    methods = asked_for(config)
    if any(method.trained for method in methods):
        keys = ([x.texts for x in histories(models, split)] for split in (train, held_out))
        kept = unseen(*keys)
        if not kept:
            raise ConfigError(
                "config.data: all users of the training split are held out too; a comparison wants "
                "users never seen, as LaMP's user-based files have them (data.time_based=False)"
            )
        if len(kept) < len(train):
            say(f"{len(train) - len(kept)} training examples are left out: their users are tested")
        training = TrainingInputs(models, Subset(train, kept))
        training.save_peers()
    rates = tune(models, training) if training and config.tune.learning_rates else {}
    runs: dict[str, list[SeedRun]] = {method.name: [] for method in methods}
    for seed in config.seeds:
        directory = seed_path(workdir, seed)
        # Those that use what another one trains come last.
        for method in sorted(methods, key=lambda method: not method.trained and bool(method.plug)):
            if method.plug or seed == config.seeds[0]:
                settings = configured(config, method, seed)
                if method.plug in rates:
                    settings = settings.changed({"train.learning_rate": rates[method.plug]})
                runs[method.name].append(
                    run_method(models, method, settings, training, held_out, tokenized, directory)
                )
    results = summary(models, held_out, runs)
    results["facts"] = facts(models)
    write_json(results_of_split(workdir, config.data.eval_split), results)
    write_tables(results, workdir)


def run_method(
    models: Models,
    method: Method,
    settings: Settings,
    training: TrainingInputs | None,
    held_out: Sequence[Example],
    tokenized: Callable[[Layout], Sequence[Tokenized]],
    directory: Path,
) -> SeedRun:
    """Train the method, if it trains weights, and answer, unless that was done before."""
    path = predictions_path(directory, settings.data.eval_split, method.name)
    if training and method.trained and not path.is_file():
        examples, validation = training(method, settings), training.validation(method, settings)
        Trainer(models, method, settings, examples, directory, validation).fit()
        plot_losses(directory / METRICS, plot_path(directory, "loss"))
    weights = functools.partial(restore_weights, models, method, settings, directory)
    answers = answer_examples(models, method, settings, held_out, tokenized, directory, weights)
    if not method.plug:
        return SeedRun(answers, None, None)
    seconds = training_seconds(directory, method.plug)
    return SeedRun(answers, seconds, settings.train.learning_rate)


def summary(
    models: Models, held_out: Sequence[Example], runs: dict[str, list[SeedRun]]
) -> dict[str, Any]:
    """Make results.json's table; statistics of each example are averaged over the seeds."""
    config = models.config
    samples = config.eval.bootstrap_samples
    users = [example.user for example in held_out]
    results = empty_results(config, held_out) | {"seeds": list(config.seeds)}
    pooled: dict[str, dict[str, np.ndarray]] = {}
    for name, of_seeds in runs.items():
        by_seed = [statistics_of(models, held_out, run.answers) for run in of_seeds]
        pooled[name] = mean_statistics(by_seed)
        entry = {"about": methods_of(config)[name].about} | {
            field: statistics.mean(getattr(run.answers, field) for run in of_seeds)
            for field in ("trainable", "bytes_per_user", "prompt_tokens", "milliseconds")
        }
        if seconds := [run.train_seconds for run in of_seeds if run.train_seconds is not None]:
            entry["train_seconds"] = statistics.mean(seconds)
            entry["learning_rate"] = of_seeds[0].learning_rate
        entry |= scores(pooled[name], samples, users)
        for metric in pooled[name]:
            entry[metric]["seeds"] = [value_of(metric, statistic[metric]) for statistic in by_seed]
        results["methods"][name] = entry
    for name, entry in results["methods"].items():
        entry["versus"] = {
            other: {
                metric: paired_difference(
                    metric, pooled[name][metric], rows, samples, users=users
                )._asdict()
                for metric, rows in pooled[other].items()
            }
            for other in REFERENCES
            if other in pooled and other != name
        }
    return results


def commit() -> str:
    """Return the code's commit; empty without git, or outside a checkout."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip()
    except OSError:
        return ""


def facts(models: Models) -> dict[str, str]:
    """Return what a reader needs to place the figures."""
    return {
        "commit": commit() or "unknown",
        "jax": jax.__version__,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "mesh": " x ".join(f"{axis}={size}" for axis, size in models.mesh.shape.items()),
        "finished": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def difference_rows(results: dict[str, Any], metric: str) -> tuple[list[str], list[list[str]]]:
    """Return the differences from the references: header and cells; p < 0.05 is starred."""
    entries = results["methods"]
    references = [other for other in REFERENCES if other in entries]
    cells = []
    for name, entry in entries.items():
        cells.append([name])
        for other in references:
            comparison = entry["versus"].get(other, {}).get(metric)
            star = "*" if comparison and comparison["p_value"] < 0.05 else " "
            cells[-1].append(f"{comparison['difference']:+.3f}{star}" if comparison else "")
    return ["method", *references], cells


def cost_rows(results: dict[str, Any], metric: str) -> tuple[list[str], list[list[str]]]:
    """Return the methods' costs, and the metric's deviation over seeds: header and cells."""
    cells = []
    for name, entry in results["methods"].items():
        seeds = entry.get(metric, {}).get("seeds", ())
        seconds = entry.get("train_seconds")
        cells.append(
            [
                name,
                f"{statistics.stdev(seeds):.3f}" if len(seeds) > 1 else "",
                f"{entry['trainable']:,}",
                f"{entry['bytes_per_user']:,.0f}",
                f"{entry['prompt_tokens']:.0f}",
                "" if seconds is None else f"{seconds:.0f}",
                f"{entry['milliseconds']:.0f}",
            ]
        )
    costs = ["trained", "bytes/user", "prompt tokens", "train s", "ms/example"]
    return ["method", "seeds' sd", *costs], cells


def write_tables(results: dict[str, Any], workdir: Path) -> None:
    """Print the tables and write results.md."""
    title = title_of(results)
    header, columns = metric_columns(results)
    cells = [[name, *row] for name, row in zip(results["methods"], columns, strict=True)]
    tables = {title: (["method", *header], cells)}
    first = next(iter(TASKS[results["task"]].metrics), "")
    for metric in (first, "loss"):
        if all(metric in entry for entry in results["methods"].values()):
            tables[f"{metric}: difference from"] = difference_rows(results, metric)
    tables["costs"] = cost_rows(results, first)
    for caption, table in tables.items():
        show_table(caption, *table)
    note = (
        f"{results['n']} examples, seeds {', '.join(map(str, results['seeds']))}; intervals are "
        "the paired bootstrap's over users; * is p < 0.05 by the paired permutation test."
    )
    parts = [f"## {caption}\n\n{markdown(*table)}" for caption, table in tables.items()]
    path = results_of_split(workdir, results["split"])
    write_text(table_path(path), "\n\n".join([*parts, note, ""]).removeprefix("#"))
    say(note)
    if all(first in entry for entry in results["methods"].values()):
        plot_results(results, first, plot_path(workdir, path.stem))
