"""History encoding against sentence-transformers: `python -m benchmarks.encoding [--count=1000]`

Both encode the same texts with the same weights, each in its usual way, a part of the texts in
turn. The vectors must agree. Texts that spell a special token, as [MASK], are left out: ours reads
it as plain text, the peer as what it names. Needs `pip install sentence-transformers`.
"""

import gzip
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from absl import app, flags

from benchmarks.timing import in_turn, report
from pplug_jax.data.tasks import TASKS
from pplug_jax.encoder import load_encoder

FLAGS = flags.FLAGS
flags.DEFINE_string("encoder", "../shared/models/all-MiniLM-L6-v2", "Its directory.")
flags.DEFINE_string(
    "texts",
    "../shared/data/corpus/scholarly_corpus.jsonl.gz",
    "A .jsonl or .jsonl.gz file of objects with title and abstract.",
)
flags.DEFINE_integer("count", 10_000, "Texts.")
flags.DEFINE_integer("max_length", 256, "Tokens that are read of a text; 256 is MiniLM's own.")
flags.DEFINE_integer("batch", 64, "Texts of a batch.")
COSINE = 0.999  # at least, between the two vectors of a text

Encode = Callable[[Sequence[str]], np.ndarray]


def read_texts(path: Path, without: Sequence[str]) -> list[str]:
    """`--count` texts as LaMP-5's history items are read, drawn by a seed, sorted by length."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt") as file:
        texts = [TASKS["LaMP_5"].item_text(json.loads(line)) for line in file]
    texts = [text for text in texts if not any(token in text for token in without)]
    return sorted(random.Random(0).sample(texts, min(FLAGS.count, len(texts))), key=len)


def load_peer() -> Encode:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise SystemExit(
            f"error: {error}; pip install sentence-transformers (with the torch of "
            "requirements-dev.txt), which only this benchmark needs"
        ) from error
    model = SentenceTransformer(FLAGS.encoder)
    model.max_seq_length = FLAGS.max_length
    return lambda texts: model.encode(
        texts, batch_size=FLAGS.batch, normalize_embeddings=True, show_progress_bar=False
    )


def main(_: list[str]) -> None:
    ours = load_encoder(FLAGS.encoder, max_length=FLAGS.max_length)
    encoders: dict[str, Encode] = {
        "sentence-transformers": load_peer(),
        "pplug_jax": lambda texts: ours.encode(texts, FLAGS.batch),
    }
    texts = read_texts(Path(FLAGS.texts), ours.tokenizer.all_special_tokens)
    rounds = FLAGS.repeats + 1  # with the untimed one
    parts = [texts[i::rounds] for i in range(rounds)]  # alike in their lengths
    vectors: dict[str, list[np.ndarray]] = {name: [] for name in encoders}

    def case(name: str) -> Callable[[], None]:
        coming = iter(parts)
        return lambda: vectors[name].append(encoders[name](next(coming)))

    seconds = in_turn({name: case(name) for name in encoders})
    pairs = zip(*map(np.concatenate, vectors.values()), strict=True)
    cosine = float(min(theirs @ ours for theirs, ours in pairs))
    speed = {name: len(parts[-1]) / took for name, took in seconds.items()}
    first = next(iter(speed.values()))
    rows = [
        [name, f"{each:.1f}", f"{1e3 / each:.1f}", f"{each / first:.2f}x"]
        for name, each in speed.items()
    ]
    report(
        "encoding",
        f"{len(texts)} texts of at most {FLAGS.max_length} tokens",
        ("encoder", "texts/s", "ms a text", "speed"),
        rows,
        [
            {"encoder": name, "texts": len(texts), "texts_per_second": each, "cosine": cosine}
            for name, each in speed.items()
        ],
    )
    print(f"smallest cosine between the two: {cosine:.6f}")
    assert cosine > COSINE, f"the vectors differ: cosine {cosine}"


if __name__ == "__main__":
    app.run(main)
