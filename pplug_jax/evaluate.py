"""Every method on the held-out users: predictions, scores, intervals, and the table."""

import functools
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.table import Table

from pplug_jax.checkpoint import Checkpoints
from pplug_jax.data import submission
from pplug_jax.data.batches import Assemble, Batch, Buckets, Tokenized, place_batch, plan_batches
from pplug_jax.data.lamp import Example
from pplug_jax.data.retrieval import demonstration_prompt, retrievers
from pplug_jax.embedder import Reading, UserEmbedder
from pplug_jax.files import write_json, write_text
from pplug_jax.generate import generate
from pplug_jax.llm import LLM
from pplug_jax.methods import METHODS, Method, histories, inputs_embeds
from pplug_jax.metrics import METRICS, compare, example_statistics, interval, value_of
from pplug_jax.models import Models
from pplug_jax.plots import plot_results
from pplug_jax.progress import Progress, console, say
from pplug_jax.splits import data_name


@functools.partial(
    jax.jit,
    static_argnames=("reading", "prefix_length", "max_new_tokens", "num_beams", "length_penalty"),
)
def _answer(
    plug: UserEmbedder | None,
    llm: LLM,
    batch: Batch,
    *,
    reading: Reading,
    prefix_length: int,
    **decoding: Any,
) -> jax.Array:
    soft = None
    if plug is not None:
        soft = plug(
            batch.query, batch.query_mask, batch.history, batch.history_mask, reading=reading
        )
    embeds, mask = inputs_embeds(llm, soft, batch.prompt, batch.prompt_mask, prefix_length)
    return generate(llm, embeds, mask, **decoding)


def shown(
    models: Models, method: Method, examples: Iterable[Example], tokenized: Sequence[Tokenized]
) -> list[Tokenized]:
    """The examples with what the method shows of the user: demonstrations, a history, or none."""
    config, tokenizer = models.config, models.tokenizer
    if method.retrieval:
        retrieve = retrievers(models.store, config.data.history_labels)[method.retrieval]
        length = config.data.max_input_length
        prompts = (
            demonstration_prompt(
                models.task,
                example.input,
                retrieve(models.task, example.input, example.profile, config.eval.top_k),
                tokenizer.tokenizer,
                length,
            )
            for example in examples
        )
        tokenized = [
            each._replace(prompt=tokenizer.prompt(prompt, length))
            for each, prompt in zip(tokenized, prompts, strict=True)
        ]
    own = [each.rows if method.plug else each.rows[:0] for each in tokenized]
    rows = histories(method, own, config.seed)
    return [each._replace(rows=r) for each, r in zip(tokenized, rows, strict=True)]


def predict(
    models: Models, method: Method, plug: UserEmbedder | None, tokenized: Sequence[Tokenized]
) -> list[str]:
    """The method's answer to each example, in their order."""
    config, tokenizer = models.config, models.tokenizer
    buckets = Buckets(tokenized, config.data.buckets, models.encoder.model.config.max_length)
    assemble = Assemble(tokenized, buckets, models.store, config.eval.batch_size)
    answers = [""] * len(tokenized)
    with Progress(f"answering with {method.name}", len(tokenized), "examples") as progress:
        for bucket, indices in plan_batches(
            np.arange(len(tokenized)), buckets.of, config.eval.batch_size
        ):
            with jax.set_mesh(models.mesh):
                tokens = _answer(
                    plug,
                    models.llm,
                    place_batch(assemble((0, bucket, indices)), models.mesh),
                    reading=method.reading,
                    prefix_length=tokenizer.prefix_length,
                    max_new_tokens=config.eval.max_new_tokens,
                    num_beams=config.eval.num_beams,
                    length_penalty=config.eval.length_penalty,
                )
            for index, row in zip(indices, np.asarray(tokens), strict=False):
                answers[index] = tokenizer.decode(row)
            progress.advance(len(indices))
    return answers


def predictions_path(workdir: Path, split: str, method: str) -> Path:
    return workdir / "predictions" / f"{split}.{method}.json"


def evaluate(models: Models, examples: Sequence[Example]) -> dict[str, Any]:
    """Runs every method of the config and prints the table.

    Writes predictions/, results.json and results.md. A method whose predictions by the same plug
    are already there is not run again.
    """
    config, task, workdir = models.config, models.task, models.workdir
    split = config.data.eval_split
    golds = {example.id: example.target for example in examples}
    scored = task.metrics and None not in golds.values()
    tokenized = functools.cache(lambda: models.tokenize(examples))
    # Another split than the workdir's own leaves that one's results as they are.
    own = json.loads((workdir / "config.json").read_text())["data"]["eval_split"]
    stem = "results" if split == own else f"results.{split}"
    results_path = workdir / f"{stem}.json"
    results: dict[str, Any] = json.loads(results_path.read_text()) if results_path.is_file() else {}
    before = results.get("methods", {})
    results = {
        "task": task.name,
        "data": data_name(config),
        "llm": config.llm.path,
        "split": split,
        "n": len(examples),
        "methods": {},
    }
    checkpoints = {
        name: Checkpoints(workdir / "checkpoints" / name, config.train.keep)
        for name in {METHODS[name].plug for name in config.methods} - {None}
    }
    restored = functools.cache(lambda name: checkpoints[name].restore_plug(models.abstract_plug))
    answers: dict[str, dict[str, str]] = {}
    statistics: dict[str, dict[str, np.ndarray]] = {}
    for name in config.methods:
        method = METHODS[name]
        step = checkpoints[method.plug].latest if method.plug else None
        path = predictions_path(workdir, split, name)
        if path.is_file() and name in before and before[name]["step"] == step:
            answers[name] = submission.read(path, task)
        if list(answers.get(name, {})) == list(golds):
            entry = before[name]
        else:
            plug = restored(method.plug) if method.plug else None
            start = time.monotonic()
            predictions = predict(
                models, method, plug, shown(models, method, examples, tokenized())
            )
            answers[name] = dict(zip(golds, predictions, strict=True))
            entry = {"step": step, "seconds": time.monotonic() - start}
            submission.write(path, task, answers[name])
        if task.judged:
            submission.write_judged(path.with_suffix(".judge.jsonl"), task, examples, answers[name])
        if scored:
            statistics[name] = example_statistics(
                task.name, list(answers[name].values()), list(golds.values())
            )
            for metric, rows in statistics[name].items():
                low, high = interval(metric, rows, config.eval.bootstrap_samples)
                entry[metric] = {"value": value_of(metric, rows), "low": low, "high": high}
        results["methods"][name] = entry
        write_json(results_path, results)
    for manager in checkpoints.values():
        manager.close()

    if scored:
        said = verdicts(statistics, task.metrics[0], config.eval.bootstrap_samples)
        lines = [*markdown(results, task.metrics), "", *(f"- {line}" for line in said)]
        show_table(results, task.metrics)
        plot_results(results, task.metrics[0], workdir / "plots" / f"{stem}.png")
    else:
        why = (
            "The split's outputs are withheld"
            if task.metrics
            else "Only a judge can score these answers (*.judge.jsonl holds what one needs)"
        )
        lines = said = [f"{why}: predictions are written, nothing is scored."]
    title = f"# {task.name}, {results['data']}, split {split}"
    write_text(workdir / f"{stem}.md", "\n".join([title, "", *lines, ""]))
    for line in said:
        say(line)
    show_examples(models, examples, answers)
    return results


def _cells(results: dict[str, Any], metrics: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    header = ["method", *(f"{metric} (95% interval)" for metric in metrics), "n", "seconds"]
    rows = [
        [
            name,
            *("{value:.3f} [{low:.3f}, {high:.3f}]".format(**entry[m]) for m in metrics),
            str(results["n"]),
            f"{entry['seconds']:.0f}",
        ]
        for name, entry in results["methods"].items()
    ]
    return header, rows


def markdown(results: dict[str, Any], metrics: Sequence[str]) -> list[str]:
    """The results as a Markdown table."""
    header, rows = _cells(results, metrics)
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def show_table(results: dict[str, Any], metrics: Sequence[str]) -> None:
    header, rows = _cells(results, metrics)
    table = Table(
        title=f"{results['task']}: {results['data']}, split {results['split']}, {results['llm']}"
    )
    for i, cell in enumerate(header):
        table.add_column(cell, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def verdicts(statistics: dict[str, dict[str, np.ndarray]], metric: str, samples: int) -> list[str]:
    """What the paired differences between pplug and every other method say, in words."""
    if "pplug" not in statistics:
        return []
    said = []
    for name in statistics:
        if name == "pplug":
            continue
        found = compare(metric, statistics["pplug"][metric], statistics[name][metric], samples)
        better = (found.difference > 0) != METRICS[metric].lower_is_better
        word = "better than" if better else "worse than"
        if found.p_value >= 0.05:
            word = "not significantly different from"
        said.append(
            f"pplug is {word} {name}: {metric} {found.difference:+.3f} "
            f"[{found.low:+.3f}, {found.high:+.3f}], p = {found.p_value:.4f}"
        )
        if name == "shuffled_user" and word != "better than":
            said.append("So nothing here shows that the plug learnt the user rather than the task.")
    return said


def show_examples(
    models: Models,
    examples: Sequence[Example],
    answers: dict[str, dict[str, str]],
    count: int = 3,
) -> None:
    """A few users, spread evenly over the split: what the LLM says without and with the persona."""
    for i in sorted({len(examples) * (2 * n + 1) // (2 * count) for n in range(count)}):
        example = examples[i]
        say(f"\nuser {example.id}, {len(example.profile)} items of history, such as")
        for item in example.profile[:3]:
            say(f"  - {shorten(models.item_text(item))}")
        rows = {
            "input": models.task.query_text(example.input),
            "gold": example.target or "(withheld)",
        }
        rows |= {name: answers[name][example.id] for name in ("none", "pplug") if name in answers}
        for name, text in rows.items():
            say(f"  {name + ':':7}{shorten(text)}")


def shorten(text: str, width: int = 100) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3] + "..."
