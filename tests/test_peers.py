"""What other users wrote on similar things."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pplug_jax.errors import InputError
from pplug_jax.feed import peers
from pplug_jax.feed.peers import COUNT, Peers

E, N = 6, 60


class Store:
    """N unit vectors; the text of row i has the key i."""

    directory = "here"

    def __init__(self, seed: int = 0):
        self.order = list(range(N))
        vectors = np.random.default_rng(seed).normal(size=(N, E)).astype(np.float16)
        self._vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def __len__(self) -> int:
        return N

    def keys(self, rows: np.ndarray) -> np.ndarray:
        return np.array(self.order)[rows]

    def rows_of(self, keys: np.ndarray) -> np.ndarray:
        return np.array([dict(zip(self.order, range(N), strict=False))[key] for key in keys])

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        return self._vectors[rows].astype(np.float32)


def brute_force(store: Store, pool: set[int], vector: np.ndarray, own: set[int]) -> np.ndarray:
    others = store.vectors(np.array(sorted(pool - own), int))
    nearest = sorted(others, key=lambda other: -float(other @ vector))[:COUNT]
    return np.mean(nearest, axis=0) if nearest else vector


histories = st.lists(st.lists(st.integers(0, N - 1), max_size=20), max_size=6)


@given(histories, st.lists(st.integers(0, N - 1), max_size=12), st.integers(1, 30))
def test_means_are_those_of_a_comparison_with_every_item(
    read: list[list[int]], own: list[int], chunk: int
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "CHUNK", chunk)
        store, rows = Store(), np.array(own, np.int64)
        made = Peers.of(store, [np.array(history, np.int64) for history in read])
        pool = {row for history in read for row in history}
        found = made.means(rows)
        assert found.shape == (len(own), E) and found.dtype == np.float32
        for row, mean in zip(own, found, strict=True):
            expected = brute_force(store, pool, store.vectors(row), set(own))
            np.testing.assert_allclose(mean, expected, atol=1e-6)
        np.testing.assert_array_equal(made.means(rows), found)  # remembered
        # The same of a new user's vectors, who has some of the texts too.
        vectors = Store(seed=1).vectors(np.arange(5))
        for vector, mean in zip(vectors, made.means_of(vectors, rows), strict=True):
            np.testing.assert_allclose(mean, brute_force(store, pool, vector, set(own)), atol=1e-6)


def test_a_text_of_both_is_the_users_own():
    store = Store()
    made = Peers.of(store, [np.array([3, 5]), np.array([5, 7])])
    seven = store.vectors(np.array([7]))
    for found in (made.means(np.array([3, 5])), made.means_of(store.vectors([3, 5]), [3, 5])):
        np.testing.assert_array_equal(found, np.repeat(seven, 2, axis=0))


def test_without_peers_nothing_differs():
    store, rows = Store(), np.array([3, 5])
    for history in ([], [rows]):
        np.testing.assert_array_equal(Peers.of(store, history).means(rows), store.vectors(rows))


def test_a_saved_pool_is_the_same(tmp_path: Path):
    store, rows = Store(), np.array([1, 2])
    made = Peers.of(store, [np.array([9, 4, 4]), np.arange(20, 50)])
    made.save(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["peers.npy"]
    again = Peers.load(store, tmp_path / "run")
    assert again.pool.tolist() == [4, 9, *range(20, 50)]
    np.testing.assert_array_equal(again.means(rows), made.means(rows))
    # Another store may hold the texts in another order.
    other = Store()
    other.order.reverse()
    assert Peers.load(other, tmp_path / "run").pool.tolist() == [
        N - 1 - row for row in [4, 9, *range(20, 50)]
    ]


def test_a_pool_that_cannot_be_had(tmp_path: Path):
    with pytest.raises(InputError, match=r"peers\.npy: no such file; train first"):
        Peers.load(Store(), tmp_path)
    Peers.of(Store(), [np.array([N - 1])]).save(tmp_path)

    smaller = Store()
    smaller.order.pop()
    with pytest.raises(InputError, match="the history store here lacks texts of the training"):
        Peers.load(smaller, tmp_path)
