"""Evaluate every method on the held-out users: predictions, scores, intervals, and the table."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pplug_jax.data.lamp import Example
from pplug_jax.data.sources import data_name
from pplug_jax.evaluate.predict import Answers, answer_examples
from pplug_jax.methods.table import CONTROLS, configured, methods_of
from pplug_jax.plugs.forward import Weights
from pplug_jax.runtime.console import say
from pplug_jax.scoring.metrics import example_statistics
from pplug_jax.scoring.plots import plot_results
from pplug_jax.scoring.style import distances
from pplug_jax.scoring.summary import metric_columns, scores, title_of, verdicts
from pplug_jax.scoring.tables import markdown, show_table
from pplug_jax.session import Models
from pplug_jax.session.inputs import tokenize
from pplug_jax.session.weights import restore_weights
from pplug_jax.settings import Settings
from pplug_jax.storage.files import read_object, write_json, write_text
from pplug_jax.storage.workdir import CONFIG, plot_path, results_path, table_path


def statistics_of(
    models: Models, examples: Sequence[Example], answers: Answers
) -> dict[str, np.ndarray]:
    """Compute each example's statistics: the task's metrics, `loss`, and `style` if users have one.

    They are empty if the outputs are withheld or only a judge can score.
    """
    task = models.task
    golds = [example.target for example in examples if example.target is not None]
    if not task.metrics or len(golds) < len(examples):
        return {}
    texts = list(answers.texts.values())
    statistics = example_statistics(task.name, texts, golds)
    statistics["loss"] = np.array(answers.losses)
    if "rouge1" in task.metrics and task.answer and any(example.profile for example in examples):
        statistics["style"] = distances(task, examples, texts)
    return statistics


def results_of_split(workdir: Path, split: str) -> Path:
    """Return where a split's results lie; another than the workdir's own leaves that one's be."""
    own = read_object(workdir / CONFIG)["data"]["eval_split"]
    return results_path(workdir, "" if split == own else split)


def evaluate(models: Models, examples: Sequence[Example]) -> dict[str, Any]:
    """Run every method of the config and print the table.

    Writes predictions/, personas/, results.json and results.md.
    """
    config, task, workdir = models.config, models.task, models.workdir
    methods = methods_of(config)
    tokenized = functools.cache(lambda layout: tokenize(models, examples, layout))
    path = results_of_split(workdir, config.data.eval_split)
    results = empty_results(config, examples)

    @functools.cache
    def restored(name: str) -> Weights:  # several methods may use the same
        method = methods[name]
        return restore_weights(models, method, configured(config, method, config.seed), workdir)

    users = [example.user for example in examples]
    texts: dict[str, dict[str, str]] = {}
    statistics: dict[str, dict[str, np.ndarray]] = {}
    for name in config.methods:
        method = methods[name]
        settings = configured(config, method, config.seed)
        answers = answer_examples(
            models,
            method,
            settings,
            examples,
            tokenized,
            workdir,
            functools.partial(restored, method.plug),
        )
        texts[name] = answers.texts
        statistics[name] = statistics_of(models, examples, answers)
        facts = answers._asdict()
        del facts["texts"], facts["losses"]
        results["methods"][name] = {"about": method.about} | facts
        results["methods"][name] |= scores(statistics[name], config.eval.bootstrap_samples, users)
        write_json(path, results)

    if any(statistics.values()):
        judged = statistics, task.metrics[0], config.eval.bootstrap_samples, users
        remarks = [
            line
            for plug, controls in CONTROLS.items()
            for line in verdicts(*judged, plug=plug, controls=controls)
        ]
        header, rows = _cells(results)
        lines = [markdown(header, rows), "", *(f"- {line}" for line in remarks)]
        show_table(title_of(results), header, rows)
        plot_results(results, task.metrics[0], plot_path(workdir, path.stem))
    else:
        why = (
            "The split's outputs are withheld"
            if task.metrics
            else "Only a judge can score these answers (*.judge.jsonl holds what one needs)"
        )
        lines = remarks = [f"{why}: predictions are written, nothing is scored."]
    title = f"# {title_of(results)}"
    write_text(table_path(path), "\n".join([title, "", *lines, ""]))
    for line in remarks:
        say(line)
    show_examples(models, examples, texts)
    return results


def empty_results(config: Settings, examples: Sequence[Example]) -> dict[str, Any]:
    """Return the head of the results, before any method has run."""
    return {
        "task": config.task,
        "data": data_name(config),
        "llm": config.llm.path,
        "split": config.data.eval_split,
        "n": len(examples),
        "methods": {},
    }


def _cells(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    header, columns = metric_columns(results)
    rows = [
        [name, *cells, str(results["n"]), f"{entry['milliseconds']:.0f}"]
        for (name, entry), cells in zip(results["methods"].items(), columns, strict=True)
    ]
    return ["method", *header, "n", "ms/example"], rows


def show_examples(
    models: Models, examples: Sequence[Example], answers: dict[str, dict[str, str]]
) -> None:
    """Print three users, spread evenly over the split: answers without and with the persona."""
    for i in sorted({len(examples) * n // 6 for n in (1, 3, 5)}):
        example = examples[i]
        say(f"\nuser {example.id}, {len(example.profile)} items of history, such as")
        for item in example.profile[:3]:
            say(f"  - {shorten(models.item_text(item))}")
        rows = {
            "input": models.task.query_text(example.input),
            "gold": example.target or "(withheld)",
        }
        compared = [name for name in ("none", *CONTROLS) if name in answers]
        rows |= {name: answers[name][example.id] for name in compared}
        width = max(map(len, rows)) + 2
        for name, text in rows.items():
            say(f"  {name + ':':{width}}{shorten(text)}")


def shorten(text: str) -> str:
    """Return the text on one line of at most 100 characters."""
    text = " ".join(text.split())
    return text if len(text) <= 100 else text[:97] + "..."
