"""The input pipeline alone, and how long training waits for it: `python -m benchmarks.pipeline`

Examples are made up (`benchmarks.lamp_like`), their histories rows of a store of made-up vectors as
wide as BGE base's. The waiting is that of the default run, on the embedded sample with the bundled
models.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags

from benchmarks.lamp_like import draw_examples, draw_histories
from benchmarks.timing import in_turn, report
from configs import lamp5
from pplug_jax.data.sources import read_split
from pplug_jax.feed.batches import (
    Assemble,
    Buckets,
    Plan,
    Tokenized,
    place_batch,
    training_batches,
)
from pplug_jax.feed.store import HistoryStore
from pplug_jax.methods.table import METHODS, configured
from pplug_jax.run import Histories
from pplug_jax.scoring.tables import show_table
from pplug_jax.session import Models
from pplug_jax.session.inputs import assembler, tokenize
from pplug_jax.session.weights import new_weights
from pplug_jax.settings import Settings
from pplug_jax.train.inputs import TrainingInputs
from pplug_jax.train.step import init_optimizer, jit_step, make_optimizer

FLAGS = flags.FLAGS
flags.DEFINE_integer("examples", 5000, "LaMP-like examples.")
flags.DEFINE_integer("batch", 64, "Examples of a batch; 64 is the paper's.")
flags.DEFINE_integer("batches", 20, "Batches of a timed call.")
flags.DEFINE_integer("steps", 60, "Training steps whose waiting is measured.")
flags.DEFINE_integer("users", 500, "Users of the embedded sample to tokenise and to train on.")
TARGET = 0.10  # of all tokens may be padding


class MadeUp:
    """An encoder that reads nothing."""

    size, fingerprint = 768, "made-up"

    def encode(
        self,
        texts: Sequence[str],
        batch_size: int,
        on_batch: Callable[[int], None],
        *,
        queries: bool,
    ) -> np.ndarray:
        on_batch(len(texts))
        made = np.random.default_rng(len(texts)).standard_normal((len(texts), self.size))
        return made / np.linalg.norm(made, axis=-1, keepdims=True)


def padding(examples: Sequence[Tokenized], count: int) -> tuple[float, float, float, int]:
    """Shares of padding in an epoch's texts, prompts and queries, and the number of shapes."""
    buckets = Buckets(examples, count, 512, target_cost=0)
    shapes = np.array(buckets.shapes)[:, :3]  # the targets are no part of them
    plan = Plan(buckets.of, FLAGS.batch, 1.0, 0)
    real, padded = np.zeros(3), np.zeros(3)
    for step in range(len(plan)):
        _, bucket, indices = plan[step]
        chosen = [examples[i] for i in indices]
        for e in chosen:
            real += [len(buckets.text(e)), len(e.prompt), len(e.query)]
        padded += shapes[bucket] * FLAGS.batch
    return *(1 - real / padded), len(shapes)


def waiting(models: Models, examples: Sequence[Tokenized]) -> tuple[float, float]:
    """Seconds that a training loop waits for its data, and seconds of all; compiled before.

    The loop waits for every step to end, so that no waiting hides behind the device's work.
    """
    method = METHODS["pplug"]
    config = configured(models.config, method, 0)
    assemble = assembler(
        models,
        method,
        config,
        examples,
        config.train.batch_size,
        history_dropout=config.plug.history_dropout,
    )
    plan = Plan(assemble.buckets.of, config.train.batch_size, 1000.0, 0)
    weights = new_weights(models, method, config)
    optimizer = make_optimizer(len(plan), 1e-4, 1e-4, 0.05, 1.0)
    state = weights, init_optimizer(optimizer, weights, models.mesh)
    update = jit_step(*state)
    data = training_batches(plan, assemble)
    warm, waited, start = len(assemble.buckets.shapes) + 1, 0.0, 0.0
    for step in range(FLAGS.steps + warm):
        before = time.perf_counter()
        if step == warm:
            waited, start = 0.0, before
        batch = next(data)
        waited += time.perf_counter() - before
        with jax.set_mesh(models.mesh):
            *state, metrics = update(
                *state,
                models.llm,
                place_batch(batch, models.mesh),
                optimizer=optimizer,
                place=models.tokenizer.place(behind=False),
            )
        jax.block_until_ready(metrics)
    return waited, time.perf_counter() - start


def main(_: list[str]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        store = HistoryStore(Path(scratch) / "made-up", MadeUp())
        store.add(draw_histories(FLAGS.examples))
        examples = draw_examples(FLAGS.examples)
        shares = {count: padding(examples, count) for count in range(1, 7)}
        show_table(
            f"Padding, LaMP-like (target: {TARGET:.0%})",
            ("data.buckets", "shapes", "texts", "prompts", "queries"),
            [
                [f"{count}", f"{shapes}", *(f"{share:.1%}" for share in each)]
                for count, (*each, shapes) in shares.items()
            ],
        )
        changes = {"data.sample_train_users": FLAGS.users, "data.sample_eval_users": 1}
        config = Settings.of(lamp5.get_config()).changed(changes)
        models = Models(config, Path(scratch) / "run")
        sample = read_split(config, "train")
        models.store.add(Histories([sample], models.history_texts))
        buckets = Buckets(examples, config.data.buckets, 512, target_cost=0)
        assemble = Assemble(examples, buckets, store, range(FLAGS.batch), history_dropout=0.5)
        data = training_batches(Plan(buckets.of, FLAGS.batch, 1000.0, 0), assemble)
        seconds = in_turn(
            {
                "batches": lambda: [next(data) for _ in range(FLAGS.batches)],
                "tokenize": lambda: tokenize(models, sample),
            }
        )
        inputs = TrainingInputs(models, sample)
        waited, took = waiting(
            models, inputs(METHODS["pplug"], configured(config, METHODS["pplug"], 0))
        )
    record: dict[str, Any] = {
        "batch": FLAGS.batch,
        "history_items": buckets.history,
        "examples_per_second": FLAGS.batch * FLAGS.batches / seconds["batches"],
        "tokenized_per_second": len(sample) / seconds["tokenize"],
        "step_seconds": took / FLAGS.steps,
        "waiting_share": waited / took,
        "padding": {count: texts for count, (texts, *_) in shares.items()},
        "prompt_padding": {count: prompts for count, (_, prompts, *_) in shares.items()},
        "query_padding": {count: queries for count, (_, _, queries, _) in shares.items()},
    }
    report(
        "pipeline",
        "Input pipeline",
        ("", "figure"),
        [
            [
                f"LaMP-like examples/s, batches of {FLAGS.batch} with {buckets.history} items",
                f"{record['examples_per_second']:,.0f}",
            ],
            ["the sample's examples tokenised/s", f"{record['tokenized_per_second']:,.0f}"],
            ["ms a step of the default run", f"{1e3 * record['step_seconds']:.1f}"],
            ["of which it waits for its batch", f"{record['waiting_share']:.1%}"],
        ],
        [record],
    )


if __name__ == "__main__":
    app.run(main)
