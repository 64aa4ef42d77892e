"""What other users wrote on similar things."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pplug_jax.errors import InputError
from pplug_jax.feed import peers
from pplug_jax.feed.peers import COUNT, Peers
from pplug_jax.feed.store import History

E, N = 6, 60


class Store:
    """N unit vectors; the key of a text is its place among them, whosever it is."""

    directory = "here"
    encoder = SimpleNamespace(size=E)

    def __init__(self, seed: int = 0, count: int = N):
        self.count = count
        vectors = np.random.default_rng(seed).normal(size=(N, E)).astype(np.float16)
        self._vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def read(self, histories: Sequence[History]) -> list[np.ndarray]:
        if any((history.texts >= self.count).any() for history in histories):
            raise KeyError
        return [self[history.texts] for history in histories]

    def __getitem__(self, texts: Sequence[int] | np.ndarray) -> np.ndarray:
        return self._vectors[np.array(texts, int)].astype(np.float32)


def of_users(*texts: Sequence[int]) -> list[History]:
    """These texts' histories, of two users in turn."""
    return [History(-(i % 2), np.array(keys, np.int64)) for i, keys in enumerate(texts)]


def brute_force(store: Store, pool: set[int], vector: np.ndarray, own: set[int]) -> np.ndarray:
    others = store[sorted(pool - own)]
    nearest = sorted(others, key=lambda other: -float(other @ vector))[:COUNT]
    return np.mean(nearest, axis=0) if nearest else vector


histories = st.lists(st.lists(st.integers(0, N - 1), max_size=20), max_size=6)


@given(histories, st.lists(st.integers(0, N - 1), max_size=12), st.integers(1, 30))
def test_means_are_those_of_a_comparison_with_every_item(
    read: list[list[int]], own: list[int], chunk: int
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "CHUNK", chunk)
        store, texts = Store(), np.array(own, np.int64)
        made = Peers.of(store, of_users(*read))
        pool = {text for history in read for text in history}
        assert sorted(made.pool[:, 1]) == sorted(pool)
        found = made.means(texts, store[own])
        assert found.shape == (len(own), E) and found.dtype == np.float32
        for vector, mean in zip(store[own], found, strict=True):
            np.testing.assert_allclose(mean, brute_force(store, pool, vector, set(own)), atol=1e-6)
        np.testing.assert_array_equal(made.means(texts, store[own]), found)  # remembered
        np.testing.assert_array_equal(made.means_once(texts, store[own]), found)


def test_a_text_of_both_is_the_users_own():
    store = Store()
    made = Peers.of(store, of_users([3, 5], [5, 7]))
    found = made.means(np.array([3, 5]), store[[3, 5]])
    np.testing.assert_array_equal(found, np.repeat(store[[7]], 2, axis=0))


def test_without_peers_nothing_differs():
    store, texts = Store(), np.array([3, 5])
    for histories in ([], of_users([3, 5])):
        means = Peers.of(store, histories).means(texts, store[texts])
        np.testing.assert_array_equal(means, store[texts])


def test_a_saved_pool_is_the_same(tmp_path: Path):
    store, texts = Store(), np.array([1, 2])
    made = Peers.of(store, of_users([9, 4, 4], range(20, 50)))
    made.save(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["peers.npy"]
    again = Peers.load(store, tmp_path / "run")
    assert again.pool.tolist() == [*([-1, i] for i in range(20, 50)), [0, 4], [0, 9]]
    means = again.means(texts, store[texts])
    np.testing.assert_array_equal(means, made.means(texts, store[texts]))


def test_a_pool_that_cannot_be_had(tmp_path: Path):
    with pytest.raises(InputError, match=r"peers\.npy: no such file; train first"):
        Peers.load(Store(), tmp_path)
    Peers.of(Store(), of_users([N - 1])).save(tmp_path)
    with pytest.raises(InputError, match="the history store here lacks texts of the training"):
        Peers.load(Store(count=N - 1), tmp_path)
