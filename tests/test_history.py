"""The history store: unique texts once, whatever happens to the process that fills it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from pplug_jax.data.keys import KEY_BYTES
from pplug_jax.feed import store as history
from pplug_jax.feed.store import HistoryStore
from tests.support.encoders import FakeEncoder
from tests.support.forks import Fork

TEXTS = [f"text number {i} {'long ' * (7 * i % 5)}" for i in range(10)]


def check(store: HistoryStore, texts: Sequence[str]) -> None:
    """Every text's stored vector is its own."""
    expected = np.stack([store.encoder.vector(text) for text in texts])
    stored = store.vectors(store.rows(texts))
    assert stored.dtype == np.float32
    # float16 keeps 11 bits: half a unit in the last place of numbers below 1.
    np.testing.assert_allclose(stored, expected, rtol=2**-11, atol=2**-24)


def sizes(store: HistoryStore) -> tuple[int, int]:
    """Whole rows by the two files' sizes."""
    keys, vectors = (store.directory / name for name in ("keys", "vectors"))
    assert keys.stat().st_size % KEY_BYTES == vectors.stat().st_size % (2 * 6) == 0
    return keys.stat().st_size // KEY_BYTES, vectors.stat().st_size // (2 * 6)


def test_only_unique_texts_are_encoded_and_stored(tmp_path: Path):
    encoder = FakeEncoder()
    store = HistoryStore(tmp_path, encoder)
    assert store.add(TEXTS + TEXTS[::-1] + TEXTS[:3]) == 10
    assert sorted(encoder.encoded) == sorted(TEXTS)
    assert len(store) == 10
    assert sizes(store) == (10, 10)
    check(store, TEXTS[3:] + TEXTS[:5])


def test_what_is_there_is_not_encoded_again(tmp_path: Path):
    HistoryStore(tmp_path, FakeEncoder()).add(TEXTS[:6])
    encoder = FakeEncoder()
    store = HistoryStore(tmp_path, encoder)
    assert store.add(TEXTS[:6]) == 0
    assert encoder.calls == 0
    assert store.add(TEXTS) == 4
    assert sorted(encoder.encoded) == sorted(TEXTS[6:])
    check(store, TEXTS)


def test_encoders_do_not_share_vectors(tmp_path: Path):
    first = HistoryStore(tmp_path, FakeEncoder("a"))
    first.add(TEXTS)
    second = HistoryStore(tmp_path, FakeEncoder("b"))
    assert first.directory != second.directory
    assert len(second) == 0
    assert second.add(TEXTS) == 10
    check(first, TEXTS)
    check(second, TEXTS)


def test_the_order_of_adding_does_not_matter(tmp_path: Path):
    one, other = (HistoryStore(tmp_path / name, FakeEncoder()) for name in "ab")
    one.add(TEXTS)
    for text in TEXTS[::-1]:
        other.add([text])
    np.testing.assert_array_equal(one.vectors(one.rows(TEXTS)), other.vectors(other.rows(TEXTS)))


def test_texts_are_told_apart_exactly(tmp_path: Path):
    store = HistoryStore(tmp_path, FakeEncoder())
    texts = ["", " ", "a", "A", "a ", "ä", "a\u0308", "😀", "a\0"]
    assert store.add(texts) == len(texts)
    check(store, texts)


def test_no_texts(tmp_path: Path):
    store = HistoryStore(tmp_path, FakeEncoder())
    assert store.add([]) == 0
    assert store.vectors(store.rows([])).shape == (0, 6)
    store.add(TEXTS)
    assert store.vectors(store.rows([])).shape == (0, 6)


def test_an_unknown_text_is_a_key_error(tmp_path: Path):
    store = HistoryStore(tmp_path, FakeEncoder())
    store.add(TEXTS)
    with pytest.raises(KeyError):
        store.rows([TEXTS[0], "never added"])


@pytest.mark.parametrize(
    ("keys", "vectors", "kept"),
    [
        (4 * KEY_BYTES, 12 * 10, 4),  # killed between the two files
        (10 * KEY_BYTES, 12 * 7, 7),
        (10 * KEY_BYTES, 12 * 7 + 5, 7),  # in the middle of a row
        (6 * KEY_BYTES + 1, 12 * 10, 6),
        (KEY_BYTES - 1, 11, 0),
        (0, 12 * 3, 0),
    ],
)
def test_files_cut_anywhere_are_completed(tmp_path: Path, keys: int, vectors: int, kept: int):
    store = HistoryStore(tmp_path, FakeEncoder())
    store.add(TEXTS)
    for name, size in (("keys", keys), ("vectors", vectors)):
        path = store.directory / name
        path.write_bytes(path.read_bytes()[:size])
    encoder = FakeEncoder()
    store = HistoryStore(tmp_path, encoder)
    assert len(store) == kept
    assert sizes(store) == (kept, kept)
    assert store.add(TEXTS) == len(encoder.encoded) == 10 - kept
    assert sizes(store) == (10, 10)
    check(store, TEXTS)


@pytest.mark.parametrize("same_store", [True, False])
def test_a_killed_run_keeps_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_store: bool
):
    monkeypatch.setattr(history, "CHUNK", 4)
    store = HistoryStore(tmp_path, FakeEncoder(dies_at=2))
    with pytest.raises(KeyboardInterrupt):
        store.add(TEXTS)
    if not same_store:
        store = HistoryStore(tmp_path, FakeEncoder())
    assert len(store) == 4
    check(store, sorted(TEXTS, key=len)[:4])
    assert store.add(TEXTS) == 6
    assert sizes(store) == (10, 10)
    check(store, TEXTS)


def fill(directory: Path, first: int, last: int) -> Fork:
    return Fork("tests.support.filling", str(directory), str(first), str(last))


@pytest.mark.slow
def test_two_processes_fill_one_store(tmp_path: Path):
    for process in [fill(tmp_path, 0, 200), fill(tmp_path, 190, 390)]:
        said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    store = HistoryStore(tmp_path, FakeEncoder())
    assert len(store) == 390
    assert sizes(store) == (390, 390)
    check(store, [f"text {i}" for i in range(390)])


@pytest.mark.slow
def test_a_killed_process_leaves_no_lock_and_no_wrong_vector(tmp_path: Path):
    killed, other = fill(tmp_path, 0, 400), fill(tmp_path, 100, 200)
    while not any(path.stat().st_size for path in tmp_path.glob("*/vectors")):
        assert killed.poll() is None
    killed.kill()
    said = other.communicate(timeout=120)
    assert other.returncode == 0, said
    store = HistoryStore(tmp_path, FakeEncoder())
    store.add([f"text {i}" for i in range(400)])
    check(store, [f"text {i}" for i in range(400)])
