"""Made-up examples as long as LaMP-5's.

The time-based training split has inputs of 162 words (standard deviation 66), outputs of 9.7 (3.2)
and 88 items (54) on average (Salemi et al. 2024, arXiv 2404.05970, table 1); a word is about 1.3
tokens, and the paper cuts inputs at 256.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from pplug_jax.encoder.bert import Bert
from pplug_jax.feed.batches import Tokenized, with_queries
from pplug_jax.feed.store import History, HistoryStore

EXAMPLES = 512  # of which buckets are made
TEXTS = 4096  # different ones


def gamma(rng: np.random.Generator, mean: float, spread: float, low: int, high: int) -> int:
    drawn = rng.gamma((mean / spread) ** 2, spread**2 / mean)
    return int(np.clip(round(drawn), low, high))


def draw_histories(count: int) -> Iterator[tuple[str, list[str]]]:
    """Users and their texts, as a store takes them."""
    rng = np.random.default_rng(1)
    for user in range(count):
        items = gamma(rng, 88, 54, 20, 512)
        yield f"user {user}", [f"text {i}" for i in rng.permutation(TEXTS)[:items]]


def draw_examples(count: int, vocabulary: int = 30_000) -> list[Tokenized]:
    """Random token ids below `vocabulary`, and the histories of as many users."""
    rng = np.random.default_rng(0)

    def ids(length: int) -> np.ndarray:
        return rng.integers(3, vocabulary, length, dtype=np.int32)

    examples = []
    for history in draw_histories(count):
        prompt = gamma(rng, 210, 85, 20, 256)
        examples.append(
            Tokenized(
                ids(prompt + 2),
                ids(gamma(rng, 14, 5, 4, 128)),
                ids(max(8, prompt - 8)),
                History.of(*history),
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


def fill_store(store: HistoryStore, users: int) -> None:
    """Random unit vectors, for the histories' encoding is no part of a step."""
    rng = np.random.default_rng(1)

    def draw(texts: list[str], *_: Any, **__: Any) -> np.ndarray:
        vectors = rng.normal(size=(len(texts), store.encoder.size))
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    store.encoder.encode = draw
    store.add(draw_histories(users))
