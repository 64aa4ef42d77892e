"""From examples to batches: tokens, shapes, order, dropout, shards."""

import hashlib
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import grain
import jax
import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from pplug_jax.data.form import SIZE, form
from pplug_jax.data.lamp import Example
from pplug_jax.data.tasks import TASKS
from pplug_jax.feed.batches import (
    ROUND,
    ROUND_TARGET,
    Assemble,
    Batch,
    Buckets,
    Plan,
    Tokenized,
    bucket_edges,
    drop_history,
    place_batch,
    plan_batches,
    round_up,
    tokenize,
    training_batches,
)
from pplug_jax.feed.features import item_ages, item_forms
from pplug_jax.feed.peers import Peers
from pplug_jax.feed.store import History, HistoryStore
from pplug_jax.llm.prompts import Tokenizer
from pplug_jax.runtime.mesh import make_mesh

TASK = TASKS["LaMP_5"]


class FakeEncoder:
    """A text's vector is drawn from its hash; its tokens are its characters between two marks."""

    size = 4
    fingerprint = "fake"

    def encode(
        self,
        texts: Sequence[str],
        batch_size: int = 64,
        on_batch: Callable[[int], None] = lambda done: None,
        queries: bool = False,
    ) -> np.ndarray:
        seeds = (hashlib.sha256(text.encode()).digest()[0] for text in texts)
        return np.stack([np.random.default_rng(seed).standard_normal(4) for seed in seeds])

    def queries(self, texts: Sequence[str]) -> list[list[int]]:
        return [[1, *map(ord, text), 2] for text in texts]


def item(number: int) -> dict[str, str]:
    return {"title": f"title {number}", "abstract": "abstract"}


ALL = [TASK.item_text(item(i)) for i in range(40)]


def history(rng: np.random.Generator, count: int) -> History:
    """Some of all texts."""
    return History.of("everyone", [ALL[i] for i in rng.permutation(40)[:count]])


@pytest.fixture
def store(tmp_path: Path) -> HistoryStore:
    store = HistoryStore(tmp_path, FakeEncoder())
    store.add([("everyone", ALL)])
    return store


def tokenized(rng: np.random.Generator, rows: int | None = None) -> Tokenized:
    """An example of random lengths, with `rows` items of history."""

    def ids(low: int, high: int) -> np.ndarray:
        return rng.integers(3, 99, rng.integers(low, high), dtype=np.int32)

    rows = int(rng.integers(0, 20)) if rows is None else rows
    told = {
        "age": np.arange(rows, dtype=np.float32)[::-1, None],
        "form": rng.normal(size=(rows, SIZE)).astype(np.float32),
    }
    return Tokenized(ids(2, 200), ids(1, 20), ids(2, 60), history(rng, rows), told)


def many(count: int, seed: int = 0) -> list[Tokenized]:
    rng = np.random.default_rng(seed)
    return [tokenized(rng) for _ in range(count)]


# Tokens


def test_tokenize(llama_tokenizer: transformers.PreTrainedTokenizerBase):
    tokenizer = Tokenizer(llama_tokenizer, separator=" =>")
    profile = tuple(item(i) for i in range(5))
    input = "Generate a title for the following abstract of a paper: Models."
    examples = [Example("0", input, "Gold", profile, "user"), Example("1", "bare", None, ())]
    lengths = {"max_input_length": 99, "max_target_length": 9, "max_history": 3}
    lengths["features"] = ("age", "form")
    first, second = tokenize(TASK, examples, tokenizer, FakeEncoder(), **lengths)
    assert first.prompt.tolist() == tokenizer.prompt(input, 99).tolist()
    assert first.target.tolist() == tokenizer.target("Gold", 9).tolist()
    assert first.query.tolist() == [1, *map(ord, "Models."), 2]
    # LaMP's newest come last, and the last are kept.
    newest = History.of("user", [TASK.item_text(each) for each in profile[2:]])
    assert first.history.user == newest.user
    assert first.history.texts.tolist() == newest.texts.tolist()
    assert second.target.tolist() == [1]  # no gold: EOS alone
    assert second.history.texts.tolist() == second.item_features["age"].tolist() == []
    assert first.item_features["age"].tolist() == [[0], [0], [0]]
    expected = [form(each["title"]) for each in profile[2:]]
    np.testing.assert_array_equal(first.item_features["form"], expected)
    assert second.item_features["form"].shape == (0, SIZE)

    dated = tuple(item(i) | {"date": f"2001-0{i + 1}"} for i in range(5))
    examples = [Example("2", input, None, dated)]
    (third,) = tokenize(TASK, examples, tokenizer, FakeEncoder(), **lengths)
    assert third.item_features["age"].tolist() == [[2], [1], [0]]
    assert third.history.texts.tolist() == first.history.texts.tolist()
    assert third.history.user == History.of(examples[0].owner, []).user


def test_the_form_is_that_of_what_the_user_wrote():
    (titled,) = item_forms(TASK, [item(1)])
    np.testing.assert_array_equal(titled, form("title 1"))
    (tweet,) = item_forms(TASKS["LaMP_7"], [{"id": "1", "text": "Off to town!"}])
    np.testing.assert_array_equal(tweet, form("Off to town!"))
    assert item_forms(TASK, []).shape == (0, SIZE)


def test_an_item_is_read_with_its_label_or_without(
    llama_tokenizer: transformers.PreTrainedTokenizerBase,
):
    tagged = {"description": "A film.", "tag": "comedy"}
    examples = [Example("0", "which tag? description: A film.", "comedy", (tagged,))]
    lengths = {"max_input_length": 99, "max_target_length": 9, "max_history": 3}
    for labels, row in ((True, "A film. tag: comedy"), (False, "A film.")):
        (made,) = tokenize(
            TASKS["LaMP_2"],
            examples,
            Tokenizer(llama_tokenizer),
            FakeEncoder(),
            history_labels=labels,
            **lengths,
        )
        assert made.history.texts.tolist() == History.of("", [row]).texts.tolist()


@given(st.lists(st.integers(1, 12), max_size=20), st.randoms(use_true_random=False))
def test_an_items_age_is_the_number_of_newer_items(months: list[int], random: Random):
    profile = [{"date": f"2001-{month}-03"} for month in months]
    ages = item_ages(TASK, profile)
    assert ages.dtype == np.float32
    assert ages[:, 0].tolist() == [sum(other > month for other in months) for month in months]
    if months:  # one without a date, and nothing is known of any
        profile[random.randrange(len(profile))] = {"title": "date"}
        assert item_ages(TASK, profile)[:, 0].tolist() == [0] * len(months)


# Shapes and order


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 6), st.integers(0, 9))
def test_every_example_fits_its_bucket_and_all_larger(count: int, buckets: int, seed: int):
    examples = many(count, seed)
    made = Buckets(examples, buckets, 512, target_cost=seed % 3)
    assert 1 <= len(made.shapes) <= buckets
    assert len(made.of) == count
    assert all(side % ROUND == 0 for shape in made.shapes for side in shape[:-1])
    assert all(shape.target % ROUND_TARGET == 0 for shape in made.shapes)
    for example, bucket in zip(examples, made.of, strict=True):
        for shape in made.shapes[bucket:]:
            assert len(made.text(example)) <= shape.text
            assert len(example.prompt) <= shape.prompt <= shape.text
            assert len(example.query) <= shape.query
            assert len(example.target) <= shape.target
        assert len(example.history.texts) <= made.history
        if bucket:  # and no smaller one would do
            smaller = made.shapes[bucket - 1]
            text, target = len(made.text(example)), len(example.target)
            assert text > smaller.text or target > smaller.target


@given(
    st.lists(st.tuples(st.integers(0, 90), st.integers(0, 60)), min_size=1, max_size=30),
    st.integers(1, 4),
    st.sampled_from([0, 1, 2]),
)
def test_no_other_edges_pad_less(lengths: list[tuple[int, int]], count: int, target_cost: int):
    if target_cost == 0:
        lengths = [(text, 5) for text, _ in lengths]

    def fits(inner: Sequence[int], outer: Sequence[int]) -> bool:
        return all(x <= y for x, y in zip(inner, outer, strict=True))

    def cost(edges: Sequence[Sequence[int]]) -> int:
        firsts = [next(edge for edge in edges if fits(length, edge)) for length in lengths]
        return sum(text + target_cost * target for text, target in firsts)

    edges = bucket_edges(np.array(lengths), count, target_cost).tolist()
    assert all(fits(x, y) and x != y for x, y in itertools.pairwise(edges))
    assert len(edges) <= count
    texts = {round_up(text) for text, _ in lengths}
    targets = {round_up(target, ROUND_TARGET if target_cost else ROUND) for _, target in lengths}
    last = max(texts), max(targets)
    assert tuple(edges[-1]) == last
    shapes = sorted(set(itertools.product(texts, targets)) - {last})
    chains = (
        (*chain, last)
        for n in range(count)
        for chain in itertools.combinations(shapes, n)
        if all(fits(x, y) for x, y in itertools.pairwise(chain))
    )
    assert cost(edges) == min(map(cost, chains))


def test_buckets_of_no_history_and_short_texts_have_a_shape():
    empty = np.zeros(0, np.int32)
    made = Buckets(
        [Tokenized(np.ones(1, np.int32), empty, empty, History(0, empty), {})], 4, 512, 0
    )
    assert made.shapes == [(16, 16, 16, 16)]
    assert made.history == 16


@given(st.lists(st.integers(0, 4), min_size=1, max_size=80), st.integers(1, 9), st.integers(0, 9))
def test_an_epoch_holds_every_index_once(buckets: list[int], batch_size: int, seed: int):
    bucket_of = np.array(buckets)
    order = np.random.default_rng(seed).permutation(len(buckets))
    batches = plan_batches(order, bucket_of, batch_size)
    assert len(batches) == -(-len(buckets) // batch_size)
    assert all(len(indices) == batch_size for _, indices in batches[:-1])
    assert sorted(np.concatenate([indices for _, indices in batches])) == list(range(len(buckets)))
    for bucket, indices in batches:
        assert bucket_of[indices].max() <= bucket


def test_a_plan_is_a_function_of_its_seed_and_epochs_differ():
    bucket_of = Buckets(many(50), 3, 512, 0).of

    def epochs(seed: int) -> list[list[int]]:
        plan = Plan(bucket_of, 8, 2, seed)
        assert len(plan) == 14
        assert [plan[step][0] for step in range(14)] == list(range(14))
        return [
            np.concatenate([plan[step][2] for step in steps]).tolist()
            for steps in (range(7), range(7, 14))
        ]

    one, two = epochs(seed=1)
    assert sorted(one) == sorted(two) == list(range(50))
    assert one != two
    assert epochs(seed=1) == [one, two]
    assert epochs(seed=2)[0] not in (one, two)


def test_a_plans_step_is_known_without_those_before():
    bucket_of = Buckets(many(50), 3, 512, 0).of
    forwards, backwards = Plan(bucket_of, 8, 3, 0), Plan(bucket_of, 8, 3, 0)
    expected = [forwards[step] for step in range(21)]
    for step in reversed(range(21)):
        found = backwards[step]
        assert found[:2] == expected[step][:2]
        np.testing.assert_array_equal(found[2], expected[step][2])


@pytest.mark.parametrize(("epochs", "steps"), [(1, 7), (2.5, 18), (0.5, 4), (0.01, 1)])
def test_epochs_may_be_fractions(epochs: float, steps: int):
    plan = Plan(np.zeros(50, int), 8, epochs, 0)
    assert len(plan) == steps
    for start in range(0, steps, 7):  # no example twice in an epoch, whole or not
        epoch = np.concatenate([plan[step][2] for step in range(start, min(start + 7, steps))])
        assert len(set(epoch)) == len(epoch)


# History dropout


@given(st.integers(0, 60), st.floats(0, 1), st.integers(0, 99))
def test_dropout_never_empties_a_history(count: int, rate: float, seed: int):
    kept = drop_history(count, np.random.default_rng(seed), rate).tolist()
    assert set(kept) <= set(range(count))
    assert kept == sorted(set(kept))
    assert len(kept) >= max(min(count, 1), count - 1 - int(count * rate))
    if count <= 2 or rate == 0:
        assert kept == list(range(count))


def test_dropout_has_the_official_distribution():
    # n = 10, rate 1/2: whole once in 11, else 1 to 5 items are gone, each number as often.
    rng, draws = np.random.default_rng(0), 11_000
    kept = [drop_history(10, rng, 0.5) for _ in range(draws)]
    gone = np.bincount([10 - len(rows) for rows in kept], minlength=11)
    assert gone[6:].sum() == 0
    expected = np.array([1 / 11, *[2 / 11] * 5])
    sigma = np.sqrt(draws * expected * (1 - expected))
    assert np.all(np.abs(gone[:6] - draws * expected) < 5 * sigma)
    # And every item is as likely to go.
    times = np.bincount(np.concatenate(kept), minlength=10)
    assert np.all(np.abs(times - times.mean()) < 5 * np.sqrt(times.mean()))


# Batches


@pytest.mark.parametrize(("count", "joined"), [(5, True), (3, True), (3, False)])
def test_a_batch_holds_its_examples_and_nothing_else(store: HistoryStore, count: int, joined: bool):
    examples = many(20)
    buckets = Buckets(examples, 2, 512, 0 if joined else 1)
    indices = np.argsort(buckets.of, kind="stable")[:count]
    assert buckets.of[indices].max() == 0
    batch = Assemble(examples, buckets, store, range(5))((0, 0, indices))
    for name, width in buckets.shapes[0]._asdict().items():
        assert getattr(batch, name).shape == (5, width)
    assert batch.history.shape == (5, buckets.history, 4)
    assert batch.weight.tolist() == [1] * count + [0] * (5 - count)
    assert batch.index[:count].tolist() == indices.tolist()
    for i, index in enumerate(indices):
        example = examples[index]
        # What predicts the target's first token is the prompt's last, and nothing its last does.
        answer = example.target[:-1] if joined else example.target[:0]
        parts = {"prompt": example.prompt, "target": example.target, "query": example.query}
        parts["text"] = np.concatenate([example.prompt, answer])
        for name, expected in parts.items():
            ids, mask = getattr(batch, name)[i], getattr(batch, f"{name}_mask")[i]
            assert ids.dtype == np.int32
            assert ids[: len(expected)].tolist() == expected.tolist()
            assert not ids[len(expected) :].any()
            assert mask.tolist() == [k < len(expected) for k in range(len(ids))]
        n = len(example.history.texts)
        np.testing.assert_array_equal(batch.history[i, :n], store.vectors(example.history))
        assert not batch.history[i, n:].any()
        assert batch.history_mask[i].sum() == batch.history_mask[i, :n].sum() == n
    # A row that fills up has no target and no history, but a token to attend to.
    for i in range(count, 5):
        assert not batch.target_mask[i].any()
        assert not batch.history_mask[i].any()
        assert batch.text_mask[i].sum() == 1
        assert batch.prompt_mask[i].sum() == batch.query_mask[i].sum() == 1


def full_batch(examples: list[Tokenized], store: HistoryStore, step: int, **options: Any) -> Batch:
    buckets = Buckets(examples, 1, 512, 0)
    options.setdefault("rows", range(len(examples)))
    assemble = Assemble(examples, buckets, store, **options)
    return assemble((step, 0, np.arange(len(examples))))


def same(one: Batch, other: Batch) -> bool:
    leaves = zip(*map(jax.tree.leaves, (one, other)), strict=True)
    return all(np.array_equal(a, b) for a, b in leaves)


def test_dropout_is_a_function_of_seed_and_step(store: HistoryStore):
    examples = many(16)
    first = full_batch(examples, store, 3, seed=1, history_dropout=0.5)
    assert same(first, full_batch(examples, store, 3, seed=1, history_dropout=0.5))
    for step, seed in ((4, 1), (3, 2)):
        other = full_batch(examples, store, step, seed=seed, history_dropout=0.5)
        assert not np.array_equal(first.history_mask, other.history_mask)
        assert np.array_equal(first.prompt, other.prompt)
    # Without dropout the step means nothing.
    assert same(full_batch(examples, store, 3), full_batch(examples, store, 4))


def test_the_kept_items_stand_in_their_order_with_their_ages_and_differences(store: HistoryStore):
    rng = np.random.default_rng(0)
    examples = [
        tokenized(rng, rows=12)._replace(
            history=history(rng, 12),
            item_features={
                "age": rng.permutation(12)[:, None] + 1.0,
                "form": rng.normal(size=(12, SIZE)).astype(np.float32),
            },
        )
        for _ in range(50)
    ]
    peers = Peers.of(store, [example.history for example in examples])
    options = {"features": ("age", "difference", "form"), "peers": peers}
    batch = full_batch(examples, store, 0, history_dropout=0.5, **options)
    counts = batch.history_mask.sum(axis=1)
    assert counts.min() < counts.max() == 12
    for i, (example, n) in enumerate(zip(examples, counts, strict=True)):
        assert batch.history_mask[i, :n].all()
        ages = example.item_features["age"].tolist()  # each item's own
        kept = [ages.index(age) for age in batch.features["age"][i, :n].tolist()]
        assert kept == sorted(set(kept))
        vectors = store.vectors(example.history)
        np.testing.assert_array_equal(batch.history[i, :n], vectors[kept])
        # Of the whole history: what was dropped is still no other user's.
        differences = vectors - peers.means(example.history.texts, vectors)
        np.testing.assert_array_equal(batch.features["difference"][i, :n], differences[kept])
        np.testing.assert_array_equal(
            batch.features["form"][i, :n], example.item_features["form"][kept]
        )
        for array in (batch.history, *batch.features.values()):
            assert not array[i, n:].any()
    without = full_batch(examples, store, 0, history_dropout=0.5)
    assert without.features == {}
    np.testing.assert_array_equal(without.history, batch.history)


def iterator(store: HistoryStore, step: int = 0) -> grain.DatasetIterator:
    examples = many(30)
    buckets = Buckets(examples, 2, 512, 0)
    assemble = Assemble(examples, buckets, store, range(4), seed=5, history_dropout=0.5)
    return training_batches(Plan(buckets.of, 4, 2, 5), assemble, step)


def test_training_goes_on_from_a_step(store: HistoryStore):
    whole = list(iterator(store))
    assert len(whole) == 16
    for step in (0, 5, 8, 15):  # 8 is the first of the second epoch
        rest = list(iterator(store, step))
        assert len(rest) == 16 - step
        assert all(map(same, rest, whole[step:]))


# Devices and hosts


def extensions(examples: Sequence[Tokenized], store: HistoryStore) -> dict[str, Any]:
    peers = Peers.of(store, [example.history for example in examples])
    return {"features": ("age", "difference", "form"), "peers": peers}


@pytest.mark.parametrize("extended", [False, True])
def test_a_batch_is_sharded_over_its_rows(store: HistoryStore, extended: bool):
    mesh = make_mesh(2, 2, 2)
    examples = many(8)
    local = full_batch(examples, store, 0, **(extensions(examples, store) if extended else {}))
    placed = place_batch(local, mesh)
    assert len(jax.tree.leaves(local)) == len(Batch._fields) - 2 + (3 if extended else 0)
    for array, expected in zip(*map(jax.tree.leaves, (placed, local)), strict=True):
        np.testing.assert_array_equal(array, expected)
        assert array.dtype == expected.dtype
        assert len(array.addressable_shards) == 8
        # data x fsdp = 4 parts of 2 rows, each on the 2 devices of `tensor`.
        starts = sorted(shard.index[0].start or 0 for shard in array.addressable_shards)
        assert starts == [0, 0, 2, 2, 4, 4, 6, 6]
        assert all(
            shard.data.shape == (2, *expected.shape[1:]) for shard in array.addressable_shards
        )


@pytest.mark.parametrize("hosts", [2, 4])
def test_the_hosts_rows_together_are_the_batch(store: HistoryStore, hosts: int):
    examples = many(8)
    options = {"seed": 1, "history_dropout": 0.5} | extensions(examples, store)
    whole = full_batch(examples, store, 2, **options)
    size = 8 // hosts
    parts = [
        full_batch(examples, store, 2, rows=range(size * host, size * (host + 1)), **options)
        for host in range(hosts)
    ]
    assert all(len(part.index) == size for part in parts)
    # Row by row the very same, dropout included: the number of hosts changes no example.
    assert same(jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts), whole)
