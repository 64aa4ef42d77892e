"""Examples as batches of fixed shapes.

Tokenised once, bucketed by length, assembled by Grain, each process its own rows.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from pplug_jax.data.lamp import Example
from pplug_jax.data.tasks import Task
from pplug_jax.feed.features import FEATURES, of_history, of_items
from pplug_jax.feed.peers import Peers
from pplug_jax.feed.store import HistoryStore
from pplug_jax.llm.prompts import Tokenizer
from pplug_jax.runtime.mesh import place_rows

ROUND = 16  # padded lengths are multiples of this
ROUND_TARGET = 8  # and those of targets that are read apart, which are short


class Batch(NamedTuple):
    """B rows; a row with `weight` 0 only fills up the batch.

    prompt, prompt_mask: (B, L) int32 and bool, the LLM's input without the soft tokens; or fewer
        rows, each for several of the others, which follow each other.
    target, target_mask: (B, T) int32 and bool, the gold output with its end-of-sequence token.
    text, text_mask: (B, S) int32 and bool, what the LLM reads to learn the target, `Buckets.text`.
    query, query_mask: (B, Q) int32 and bool, the input as the input encoder's tokens; or what a
        frozen one makes of it, (B, E) float32, and (B, 1) bool, which says nothing.
    history, history_mask: (B, H, E) float32 and (B, H) bool, the encoded history.
    index: (B,) int32, each row's place in the list of examples. weight: (B,) float32, 1 or 0.
    features: {name: (B, H, width) float32}, what else is told of the items, `feed.features`.
    """

    prompt: jax.Array | np.ndarray
    prompt_mask: jax.Array | np.ndarray
    target: jax.Array | np.ndarray
    target_mask: jax.Array | np.ndarray
    text: jax.Array | np.ndarray
    text_mask: jax.Array | np.ndarray
    query: jax.Array | np.ndarray
    query_mask: jax.Array | np.ndarray
    history: jax.Array | np.ndarray
    history_mask: jax.Array | np.ndarray
    index: jax.Array | np.ndarray
    weight: jax.Array | np.ndarray
    features: dict[str, jax.Array | np.ndarray]

    def with_prompts_of(self, users: int) -> "Batch":
        """The batch with one row of its prompt for so many rows, which all have the same."""
        names = ("prompt", "prompt_mask", "text", "text_mask")
        return self._replace(**{name: getattr(self, name)[::users] for name in names})

    @property
    def plug_inputs(self) -> tuple[Any, ...]:
        """The positional arguments of `UserEmbedder.__call__`."""
        return self.query, self.query_mask, self.history, self.history_mask, self.features


class Tokenized(NamedTuple):
    """One example's variable-length arrays.

    rows: (n,) int64, its history's rows in the store. told: {name: (n, width)}, the features that
    the history alone tells. query_row: the query's row in the store of queries, if it is there.
    """

    prompt: np.ndarray
    target: np.ndarray
    query: np.ndarray
    rows: np.ndarray
    told: dict[str, np.ndarray]
    query_row: int = -1

    def with_history_of(self, other: "Tokenized | None") -> "Tokenized":
        """This example for another's user, or for one without a history."""
        if other is not None:
            return self._replace(rows=other.rows, told=other.told)
        none = {name: values[:0] for name, values in self.told.items()}
        return self._replace(rows=self.rows[:0], told=none)


def history_rows(
    task: Task, example: Example, store: HistoryStore, max_history: int, history_labels: bool
) -> np.ndarray:
    """The rows of the newest `max_history` items in the store, (n,) int64."""
    items = example.profile[-max_history:]
    return store.rows([task.item_text(item, history_labels) for item in items])


def tokenize(
    task: Task,
    examples: Iterable[Example],
    tokenizer: Tokenizer,
    store: HistoryStore,
    *,
    max_input_length: int,
    max_target_length: int,
    max_history: int,
    history_labels: bool = True,
    behind: bool = False,
    queries: HistoryStore | None = None,
) -> list[Tokenized]:
    """Tokenises `examples`, which are gone through once.

    Of a history longer than `max_history` the last items are kept, LaMP's newest. With
    `history_labels` an item is read with its label. behind: the prompts are for soft tokens behind
    them, `Tokenizer.prompt`. queries: a store that the queries' vectors are added to.
    """
    texts = []

    def query_of(example: Example) -> str:
        texts.append(task.query_text(example.input))
        return texts[-1]

    tokenized = [
        Tokenized(
            tokenizer.prompt(example.input, max_input_length, behind),
            tokenizer.target(example.target or "", max_target_length),
            np.array(store.encoder.queries([query_of(example)])[0], np.int32),
            history_rows(task, example, store, max_history, history_labels),
            {
                name: values[-max_history:]
                for name, values in of_items(task, example.profile).items()
            },
        )
        for example in examples
    ]
    return tokenized if queries is None else with_queries(tokenized, texts, queries)


def with_queries(
    tokenized: Iterable[Tokenized], texts: Sequence[str], queries: HistoryStore
) -> list[Tokenized]:
    """The examples with these texts' vectors as their queries, which all processes add together."""
    queries.add(texts)
    rows = queries.rows(texts).tolist()
    return [x._replace(query_row=row) for x, row in zip(tokenized, rows, strict=True)]


def round_up(length: int, multiple: int = ROUND) -> int:
    return max(multiple, -(-length // multiple) * multiple)


MOST_SIZES = 48  # of texts, and of targets, that edges are chosen among where both differ


def bucket_edges(lengths: np.ndarray, count: int, target_cost: float = 0) -> np.ndarray:
    """The `count` padded shapes, or fewer, that cost `lengths` (n, 2) the least; ascending, (k, 2).

    The lengths are of texts and targets, which cost 1 and `target_cost` a place. Each shape holds
    all that the ones before it hold.
    """
    multiples = ROUND, ROUND_TARGET if target_cost else ROUND
    rounded = np.vectorize(round_up, otypes=[int])(lengths, multiples)
    texts, targets = (np.unique(column) for column in rounded.T)
    if len(targets) > 1:
        texts, targets = (
            sizes[np.unique(np.linspace(0, len(sizes) - 1, MOST_SIZES).round().astype(int))]
            for sizes in (texts, targets)
        )
    numbers = np.zeros((len(texts), len(targets)), int)
    np.add.at(
        numbers, (np.searchsorted(texts, rounded[:, 0]), np.searchsorted(targets, rounded[:, 1])), 1
    )
    shapes = np.stack(np.meshgrid(texts, targets, indexing="ij"), axis=-1).reshape(-1, 2)
    cost = shapes @ np.array([1.0, target_cost])
    held = numbers.cumsum(axis=0).cumsum(axis=1).ravel()
    # [i, j]: the shape j holds what the shape i before it does, and more.
    follows = np.all(shapes[:, None] <= shapes, axis=-1) & ~np.eye(len(shapes), dtype=bool)
    # best[j]: the least cost of what the shape j holds, where it is the last of so many.
    best, before = held * cost, []
    for _ in range(min(count, len(shapes)) - 1):
        totals = np.where(follows, best[:, None] + (held - held[:, None]) * cost, np.inf)
        choice = totals.argmin(axis=0)
        least = totals.min(axis=0)
        if least[-1] >= best[-1]:
            break
        before.append(choice)
        best = least
    edges = [len(shapes) - 1]
    for choice in reversed(before):
        edges.append(choice[edges[-1]])
    return shapes[edges[::-1]]


class Shape(NamedTuple):
    """A bucket's padded lengths: `Batch.text`'s, `prompt`'s, `query`'s and `target`'s."""

    text: int
    prompt: int
    query: int
    target: int


class Buckets:
    """A handful of padded shapes for examples, those that cost the least.

    longest_query: what the input encoder can take. target_cost: of a place of the target over one
    of the text; 0: the LLM reads both as one text, as a decoder-only one does if no soft tokens
    stand between them.

    Every example fits its bucket and all larger ones.
    """

    def __init__(
        self, examples: Sequence[Tokenized], count: int, longest_query: int, target_cost: float
    ):
        self.joined = target_cost == 0
        texts = np.array([len(self.text(e)) for e in examples])
        targets = np.array([len(e.target) for e in examples])
        if self.joined:  # they have one padded length
            targets[:] = targets.max()
        edges = bucket_edges(np.stack([texts, targets], axis=1), count, target_cost)
        fits = (texts[:, None] <= edges[:, 0]) & (targets[:, None] <= edges[:, 1])
        self.of = fits.argmax(axis=1)
        lengths = np.array([(len(e.prompt), len(e.query)) for e in examples])
        longest = [
            lengths[self.of <= bucket].max(axis=0, initial=0) for bucket in range(len(edges))
        ]
        self.shapes = [
            Shape(int(text), round_up(prompt), min(round_up(query), longest_query), int(target))
            for (text, target), (prompt, query) in zip(edges, longest, strict=True)
        ]
        self.history = round_up(max(len(e.rows) for e in examples))

    def text(self, example: Tokenized) -> np.ndarray:
        """The prompt, and if they are joined the target right behind it.

        Of the target all but its last token, which nothing is predicted from. So a row is padded
        once, and not at the prompt's end and the target's.
        """
        if not self.joined:
            return example.prompt
        return np.concatenate([example.prompt, example.target[:-1]])


def plan_batches(
    order: np.ndarray, bucket_of: np.ndarray, batch_size: int
) -> list[tuple[int, np.ndarray]]:
    """(bucket, indices) of every batch of an epoch in `order`: ceil(n / batch_size) of them.

    What is left over of a bucket moves to the next larger, so that only the last batch may be
    short.
    """
    batches: list[tuple[int, np.ndarray]] = []
    rest = order[:0]
    for bucket in range(bucket_of.max() + 1):
        rest = np.concatenate([rest, order[bucket_of[order] == bucket]])
        full = len(rest) // batch_size * batch_size
        batches += [(bucket, indices) for indices in rest[:full].reshape(-1, batch_size)]
        rest = rest[full:]
    return batches + ([(int(bucket_of.max()), rest)] if len(rest) else [])


class Plan(grain.sources.RandomAccessDataSource):
    """Batch `step` of training as (step, bucket, indices).

    Each epoch has its own order, known without the ones before.
    """

    def __init__(self, bucket_of: np.ndarray, batch_size: int, epochs: float, seed: int):
        self.bucket_of, self.batch_size, self.seed = bucket_of, batch_size, seed
        self.per_epoch = -(-len(bucket_of) // batch_size)
        self.steps = max(1, round(self.per_epoch * epochs))
        self.epoch = functools.lru_cache(maxsize=2)(self._epoch)

    def _epoch(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        rng = np.random.default_rng((self.seed, epoch))
        batches = plan_batches(
            rng.permutation(len(self.bucket_of)), self.bucket_of, self.batch_size
        )
        return [batches[i] for i in rng.permutation(len(batches))]

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[int, int, np.ndarray]:
        return step, *self.epoch(step // self.per_epoch)[step % self.per_epoch]


def drop_history(count: int, rng: np.random.Generator, rate: float) -> np.ndarray:
    """The places of the items that are kept of `count`, in their order.

    History dropout as the official code's data has it: with probability 10/11, a history of more
    than 2 items loses 1 + floor(count * u) of them, u uniform in [0, rate).
    """
    if rate == 0 or count <= 2 or rng.random() < 1 / 11:
        return np.arange(count)
    dropped = min(count - 1, 1 + int(count * rng.uniform(0, rate)))
    return np.sort(rng.permutation(count)[dropped:])


class Assemble:
    """(step, bucket, indices) -> this process' rows of the batch.

    rows: which they are, `mesh.local_rows`. features: what the batch tells of the items. peers:
    those of the run, where a feature compares with them. queries: the store of the queries'
    vectors, where the batch has these.
    """

    def __init__(
        self,
        examples: Sequence[Tokenized],
        buckets: Buckets,
        store: HistoryStore,
        rows: Sequence[int],
        *,
        seed: int = 0,
        history_dropout: float = 0.0,
        persona_dropout: float = 0.0,
        features: Sequence[str] = (),
        peers: Peers | None = None,
        queries: HistoryStore | None = None,
    ):
        self.examples, self.buckets, self.store, self.rows = examples, buckets, store, rows
        self.seed, self.history_dropout, self.persona_dropout = (
            seed,
            history_dropout,
            persona_dropout,
        )
        self.features, self.peers, self.queries = features, peers, queries

    def __call__(self, planned: tuple[int, int, np.ndarray]) -> Batch:
        step, bucket, indices = planned
        shape = self.buckets.shapes[bucket]._asdict()
        H, E = self.buckets.history, self.store.encoder.size
        B = len(self.rows)
        if self.queries:
            del shape["query"]
        batch = {name: np.zeros((B, width), np.int32) for name, width in shape.items()}
        batch |= {f"{name}_mask": np.zeros((B, width), bool) for name, width in shape.items()}
        for name in shape.keys() - {"target"}:
            batch[f"{name}_mask"][:, 0] = True  # rows that fill up have a token to attend to
        if self.queries:
            batch["query"] = np.zeros((B, E), np.float32)
            batch["query_mask"] = np.ones((B, 1), bool)
        batch["history"] = np.zeros((B, H, E), np.float32)
        batch["history_mask"] = np.zeros((B, H), bool)
        features = {
            name: np.zeros((B, H, FEATURES[name].width(E)), np.float32) for name in self.features
        }
        batch["index"] = np.zeros(B, np.int32)
        batch["weight"] = np.zeros(B, np.float32)
        for i, row in enumerate(self.rows):
            if row >= len(indices):
                break
            index = indices[row]
            example = self.examples[index]
            for name in shape:
                ids = self.buckets.text(example) if name == "text" else getattr(example, name)
                batch[name][i, : len(ids)] = ids
                batch[f"{name}_mask"][i, : len(ids)] = True
            if self.queries:
                batch["query"][i] = self.queries.vectors(example.query_row)
            rng = np.random.default_rng((self.seed, 1, step, int(row)))
            kept = drop_history(len(example.rows), rng, self.history_dropout)
            if self.persona_dropout and rng.random() < self.persona_dropout:
                kept = kept[:0]
            batch["history"][i, : len(kept)] = self.store.vectors(example.rows[kept])
            batch["history_mask"][i, : len(kept)] = True
            # Made of the whole history: a dropped item is older all the same, and never a peer.
            for name, values in self._features(example).items():
                features[name][i, : len(kept)] = values[kept]
            batch["index"][i] = index
            batch["weight"][i] = 1
        return Batch(**batch, features=features)

    def _features(self, example: Tokenized) -> dict[str, np.ndarray]:
        if not self.features:
            return {}
        vectors = self.store.vectors(example.rows)
        means = lambda: self.peers.means(example.rows)
        return of_history(self.features, example.told, vectors, means)


def place_batch(batch: Batch, mesh: Mesh) -> Batch:
    """This process' rows as the global batch's shards."""
    return jax.tree.map(lambda local: place_rows(local, mesh), batch)


def training_batches(plan: Plan, assemble: Assemble, step: int = 0) -> grain.DatasetIterator:
    """This process' rows of the plan's batches, from `step` on.

    The plan knows every step's batch, so the step is all that a checkpoint needs of the data, and
    another number of processes can go on from it.
    """
    dataset = grain.MapDataset.source(plan).map(assemble)[step:]
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
