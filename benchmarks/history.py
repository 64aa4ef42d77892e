"""What a history is worth: a comparison's methods, given fewer items and more.

    python -m benchmarks.history --workdir=RUN --items=0,1,2,4,8,16,30 --methods=answers,pplug

answers the held-out examples of `--mode=compare`'s workdir once more, with the newest items of each
history alone and the weights as they were trained, and prints loss, the task's metric, style, and
how many tokens the LLM reads before an answer, soft tokens included. Scores are means over the
workdir's seeds. Style is measured against the whole history.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from benchmarks.timing import report
from pplug_jax.data.lamp import Example, by_date
from pplug_jax.data.sources import read_split
from pplug_jax.evaluate.predict import Answers, predict, prompt_tokens
from pplug_jax.evaluate.run import statistics_of
from pplug_jax.methods.shown import layout_of, shown
from pplug_jax.methods.table import Method, configured, methods_of
from pplug_jax.scoring.summary import mean_statistics, scores
from pplug_jax.session import Models
from pplug_jax.session.inputs import tokenize
from pplug_jax.session.weights import restore_weights
from pplug_jax.settings import Settings
from pplug_jax.storage.files import read_object
from pplug_jax.storage.workdir import CONFIG, seed_path

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", None, "The workdir of a comparison.", required=True)
flags.DEFINE_list("items", ["0", "1", "2", "4", "8", "16"], "How many items are left.")
flags.DEFINE_list("methods", None, "Methods; by default the workdir's.")

flags.register_validator(
    "items", lambda counts: all(count.isdecimal() for count in counts), "numbers from 0 on"
)

HEADER = ("method", "items", "prompt tokens", "loss", "metric (95% interval)", "style")


def opened() -> tuple[Models, list[Example]]:
    """The comparison in `--workdir`, and its held-out examples."""
    workdir = Path(FLAGS.workdir)
    config = Settings.of(read_object(workdir / CONFIG))
    if not seed_path(workdir, config.seeds[0]).is_dir():
        sys.exit(f"error: {workdir} is not the workdir of --mode=compare: it has no seed_*/")
    return Models(config, workdir), list(read_split(config, "eval"))


def newest(examples: Sequence[Example], count: int) -> list[Example]:
    """The examples with the `count` newest items of their histories."""
    profiles = (list(by_date(example.profile)) for example in examples)
    return [
        dataclasses.replace(
            example, user=example.owner, profile=tuple(profile[len(profile) - count :])
        )
        if count < len(profile)
        else example
        for example, profile in zip(examples, profiles, strict=True)
    ]


def measure(
    models: Models, name: str, examples: Sequence[Example], histories: Sequence[Sequence[Example]]
) -> list[tuple[dict[str, np.ndarray], float]]:
    """Each example's statistics, means over the seeds, and how many tokens precede an answer.

    Both for each of `histories`: the examples with other histories, which the method reads. Style
    is measured against the examples' own.
    """
    config = models.config
    method = methods_of(config)[name]
    seeds = config.seeds if method.plug else config.seeds[:1]
    by_seed = [_of_seed(models, method, seed, examples, histories) for seed in seeds]
    return [
        (mean_statistics([statistics for statistics, _ in of_seeds]), of_seeds[0][1])
        for of_seeds in zip(*by_seed, strict=True)
    ]


def _of_seed(
    models: Models,
    method: Method,
    seed: int,
    examples: Sequence[Example],
    histories: Sequence[Sequence[Example]],
) -> list[tuple[dict[str, np.ndarray], float]]:
    settings = configured(models.config, method, seed)
    weights, measured = None, []
    if method.plug:
        weights = restore_weights(models, method, settings, seed_path(models.workdir, seed))
    for given in histories:
        tokenized = tokenize(models, given, layout_of(method, settings))
        inputs = shown(
            models.task, models.tokenizer, models.store, method, settings, given, tokenized
        )
        texts, losses, milliseconds = predict(models, method, settings, weights, inputs)
        named = {example.id: text for example, text in zip(examples, texts, strict=True)}
        tokens = prompt_tokens(models, method, settings, inputs)
        answers = Answers(named, losses.tolist(), None, 0, 0, tokens, milliseconds)
        measured.append((statistics_of(models, examples, answers), tokens))
    return measured


def main(argv: Sequence[str]) -> None:
    del argv
    models, examples = opened()
    config = models.config
    users = [example.user for example in examples]
    counts = [int(count) for count in FLAGS.items]
    histories = [newest(examples, count) for count in counts]
    rows, records = [], []
    for name in FLAGS.methods or config.methods:
        measured = measure(models, name, examples, histories)
        for count, (statistics, tokens) in zip(counts, measured, strict=True):
            found: dict[str, Any] = scores(statistics, config.eval.bootstrap_samples, users)
            records.append({"method": name, "items": count, "tokens": tokens} | found)
            metric = "{value:.3f} [{low:.3f}, {high:.3f}]".format(**found[models.task.metrics[0]])
            loss, style = (
                f"{found[measure]['value']:.3f}" if measure in found else ""
                for measure in ("loss", "style")
            )
            rows.append((name, str(count), f"{tokens:.0f}", loss, metric, style))
            print(*rows[-1], sep="  ", flush=True)
    report("history", f"{config.llm.path}, {models.task.metrics[0]}", HEADER, rows, records)


if __name__ == "__main__":
    app.run(main)
