"""Every method on the held-out users: predictions, scores, intervals, and the table."""

import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.table import Table

from pplug_jax.checkpoint import Checkpoints
from pplug_jax.config import write_json
from pplug_jax.data.batches import Assemble, Batch, Buckets, place_batch, plan_batches
from pplug_jax.data.lamp import Example
from pplug_jax.data.retrieval import RETRIEVERS, demonstration_prompt
from pplug_jax.embedder import UserEmbedder
from pplug_jax.generate import generate
from pplug_jax.llm import LLM
from pplug_jax.methods import METHODS, Method, histories, inputs_embeds
from pplug_jax.metrics import example_scores, interval
from pplug_jax.models import Models
from pplug_jax.plots import plot_results
from pplug_jax.progress import Progress, console, say


@functools.partial(
    jax.jit,
    static_argnames=("uniform", "prefix_length", "max_new_tokens", "num_beams", "length_penalty"),
)
def _answer(
    plug: UserEmbedder | None,
    llm: LLM,
    batch: Batch,
    *,
    uniform: bool,
    prefix_length: int,
    **decoding: Any,
) -> jax.Array:
    soft = None
    if plug is not None:
        soft = plug(
            batch.query, batch.query_mask, batch.history, batch.history_mask, uniform=uniform
        )
    embeds, mask = inputs_embeds(llm, soft, batch.prompt, batch.prompt_mask, prefix_length)
    return generate(llm, embeds, mask, **decoding)


def predict(
    models: Models, method: Method, plug: UserEmbedder | None, examples: Sequence[Example]
) -> list[str]:
    """The method's answer to each example, in their order."""
    config, task, tokenizer = models.config, models.task, models.tokenizer
    prompts = None
    if method.retrieval:
        retrieve = RETRIEVERS[method.retrieval]
        prompts = [
            demonstration_prompt(
                task,
                e.input,
                retrieve(task, e.input, e.profile, config.eval.top_k),
                tokenizer.tokenizer,
                config.data.max_input_length,
            )
            for e in examples
        ]
    tokenized = models.tokenize(
        examples,
        histories(method, examples, config.seed) if plug else [()] * len(examples),
        prompts,
    )
    buckets = Buckets(tokenized, config.data.buckets, models.encoder.model.config.max_length)
    assemble = Assemble(tokenized, buckets, models.store, config.eval.batch_size)
    answers = [""] * len(examples)
    with Progress(f"answering with {method.name}", len(examples), "examples") as progress:
        for bucket, indices in plan_batches(
            np.arange(len(examples)), buckets.of, config.eval.batch_size
        ):
            with jax.set_mesh(models.mesh):
                tokens = _answer(
                    plug,
                    models.llm,
                    place_batch(assemble((0, bucket, indices)), models.mesh),
                    uniform=method.uniform,
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
    scored = all(example.target is not None for example in examples)
    golds = [example.target or "" for example in examples]
    results_path = workdir / "results.json"
    results: dict[str, Any] = json.loads(results_path.read_text()) if results_path.is_file() else {}
    before = results.get("methods", {})
    results = {
        "task": task.name,
        "data": config.data.path or "the embedded sample",
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
    answers: dict[str, list[str]] = {}
    scores: dict[str, dict[str, np.ndarray]] = {}
    for name in config.methods:
        method = METHODS[name]
        step = checkpoints[method.plug].latest if method.plug else None
        path = predictions_path(workdir, split, name)
        if path.is_file() and name in before and before[name]["step"] == step:
            answers[name] = [gold["output"] for gold in json.loads(path.read_text())["golds"]]
            entry = before[name]
        else:
            plug = restored(method.plug) if method.plug else None
            start = time.monotonic()
            answers[name] = predict(models, method, plug, examples)
            entry = {"step": step, "seconds": time.monotonic() - start}
            outputs = [
                {"id": e.id, "output": a} for e, a in zip(examples, answers[name], strict=True)
            ]
            write_json(path, {"task": task.name, "golds": outputs})
        if scored:
            scores[name] = example_scores(task.name, answers[name], golds)
            for metric, values in scores[name].items():
                low, high = interval(values, config.eval.bootstrap_samples)
                entry[metric] = {"value": float(values.mean()), "low": low, "high": high}
        results["methods"][name] = entry
        write_json(results_path, results)
    for manager in checkpoints.values():
        manager.close()

    if scored:
        said = verdicts(scores, task.metrics[0], config.eval.bootstrap_samples)
        lines = [*markdown(results, task.metrics), "", *(f"- {line}" for line in said)]
        show_table(results, task.metrics)
        plot_results(results, task.metrics[0], workdir / "plots" / "results.png")
    else:
        lines = said = [
            "The split's outputs are withheld: predictions are written, nothing is scored."
        ]
    (workdir / "results.md").write_text(
        "\n".join([f"# {task.name}, {results['data']}, split {split}", "", *lines, ""])
    )
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
    shown = Table(
        title=f"{results['task']}: {results['data']}, split {results['split']}, {results['llm']}"
    )
    for i, cell in enumerate(header):
        shown.add_column(cell, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        shown.add_row(*row)
    console.print(shown)


def verdicts(scores: dict[str, dict[str, np.ndarray]], metric: str, samples: int) -> list[str]:
    """What the paired differences between pplug and every other method say, in words."""
    if "pplug" not in scores:
        return []
    said = []
    for name in scores:
        if name == "pplug":
            continue
        difference = scores["pplug"][metric] - scores[name][metric]
        low, high = interval(difference, samples)
        if low > 0:
            word = "better than"
        elif high < 0:
            word = "worse than"
        else:
            word = "not significantly different from"
        said.append(
            f"pplug is {word} {name}: {metric} {difference.mean():+.3f} [{low:+.3f}, {high:+.3f}]"
        )
        if name == "shuffled_user" and low <= 0:
            said.append("So nothing here shows that the plug learnt the user rather than the task.")
    return said


def show_examples(
    models: Models,
    examples: Sequence[Example],
    answers: dict[str, list[str]],
    count: int = 3,
) -> None:
    """A few users, spread evenly over the split: what the LLM says without and with the persona."""
    for i in np.linspace(0, len(examples) - 1, min(count, len(examples)) + 2).astype(int)[1:-1]:
        example = examples[i]
        say(f"\nuser {example.id}, {len(example.profile)} items of history, such as")
        for item in example.profile[:3]:
            say(f"  - {shorten(models.task.item_text(item))}")
        rows = {
            "input": models.task.query(example.input),
            "gold": example.target or "(withheld)",
        }
        rows |= {name: answers[name][i] for name in ("none", "pplug") if name in answers}
        for name, text in rows.items():
            say(f"  {name + ':':7}{shorten(text)}")


def shorten(text: str, width: int = 100) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3] + "..."
