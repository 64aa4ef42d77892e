"""Memory and time to read, deduplicate and tokenise many long histories.

    python -m benchmarks.data --users=2000 --items=500 --words=200

Writes a LaMP-4 file of made-up words and does with it what a run does before it trains, with the
bundled models; only the encoder's forward pass is left out, which would take most of the time and
none of the memory. Every tenth history item is one that stood there before.
"""

import json
import random
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from absl import app, flags

from configs import lamp4
from pplug_jax.data.sources import read_split
from pplug_jax.run import Histories
from pplug_jax.session import Models
from pplug_jax.session.inputs import tokenize
from pplug_jax.settings import Settings

FLAGS = flags.FLAGS
flags.DEFINE_integer("users", 2000, "Users, a question each.")
flags.DEFINE_integer("items", 500, "History items of a user.")
flags.DEFINE_integer("words", 200, "Words of an item.")


def write(directory: Path) -> Path:
    rng = random.Random(0)
    words = ["".join(rng.choices("aeioumnrst", k=rng.randint(2, 9))) for _ in range(50_000)]
    earlier: list[dict[str, str]] = []

    def items() -> Iterator[dict[str, str]]:
        for _ in range(FLAGS.items):
            if earlier and rng.random() < 0.1:
                yield rng.choice(earlier)
                continue
            item = {"title": "", "text": " ".join(rng.choices(words, k=FLAGS.words))}
            if len(earlier) < 1000:
                earlier.append(item)
            yield item

    path = directory / "train_questions.json"
    with path.open("w") as file:
        for i in range(FLAGS.users):
            text = " ".join(rng.choices(words, k=30))
            question = {"id": str(i), "input": f"article: {text}", "profile": list(items())}
            file.write(("," if i else "[") + json.dumps(question))
        file.write("]")
    golds = [{"id": str(i), "output": "A headline"} for i in range(FLAGS.users)]
    outputs = {"task": "LaMP_4", "golds": golds}
    (directory / "train_outputs.json").write_text(json.dumps(outputs))
    return path


def main(_: list[str]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        path = write(Path(scratch))
        config = Settings.of(lamp4.get_config()).changed({"data.path": scratch})
        models = Models(config, Path(scratch) / "run")
        encoder = models.encoder

        def tokenize_only(
            texts: Sequence[str], batch_size: int, on_batch: object, *, queries: bool
        ) -> np.ndarray:
            encoder.tokenize(texts)
            on_batch(len(texts))
            return np.zeros((len(texts), encoder.size), np.float32)

        encoder.encode = tokenize_only
        print(f"{path.stat().st_size / 2**30:.2f} GiB of {FLAGS.users} x {FLAGS.items} items")
        start = time.perf_counter()

        def report(stage: str) -> None:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(
                f"{stage:40}{time.perf_counter() - start:8.0f} s, peak {peak:.2f} GiB", flush=True
            )

        report("models loaded")
        examples = read_split(config, "train")
        report(f"{len(examples)} examples read")
        new = models.store.add(Histories([examples], models.history_texts))
        report(f"{new} unique texts tokenised and stored")
        tokenized = tokenize(models, examples)
        report(f"{len(tokenized)} examples tokenised")


if __name__ == "__main__":
    app.run(main)
