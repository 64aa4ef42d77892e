"""Made-up examples as long as LaMP-5's.

The time-based training split has inputs of 162 words (standard deviation 66), outputs of 9.7 (3.2)
and 88 items (54) on average (Salemi et al. 2024, arXiv 2404.05970, table 1); a word is about 1.3
tokens, and the paper cuts inputs at 256.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from pplug_jax.encoder.bert import Bert
from pplug_jax.feed.batches import Tokenized, with_queries
from pplug_jax.feed.store import HistoryStore


def draw_examples(count: int, texts: int, vocabulary: int = 30_000) -> list[Tokenized]:
    """Random token ids below `vocabulary`, and rows of a store of so many `texts`."""
    rng = np.random.default_rng(0)

    def gamma(mean: float, spread: float, low: int, high: int) -> int:
        drawn = rng.gamma((mean / spread) ** 2, spread**2 / mean)
        return int(np.clip(round(drawn), low, high))

    def ids(length: int) -> np.ndarray:
        return rng.integers(3, vocabulary, length, dtype=np.int32)

    examples = []
    for _ in range(count):
        prompt, items = gamma(210, 85, 20, 256), gamma(88, 54, 20, 512)
        examples.append(
            Tokenized(
                ids(prompt + 2),
                ids(gamma(14, 5, 4, 128)),
                ids(max(8, prompt - 8)),
                rng.integers(0, texts, items),
                {},
            )
        )
    return examples


def with_vectors(
    examples: Sequence[Tokenized], queries: HistoryStore, encoder: Bert
) -> list[Tokenized]:
    """The examples with what `encoder` makes of their queries, in the store of queries."""
    width = encoder.config.max_length

    @jax.jit
    def encode(tokens: jax.Array, length: jax.Array) -> jax.Array:
        return encoder(tokens[None], (np.arange(width) < length)[None])[0]

    vectors = [encode(np.resize(x.query, width), len(x.query)) for x in examples]
    queries.encoder.encode = lambda texts, *_, **__: np.array([vectors[int(x)] for x in texts])
    return with_queries(examples, [str(i) for i in range(len(examples))], queries)


def fill_store(store: HistoryStore) -> None:
    """Random unit vectors, for the histories' encoding is no part of a step."""
    rng = np.random.default_rng(1)

    def draw(texts: list[str], *_: Any, **__: Any) -> np.ndarray:
        vectors = rng.normal(size=(len(texts), store.encoder.size))
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    store.encoder.encode = draw
    store.add([str(i) for i in range(4096)])
