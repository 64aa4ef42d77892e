"""The history store: texts once a job, whatever happens to the processes that fill it."""

import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from pplug_jax.feed import shards
from pplug_jax.feed import store as history
from pplug_jax.feed.shards import Shard
from pplug_jax.feed.store import History, HistoryStore
from tests.support.encoders import FakeEncoder
from tests.support.forks import Fork

TEXTS = [f"text number {i} {'long ' * (7 * i % 5)}" for i in range(10)]
USERS = [(f"user {i}", TEXTS[i : i + 4]) for i in range(7)]


def check(store: HistoryStore, histories: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Every text's stored vector is its own."""
    for user, texts in histories:
        expected = [store.encoder.vector(text) for text in texts]
        stored = store.vectors(History.of(user, texts))
        assert stored.dtype == np.float32
        # float16 keeps 11 bits: half a unit in the last place of numbers below 1.
        np.testing.assert_allclose(stored, expected, rtol=2**-11, atol=2**-24)


def listed(store: HistoryStore) -> list[dict]:
    """The manifest, of whose shards all are whole, and no others there."""
    manifest = store.directory / "manifest.json"
    found = json.loads(manifest.read_text()) if manifest.is_file() else []
    for shard in found:
        assert shards.digest(store.directory / shard["name"]) == shard["digest"]
    names = {path.name for path in store.directory.iterdir() if path.is_dir()}
    assert names == {shard["name"] for shard in found}
    return found


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small chunks, each of which becomes a shard."""
    monkeypatch.setattr(history, "CHUNK", 4)
    monkeypatch.setattr(history, "SECONDS", -1)


def test_a_text_of_several_users_is_encoded_once(tmp_path: Path):
    encoder = FakeEncoder()
    store = HistoryStore(tmp_path, encoder)
    assert store.add(USERS + [("user 0", TEXTS[::-1])]) == 10
    assert sorted(encoder.encoded) == sorted(TEXTS)
    assert len(store) == 7 * 4 + 6
    check(store, [*USERS, ("user 0", TEXTS[3:] + TEXTS[:5])])


def test_a_text_is_encoded_once_though_its_users_are_in_different_shards(
    tmp_path: Path, small: None
):
    encoder = FakeEncoder()
    store = HistoryStore(tmp_path, encoder)
    assert store.add(iter(USERS)) == 10
    assert sorted(encoder.encoded) == sorted(TEXTS)
    assert len(listed(store)) == 7
    check(store, USERS)


def test_a_users_items_are_one_range_in_their_order(tmp_path: Path):
    store = HistoryStore(tmp_path, FakeEncoder())
    store.add(USERS)
    (entry,) = listed(store)
    shard = Shard(store.directory / entry["name"])
    for user, texts in USERS:
        expected = History.of(user, texts)
        assert shard.texts(expected.user).tolist() == expected.texts.tolist()
    assert len(shard.texts(entry["first"] - 1)) == len(shard.vectors(entry["last"] + 1)) == 0
    keys = sorted(History.of(user, ()).user for user, _ in USERS)
    assert (entry["first"], entry["last"], entry["items"]) == (keys[0], keys[-1], 28)
    assert shard.users(keys[1], keys[4]).tolist() == keys[1:4]


def test_what_is_there_is_not_encoded_again(tmp_path: Path):
    HistoryStore(tmp_path, FakeEncoder()).add([("u", TEXTS[:6])])
    encoder = FakeEncoder()
    store = HistoryStore(tmp_path, encoder)
    assert store.add([("u", TEXTS[:6])]) == 0
    assert encoder.calls == 0
    assert store.add([("u", TEXTS)]) == 4
    assert sorted(encoder.encoded) == sorted(TEXTS[6:])
    check(store, [("u", TEXTS), ("u", TEXTS[::-1]), ("u", TEXTS[4:7])])


def test_encoders_do_not_share_vectors(tmp_path: Path):
    first = HistoryStore(tmp_path, FakeEncoder("a"))
    first.add(USERS)
    second = HistoryStore(tmp_path, FakeEncoder("b"))
    assert first.directory != second.directory
    assert len(second) == 0
    assert second.add(USERS) == 10
    check(first, USERS)
    check(second, USERS)


def test_the_order_of_adding_does_not_matter(tmp_path: Path):
    one, other = (HistoryStore(tmp_path / name, FakeEncoder()) for name in "ab")
    one.add([("u", TEXTS)])
    for text in TEXTS[::-1]:
        other.add([("u", [text])])
    asked = History.of("u", TEXTS)
    np.testing.assert_array_equal(one.vectors(asked), other.vectors(asked))


def test_texts_and_users_are_told_apart_exactly(tmp_path: Path):
    store = HistoryStore(tmp_path, FakeEncoder())
    names = ["", " ", "a", "A", "a ", "ä", "a\u0308", "😀", "a\0"]
    histories = [(user, [user + text for text in names]) for user in names]
    assert store.add(histories) == len({text for _, texts in histories for text in texts})
    check(store, histories)


def test_no_texts(tmp_path: Path):
    store = HistoryStore(tmp_path, FakeEncoder())
    assert store.add([]) == store.add([("u", [])]) == 0
    assert store.vectors(History.of("u", [])).shape == (0, 6)
    store.add(USERS)
    assert store.vectors(History.of("u", [])).shape == (0, 6)


@pytest.mark.parametrize(("user", "text"), [("user 0", "never added"), ("nobody", TEXTS[0])])
def test_what_was_never_added_is_a_key_error(tmp_path: Path, user: str, text: str):
    store = HistoryStore(tmp_path, FakeEncoder())
    store.add(USERS)
    with pytest.raises(KeyError):
        store.vectors(History.of(user, [text]))


@pytest.mark.parametrize("name", ["index.npy", "texts.npy", "vectors.npy", ""])
def test_a_damaged_shard_is_encoded_again(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
):
    store = HistoryStore(tmp_path, FakeEncoder())
    store.add(USERS[:3])
    store.add(USERS)
    path = store.directory / listed(store)[0]["name"] / name
    path.write_bytes(path.read_bytes()[:-1]) if name else path.rename(tmp_path / "gone")
    store = HistoryStore(tmp_path, FakeEncoder())
    assert store.add(USERS) == 6
    assert "is damaged: it is encoded again" in capsys.readouterr().out
    listed(store)
    check(store, USERS)


@pytest.mark.parametrize("same_store", [True, False])
def test_an_interrupted_run_keeps_what_it_had(tmp_path: Path, same_store: bool):
    store = HistoryStore(tmp_path, FakeEncoder(dies_at=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(history, "CHUNK", 4)
        with pytest.raises(KeyboardInterrupt):
            store.add([("u", TEXTS)])
    if not same_store:
        store = HistoryStore(tmp_path, FakeEncoder())
    assert len(store) == 4
    check(store, [("u", TEXTS[:4])])
    assert store.add([("u", TEXTS)]) == 6
    assert len(listed(store)) == 2
    check(store, [("u", TEXTS)])


# Merging


def test_many_shards_are_merged_by_users(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(history, "ITEMS", 40)
    store = HistoryStore(tmp_path, FakeEncoder())
    histories = [(f"user {i}", [f"{i} {k}" for k in range(5)]) for i in range(40)]
    reader = HistoryStore(tmp_path, FakeEncoder())
    store.add(histories[:2])
    reader.add([])
    check(reader, histories[:2])
    store.add(histories)
    entries = listed(store)
    assert len(entries) == 5
    assert sum(entry["items"] for entry in entries) == len(store) == 200
    assert all(a["last"] < b["first"] for a, b in itertools.pairwise(entries))
    check(store, histories)
    check(reader, histories)  # which had the shards open that are gone


def test_merging_keeps_the_newest_of_a_user_but_all_that_the_job_reads(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(history, "NEWEST", 6)
    store = HistoryStore(tmp_path, FakeEncoder(), newest=3)
    for n in range(6):
        assert store.add([("u", [f"{n} {k}" for k in range(2)]), ("v", ["same"])]) == 2 + (n == 0)
    assert len(listed(store)) == 2  # merged before the sixth was added
    check(store, [("u", [f"{n} {k}" for n in range(2, 6) for k in range(2)]), ("v", ["same"])])
    with pytest.raises(KeyError):
        store.vectors(History.of("u", ["1 1"]))
    long = [("u", [f"long {k}" for k in range(60)])]
    assert store.add(long) == 60
    assert len(listed(store)) == 1
    check(store, long)


def test_what_has_a_wrong_checksum_is_not_merged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    store = HistoryStore(tmp_path, FakeEncoder())
    for texts in (TEXTS[:6], TEXTS):
        store.add([("u", texts)])
    path = store.directory / listed(store)[0]["name"] / "vectors.npy"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    store._merge(0, None)
    assert f"{path.parent} is damaged: it is encoded again" in capsys.readouterr().out
    assert store.add([("u", TEXTS)]) == 6
    check(store, [("u", TEXTS)])


def test_of_two_that_merge_one_does(tmp_path: Path, small: None):
    store = HistoryStore(tmp_path, FakeEncoder())
    for text in TEXTS[:4]:
        store.add([("u", [text])])
    old = listed(store)
    other = HistoryStore(tmp_path, FakeEncoder())
    other._merge(2, None)
    merged = listed(other)
    assert len(merged) == 1
    late = shards.write(store.directory, 6, [(1, np.array([2]), np.ones((1, 6)))])
    store._replace(old, [late])
    assert listed(store) == merged
    with other._merging:
        store._merge(0, None)
    assert listed(store) == merged
    check(store, [("u", TEXTS[:4])])


# Processes


def fill(directory: Path, first: int, last: int) -> Fork:
    return Fork("tests.support.filling", str(directory), str(first), str(last))


def filled(first: int, last: int) -> list[tuple[str, list[str]]]:
    """What `fill` adds."""
    return [(f"user {i // 10}", [f"text {i}"]) for i in range(first, last)]


@pytest.mark.slow
def test_two_processes_fill_one_store(tmp_path: Path):
    for process in [fill(tmp_path, 0, 200), fill(tmp_path, 190, 390)]:
        said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    store = HistoryStore(tmp_path, FakeEncoder())
    assert 390 <= len(store) <= 400
    listed(store)
    check(store, filled(0, 390))


@pytest.mark.slow
def test_a_killed_process_leaves_no_lock_and_no_wrong_vector(tmp_path: Path):
    killed, other = fill(tmp_path, 0, 400), fill(tmp_path, 100, 200)
    while not any(tmp_path.glob("*/manifest.json")):
        assert killed.poll() is None
        time.sleep(0.001)
    killed.kill()
    said = other.communicate(timeout=120)
    assert other.returncode == 0, said
    store = HistoryStore(tmp_path, FakeEncoder())
    assert len(store) >= 100  # the other's, at least
    store.add(filled(0, 400))
    check(store, filled(0, 400))
