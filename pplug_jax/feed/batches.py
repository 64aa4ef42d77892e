"""Turn examples into batches of fixed shapes.

Examples are tokenised once, bucketed by length and assembled by Grain. Each process assembles the
rows of its devices.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from pplug_jax.data.lamp import Example
from pplug_jax.data.tasks import Task
from pplug_jax.encoder import Encoder
from pplug_jax.feed.features import FEATURES, of_history, of_items
from pplug_jax.feed.peers import Peers
from pplug_jax.feed.store import History, HistoryStore
from pplug_jax.llm.decoder import KeysValues
from pplug_jax.llm.prompts import Tokenizer
from pplug_jax.runtime.mesh import place_rows

ROUND = 16  # padded lengths are multiples of this
ROUND_TARGET = 8  # and those of targets that are read apart, which are short


class PlugInputs(NamedTuple):
    """What a plug reads of B users, each at one input.

    Attributes:
        query: (B, Q) int32, the input as Enc_inp's tokens; or (B, E) float32, the vector that was
            made of it before: always so for a plug that trains no Enc_inp, by the history's
            encoder. One row may serve several consecutive rows of the history, equally many each.
        query_mask: (B, Q) bool; anything beside vectors.
        history: (B, H, E), the encoded history; a row without items gets the null persona.
        history_mask: (B, H) bool.
        features: {name: (B, H, width) float32}, the items' features (`feed.features`).
    """

    query: Any
    query_mask: Any
    history: Any
    history_mask: Any
    features: Mapping[str, Any]


class Batch(NamedTuple):
    """B padded rows, NumPy's until `place_batch`; a row with `weight` 0 only fills up the batch.

    Attributes:
        prompt: (B, L) int32, the LLM's input without the soft tokens; or fewer rows, each for
            several consecutive rows of the other arrays.
        prompt_mask: the prompt's mask, bool.
        target: (B, T) int32, the gold output with its end-of-sequence token.
        target_mask: (B, T) bool.
        text: (B, S) int32, what the LLM reads to learn the target (`Buckets.text`); as few rows as
            `prompt`.
        text_mask: the text's mask, bool.
        query: (B, Q) int32, the input as the input encoder's tokens; or (B, E) float32, the vector
            that a frozen input encoder makes of it.
        query_mask: (B, Q) bool; or (B, 1) bool, which says nothing, beside a vector.
        history: (B, H, E) float32, the encoded history.
        history_mask: (B, H) bool.
        index: (B,) int32, each row's place in the list of examples.
        weight: (B,) float32, 1 or 0.
        features: {name: (B, H, width) float32}, the items' features (`feed.features`).
        was_read: what the LLM has made of `text`, if it was read before; in front of soft tokens.
    """

    prompt: jax.Array
    prompt_mask: jax.Array
    target: jax.Array
    target_mask: jax.Array
    text: jax.Array
    text_mask: jax.Array
    query: jax.Array
    query_mask: jax.Array
    history: jax.Array
    history_mask: jax.Array
    index: jax.Array  # type: ignore[assignment]  # hides a tuple's method
    weight: jax.Array
    features: dict[str, jax.Array]
    was_read: KeysValues | None = None

    def with_prompts_of(self, users: int) -> "Batch":
        """Return the batch with one prompt for every `users` rows, which all have the same one."""
        names = ("prompt", "prompt_mask", "text", "text_mask")
        return self._replace(**{name: getattr(self, name)[::users] for name in names})

    @property
    def plug_inputs(self) -> PlugInputs:
        """What the batch's plug reads."""
        return PlugInputs(*(getattr(self, name) for name in PlugInputs._fields))


class Tokenized(NamedTuple):
    """An example's arrays of variable length.

    Attributes:
        prompt: the LLM's tokens, int32.
        target: the gold output's tokens, int32.
        query: the input encoder's tokens, int32.
        history: the history, as the store knows it; n items.
        item_features: {name: (n, width)}, the features that need nothing but the history
            (`features.of_items`).
        asked: the query, as the store of queries knows it; None without such a store.
        shown: the places in the profile of the items that the prompt shows.
    """

    prompt: np.ndarray
    target: np.ndarray
    query: np.ndarray
    history: History
    item_features: dict[str, np.ndarray]
    asked: History | None = None
    shown: Sequence[int] = ()

    def with_history_of(self, other: "Tokenized | None") -> "Tokenized":
        """Return the example with the history of `other`, or with an empty one if that is None."""
        if other is not None:
            return self._replace(history=other.history, item_features=other.item_features)
        none = {name: values[:0] for name, values in self.item_features.items()}
        texts = self.history.texts[:0]
        return self._replace(history=self.history._replace(texts=texts), item_features=none)


def history_texts(
    task: Task, example: Example, max_history: int, history_labels: bool
) -> tuple[str, list[str]]:
    """Return whose history it is, and the texts of its newest `max_history` items."""
    items = example.profile[-max_history:]
    return example.owner, [task.item_text(item, history_labels) for item in items]


def tokenize(
    task: Task,
    examples: Iterable[Example],
    tokenizer: Tokenizer,
    encoder: Encoder,
    *,
    max_input_length: int,
    max_target_length: int,
    max_history: int,
    history_labels: bool = True,
    behind: bool = False,
    features: Sequence[str] = (),
    queries: HistoryStore | None = None,
) -> list[Tokenized]:
    """Tokenise examples, in one pass over them.

    Args:
        task: the examples' task.
        examples: the examples, iterated once.
        tokenizer: the LLM's tokenizer.
        encoder: tokenises the queries.
        max_input_length: tokens kept of an input.
        max_target_length: tokens kept of a target.
        max_history: items kept of a history, the last ones, which are LaMP's newest.
        history_labels: encode each item with its label.
        behind: make prompts for soft tokens behind them (`Tokenizer.prompt`).
        features: the features of the items that will be read.
        queries: a store to which the queries' vectors are added; None keeps tokens alone.
    """
    texts, tokenized = [], []
    for example in examples:
        texts.append(task.query_text(example.input))
        item_features = of_items(features, task, example.profile)
        tokenized.append(
            Tokenized(
                tokenizer.prompt(example.input, max_input_length, behind),
                tokenizer.target(example.target or "", max_target_length),
                np.array(encoder.queries(texts[-1:])[0], np.int32),
                History.of(*history_texts(task, example, max_history, history_labels)),
                {name: values[-max_history:] for name, values in item_features.items()},
            )
        )
    return tokenized if queries is None else with_queries(tokenized, texts, queries)


def with_queries(
    tokenized: Iterable[Tokenized], texts: Sequence[str], queries: HistoryStore
) -> list[Tokenized]:
    """Return the examples with the vectors of these texts as their queries.

    All processes must call it together.
    """
    asked = [(text, [text]) for text in texts]
    queries.add(asked)
    return [x._replace(asked=History.of(*y)) for x, y in zip(tokenized, asked, strict=True)]


def round_up(length: int, multiple: int = ROUND) -> int:
    """Return the least positive multiple of `multiple` that holds `length`."""
    return max(multiple, -(-length // multiple) * multiple)


MOST_SIZES = 48  # of texts, and of targets, that edges are chosen among where both differ


def bucket_edges(lengths: np.ndarray, count: int, target_cost: float = 0) -> np.ndarray:
    """Choose the padded shapes that cost the least: up to `count` of them, ascending, (k, 2).

    Each shape holds every example that a smaller shape holds.

    Args:
        lengths: (n, 2), the lengths of texts and targets.
        count: the most shapes.
        target_cost: the cost of a place of a target; a place of a text costs 1.
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
    """A bucket's padded lengths.

    Attributes:
        text: of `Batch.text`.
        prompt: of `Batch.prompt`.
        query: of `Batch.query`.
        target: of `Batch.target`.
    """

    text: int
    prompt: int
    query: int
    target: int


class Buckets:
    """The few padded shapes that hold the examples at the least cost.

    An example fits its bucket and all larger ones.

    Args:
        tokenized: the examples.
        count: the most shapes.
        longest_query: the most tokens that the input encoder takes.
        target_cost: the cost of a place of the target over one of the text. 0 means that the LLM
            reads both as one text, as a decoder-only LLM does unless soft tokens stand between
            them.
    """

    def __init__(
        self, tokenized: Sequence[Tokenized], count: int, longest_query: int, target_cost: float
    ):
        self.joined = target_cost == 0
        texts = np.array([len(self.text(e)) for e in tokenized])
        targets = np.array([len(e.target) for e in tokenized])
        if self.joined:  # they have one padded length
            targets[:] = targets.max()
        edges = bucket_edges(np.stack([texts, targets], axis=1), count, target_cost)
        fits = (texts[:, None] <= edges[:, 0]) & (targets[:, None] <= edges[:, 1])
        self.of = fits.argmax(axis=1)
        lengths = np.array([(len(e.prompt), len(e.query)) for e in tokenized])
        longest = [
            lengths[self.of <= bucket].max(axis=0, initial=0) for bucket in range(len(edges))
        ]
        self.shapes = [
            Shape(int(text), round_up(prompt), min(round_up(query), longest_query), int(target))
            for (text, target), (prompt, query) in zip(edges, longest, strict=True)
        ]
        self.history = round_up(max(len(e.history.texts) for e in tokenized))

    def text(self, example: Tokenized) -> np.ndarray:
        """Return what the LLM reads of an example: the prompt, and if joined the target behind it.

        The target's last token is left out, since nothing is predicted from it. A joined row is
        padded once, not at the prompt's end and again at the target's.
        """
        if not self.joined:
            return example.prompt
        return np.concatenate([example.prompt, example.target[:-1]])


def plan_batches(
    order: np.ndarray, bucket_of: np.ndarray, batch_size: int
) -> list[tuple[int, np.ndarray]]:
    """Return the batches of an epoch as (bucket, indices), ceil(n / batch_size) of them.

    The rest of a bucket moves to the next larger one, so that only the last batch may be short.

    Args:
        order: the examples in the epoch's order.
        bucket_of: each example's bucket.
        batch_size: examples of a full batch.
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
    """The batches of training: item `step` is (step, bucket, indices).

    Each epoch has its order, which does not depend on the epochs before.
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
    """Return the places of the items that are kept of `count`, in their order.

    History dropout works as in the official code's data: with probability 10/11, a history of more
    than 2 items loses 1 + floor(count * u) of them, u uniform in [0, rate).
    """
    if rate == 0 or count <= 2 or rng.random() < 1 / 11:
        return np.arange(count)
    dropped = min(count - 1, 1 + int(count * rng.uniform(0, rate)))
    return np.sort(rng.permutation(count)[dropped:])


class Assemble:
    """A function from (step, bucket, indices) to this process' rows of the batch.

    Args:
        tokenized: the examples.
        buckets: their padded shapes.
        store: the history store.
        rows: the places of this process' rows in the batch (`mesh.local_rows`).
        seed: of the dropout.
        history_dropout: the largest share of a history that is dropped (`drop_history`).
        features: the names of the features that batches hold.
        peers: the run's peers, needed if a feature compares with them.
        queries: the store of the queries' vectors; without it batches hold the queries' tokens.
    """

    def __init__(
        self,
        tokenized: Sequence[Tokenized],
        buckets: Buckets,
        store: HistoryStore,
        rows: Sequence[int] | np.ndarray,
        *,
        seed: int = 0,
        history_dropout: float = 0.0,
        features: Sequence[str] = (),
        peers: Peers | None = None,
        queries: HistoryStore | None = None,
    ):
        self.tokenized, self.buckets, self.store, self.rows = tokenized, buckets, store, rows
        self.seed, self.history_dropout = seed, history_dropout
        self.features, self.peers, self.queries = features, peers, queries

    def __call__(self, planned: tuple[int, int, np.ndarray]) -> Batch:
        step, bucket, indices = planned
        shape = self.buckets.shapes[bucket]._asdict()
        H, E = self.buckets.history, self.store.encoder.size
        B = len(self.rows)
        if self.queries:
            del shape["query"]
        batch: dict[str, Any] = {n: np.zeros((B, w), np.int32) for n, w in shape.items()}
        batch |= {f"{name}_mask": np.zeros((B, width), bool) for name, width in shape.items()}
        for name in shape.keys() - {"target"}:
            batch[f"{name}_mask"][:, 0] = True  # rows that fill up have a token to attend to
        if self.queries:
            batch["query"] = np.zeros((B, E), np.float32)
            batch["query_mask"] = np.ones((B, 1), bool)
        batch["history"] = np.zeros((B, H, E), np.float32)
        batch["history_mask"] = np.zeros((B, H), bool)
        batch["features"] = {
            name: np.zeros((B, H, FEATURES[name].width(E)), np.float32) for name in self.features
        }
        batch["index"] = np.zeros(B, np.int32)
        batch["weight"] = np.zeros(B, np.float32)
        rows = [row for row in self.rows if row < len(indices)]
        examples = [self.tokenized[indices[row]] for row in rows]
        histories = self.store.read([example.history for example in examples])
        if self.queries:
            asked = self.queries.read([example.asked for example in examples])
            for i, vectors in enumerate(asked):
                batch["query"][i] = vectors[0]
        for i, (row, example, vectors) in enumerate(zip(rows, examples, histories, strict=True)):
            for name in shape:
                ids = self.buckets.text(example) if name == "text" else getattr(example, name)
                batch[name][i, : len(ids)] = ids
                batch[f"{name}_mask"][i, : len(ids)] = True
            rng = np.random.default_rng((self.seed, 1, step, int(row)))
            kept = drop_history(len(vectors), rng, self.history_dropout)
            batch["history"][i, : len(kept)] = vectors[kept]
            batch["history_mask"][i, : len(kept)] = True
            # Made of the whole history: a dropped item is older all the same, and never a peer.
            for name, values in self._features(example, vectors).items():
                batch["features"][name][i, : len(kept)] = values[kept]
            batch["index"][i] = indices[row]
            batch["weight"][i] = 1
        return Batch(**batch)

    def _features(self, example: Tokenized, vectors: np.ndarray) -> dict[str, np.ndarray]:
        texts = example.history.texts
        means = lambda: self.peers.means(texts, vectors)  # type: ignore[union-attr]  # if there are
        return of_history(self.features, example.item_features, vectors, means)


def place_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Return the global batch, of which this process' rows are its shards."""
    return jax.tree.map(lambda local: place_rows(local, mesh), batch)


def training_batches(plan: Plan, assemble: Assemble, step: int = 0) -> grain.DatasetIterator:
    """Return an iterator over this process' rows of the plan's batches, from `step` on.

    The plan knows every step's batch. So the step is all that a checkpoint stores of the data, and
    another number of processes can go on from it.
    """
    dataset = grain.MapDataset.source(plan).map(assemble)[step:]
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
