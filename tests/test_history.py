"""The history store: texts once a job, whatever happens to the processes that fill it."""

import contextlib
import errno
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from filelock import Timeout

from pplug_jax.errors import InputError
from pplug_jax.feed import shards
from pplug_jax.feed import store as history
from pplug_jax.feed.shards import Entry, Shard
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
    """What the commits list, of whose shards all are whole, and no others there."""
    files, root = fsspec.url_to_fs(store.directory)
    names = [path.rpartition("/")[2] for path in files.ls(root, detail=False)]
    commits = [json.loads(files.cat(f"{root}/{x}")) for x in sorted(names) if x.endswith(".json")]
    found = [shard for commit in commits for shard in commit["shards"]]
    for shard in found:
        assert store._copied(Entry(**shard), contextlib.ExitStack())
    assert {name for name in names if files.isdir(f"{root}/{name}")} == {x["name"] for x in found}
    return found


def opened(store: HistoryStore, entry: dict) -> Shard:
    files, root = fsspec.url_to_fs(store.directory)
    return Shard(files, f"{root}/{entry['name']}", shards.row_dtype("float16", 6))


@pytest.fixture(params=["disk", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where stores are kept."""
    return str(tmp_path) if request.param == "disk" else f"memory://bucket{tmp_path}"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small chunks, each of which becomes a shard."""
    monkeypatch.setattr(history, "CHUNK", 4)
    monkeypatch.setattr(history, "SECONDS", -1)


def test_a_text_of_several_users_is_encoded_once(place: str):
    encoder = FakeEncoder()
    store = HistoryStore(place, encoder)
    assert store.add(USERS + [("user 0", TEXTS[::-1])]) == 10
    assert sorted(encoder.encoded) == sorted(TEXTS)
    assert len(store) == 7 * 4 + 6
    check(store, [*USERS, ("user 0", TEXTS[3:] + TEXTS[:5])])


def test_a_text_is_encoded_once_though_its_users_are_in_different_shards(place: str, small: None):
    encoder = FakeEncoder()
    store = HistoryStore(place, encoder)
    assert store.add(iter(USERS)) == 10
    assert sorted(encoder.encoded) == sorted(TEXTS)
    assert len(listed(store)) == 7
    check(store, USERS)


def test_a_users_items_are_one_range_in_their_order(place: str):
    store = HistoryStore(place, FakeEncoder())
    store.add(USERS)
    (entry,) = listed(store)
    shard = opened(store, entry)
    for user, texts in USERS:
        expected = History.of(user, texts)
        assert shard.read(expected.user)[0].tolist() == expected.texts.tolist()
    for user in (entry["first"] - 1, entry["last"] + 1):
        assert [len(part) for part in shard.read(user)] == [0, 0]
    keys = sorted(History.of(user, ()).user for user, _ in USERS)
    assert (entry["first"], entry["last"], entry["items"]) == (keys[0], keys[-1], 28)
    assert shard.users.tolist() == keys


def test_what_is_there_is_not_encoded_again(place: str):
    HistoryStore(place, FakeEncoder()).add([("u", TEXTS[:6])])
    encoder = FakeEncoder()
    store = HistoryStore(place, encoder)
    assert store.add([("u", TEXTS[:6])]) == 0
    assert encoder.calls == 0
    assert store.add([("u", TEXTS)]) == 4
    assert sorted(encoder.encoded) == sorted(TEXTS[6:])
    check(store, [("u", TEXTS), ("u", TEXTS[::-1]), ("u", TEXTS[4:7])])


def test_encoders_do_not_share_vectors(place: str):
    first = HistoryStore(place, FakeEncoder("a"))
    first.add(USERS)
    second = HistoryStore(place, FakeEncoder("b"))
    assert first.directory != second.directory
    assert len(second) == 0
    assert second.add(USERS) == 10
    check(first, USERS)
    check(second, USERS)


def test_the_order_of_adding_does_not_matter(place: str):
    one, other = (HistoryStore(f"{place}/{name}", FakeEncoder()) for name in "ab")
    one.add([("u", TEXTS)])
    for text in TEXTS[::-1]:
        other.add([("u", [text])])
    asked = History.of("u", TEXTS)
    np.testing.assert_array_equal(one.vectors(asked), other.vectors(asked))


def test_texts_and_users_are_told_apart_exactly(place: str):
    store = HistoryStore(place, FakeEncoder())
    names = ["", " ", "a", "A", "a ", "ä", "a\u0308", "😀", "a\0"]
    histories = [(user, [user + text for text in names]) for user in names]
    assert store.add(histories) == len({text for _, texts in histories for text in texts})
    check(store, histories)


def test_no_texts(place: str):
    store = HistoryStore(place, FakeEncoder())
    assert store.add([]) == store.add([("u", [])]) == 0
    assert store.vectors(History.of("u", [])).shape == (0, 6)
    store.add(USERS)
    assert store.vectors(History.of("u", [])).shape == (0, 6)


@pytest.mark.parametrize(("user", "text"), [("user 0", "never added"), ("nobody", TEXTS[0])])
def test_what_was_never_added_is_a_key_error(place: str, user: str, text: str):
    store = HistoryStore(place, FakeEncoder())
    store.add(USERS)
    with pytest.raises(KeyError):
        store.vectors(History.of(user, [text]))


@pytest.mark.parametrize("name", ["index.npy", "texts.npy", "vectors.npy", ""])
def test_a_damaged_shard_is_encoded_again(
    place: str, name: str, capsys: pytest.CaptureFixture[str]
):
    store = HistoryStore(place, FakeEncoder())
    store.add(USERS[:3])
    store.add(USERS)
    files, root = fsspec.url_to_fs(store.directory)
    path = f"{root}/{listed(store)[0]['name']}/{name}"
    files.pipe_file(path, files.cat_file(path)[:-1]) if name else files.rm(path, recursive=True)
    store = HistoryStore(place, FakeEncoder())
    assert store.add(USERS) == 6
    assert "is damaged: it is encoded again" in capsys.readouterr().out
    listed(store)
    check(store, USERS)


@pytest.mark.parametrize("same_store", [True, False])
def test_an_interrupted_run_keeps_what_it_had(place: str, same_store: bool):
    store = HistoryStore(place, FakeEncoder(dies_at=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(history, "CHUNK", 4)
        with pytest.raises(KeyboardInterrupt):
            store.add([("u", TEXTS)])
    if not same_store:
        store = HistoryStore(place, FakeEncoder())
    assert len(store) == 4
    check(store, [("u", TEXTS[:4])])
    assert store.add([("u", TEXTS)]) == 6
    assert len(listed(store)) == 2
    check(store, [("u", TEXTS)])


# Merging


def test_commits_of_a_size_are_merged(place: str, small: None, monkeypatch: pytest.MonkeyPatch):
    written = []
    write = shards.write
    monkeypatch.setattr(shards, "write", lambda *x: written.append(about := write(*x)) or about)
    store = HistoryStore(place, FakeEncoder())
    histories = [(f"user {i}", [f"{i} {k}" for k in range(5)]) for i in range(80)]
    reader = HistoryStore(place, FakeEncoder())
    store.add(histories[:2])
    reader.add([])
    check(reader, histories[:2])
    store.add(histories)
    assert sum(entry["items"] for entry in listed(store)) == len(store) == 400
    assert all(len(names) <= 8 for names in store._by_size())
    # Of 4 items at first, then of about 36, and of 324.
    assert sum(entry.items for entry in written) <= 3 * 400
    check(store, histories)
    check(reader, histories)  # which had the shards open that are gone


def test_a_merged_shard_has_users_of_its_own(
    place: str, small: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(history, "ITEMS", 40)
    store = HistoryStore(place, FakeEncoder())
    histories = [(f"user {i}", [f"{i} {k}" for k in range(5)]) for i in range(40)]
    store.add(histories)
    store._merge(list(store._commits))
    entries = listed(store)
    assert len(entries) == 5
    assert sum(entry["items"] for entry in entries) == len(store) == 200
    assert all(a["last"] < b["first"] for a, b in itertools.pairwise(entries))
    check(store, histories)


def test_merging_keeps_the_newest_of_a_user_but_all_that_the_job_reads(
    place: str, small: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(history, "NEWEST", 6)
    store = HistoryStore(place, FakeEncoder(), newest=3)
    for n in range(6):
        store.trim()
        assert store.add([("u", [f"{n} {k}" for k in range(2)]), ("v", ["same"])]) == 2 + (n == 0)
    assert len(listed(store)) == 2  # merged before the sixth was added
    check(store, [("u", [f"{n} {k}" for n in range(2, 6) for k in range(2)]), ("v", ["same"])])
    with pytest.raises(KeyError):
        store.vectors(History.of("u", ["1 1"]))
    long = [("u", [f"long {k}" for k in range(60)])]
    assert store.add(long) == 60
    check(store, long)


def test_merging_keeps_what_another_job_reads(
    place: str, small: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(history, "NEWEST", 2)
    reader = HistoryStore(place, FakeEncoder(), newest=9)
    reader.trim()
    reader.add([("u", TEXTS[:9])])
    reader._merge(list(reader._commits))
    for n in range(7):
        other = HistoryStore(place, FakeEncoder(), newest=3)
        other.trim()
        assert other.add([("u", [f"new {n}"])]) == 1
    check(reader, [("u", TEXTS[:9])])
    other = HistoryStore(f"{place}/other", FakeEncoder(), newest=3)
    other.add([("u", TEXTS[:9])])
    HistoryStore(f"{place}/other", FakeEncoder(), newest=9).trim()
    other._open()
    other._merge(list(other._commits), other._said_to_be_read())
    check(other, [("u", TEXTS[:9])])  # the second has only said that it reads them


def test_what_has_a_wrong_checksum_is_not_merged(place: str, capsys: pytest.CaptureFixture[str]):
    store = HistoryStore(place, FakeEncoder())
    for texts in (TEXTS[:6], TEXTS):
        store.add([("u", texts)])
    files, root = fsspec.url_to_fs(store.directory)
    name = listed(store)[0]["name"]
    path = f"{root}/{name}/vectors.npy"
    content = files.cat_file(path)
    files.pipe_file(path, content[:-1] + bytes([content[-1] ^ 1]))
    store._merge(list(store._commits))
    assert f"/{name} is damaged: it is encoded again" in capsys.readouterr().out
    assert store.add([("u", TEXTS)]) == 6
    check(store, [("u", TEXTS)])


@pytest.mark.parametrize(("before", "items"), [("_copied", 4), ("_commit", 8)])
def test_two_merge_the_same(
    place: str, small: None, monkeypatch: pytest.MonkeyPatch, before: str, items: int
):
    """As jobs in a bucket may: one is done just before the other reads, or lists, the shards."""
    store, other = (HistoryStore(place, FakeEncoder()) for _ in range(2))
    for text in TEXTS[:4]:
        store.add([("u", [text])])
    step = getattr(other, before)

    def late(*given: object) -> object:
        if len(store._commits) == 4:
            store._merge(list(store._commits))
        return step(*given)

    monkeypatch.setattr(other, before, late)
    other._tidy(2)
    assert len(store._commits) == 1
    other = HistoryStore(place, FakeEncoder())
    assert len(other) == items
    check(other, [("u", TEXTS[:4])])
    other._merge(list(other._commits))
    assert len(other) == 4
    check(other, [("u", TEXTS[:4])])


def test_one_merges_at_a_time(place: str, small: None, monkeypatch: pytest.MonkeyPatch):
    store, other = (HistoryStore(place, FakeEncoder()) for _ in range(2))
    for text in TEXTS[:4]:
        store.add([("u", [text])])
    with store._merging():
        other._tidy(2)
        assert len(other._commits) == 4
    other._tidy(2)
    assert len(other._commits) == 1


def test_in_a_bucket_a_dead_job_does_not_merge_for_ever(monkeypatch: pytest.MonkeyPatch):
    store = HistoryStore("memory://bucket/dead", FakeEncoder())
    store._files.pipe_file(f"{store._root}/merging", str(time.time()).encode())
    with pytest.raises(Timeout), store._merging():
        pass
    now = time.time()
    monkeypatch.setattr(history.time, "time", lambda: now + 25 * 3600)
    with store._merging():
        pass


def test_what_cannot_be_listed_is_not_taken_for_damaged(tmp_path: Path):
    HistoryStore(tmp_path, FakeEncoder()).add(USERS)
    store = HistoryStore(tmp_path, FakeEncoder())
    iterdir, unreadable = Path.iterdir, store._shards[0].name

    def refused(path: Path) -> Any:
        if path.name == unreadable:
            raise OSError(errno.EIO, "Input/output error")
        return iterdir(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "iterdir", refused)
        with pytest.raises(OSError, match="Input/output error"):
            store.add(USERS)
    check(HistoryStore(tmp_path, FakeEncoder()), USERS)


def test_a_read_only_store_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    HistoryStore(tmp_path, FakeEncoder()).add(USERS)

    def acquire(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(history.FileLock, "acquire", acquire)
    store = HistoryStore(tmp_path, FakeEncoder())
    store.trim()
    assert store.add(USERS) == 0
    check(store, USERS)


def test_a_reader_whose_shard_is_gone_looks_again_though_fsspec_only_returns_that(
    place: str, small: None, monkeypatch: pytest.MonkeyPatch
):
    """As its ranges of files did until 2025, whatever `on_error` says."""
    store = HistoryStore(place, FakeEncoder())
    store.add(USERS)
    reader = HistoryStore(place, FakeEncoder())
    check(reader, USERS)
    read = reader._files.cat_ranges
    as_before = lambda *ranges, **_: read(*ranges, on_error="return")
    monkeypatch.setattr(reader._files, "cat_ranges", as_before, raising=False)
    store._merge(list(store._commits))
    check(reader, USERS)


def test_a_damaged_index(place: str):
    store = HistoryStore(place, FakeEncoder())
    store.add(USERS)
    files, root = fsspec.url_to_fs(store.directory)
    path = f"{root}/{listed(store)[0]['name']}/index.npy"
    files.pipe_file(path, b"0" * 10 + files.cat_file(path)[10:])
    with pytest.raises(InputError, match=r"index\.npy is damaged .*: delete .*, and it is encoded"):
        check(HistoryStore(place, FakeEncoder()), USERS)


def test_what_is_written_as_a_job_is_stopped_is_written_once(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
):
    store = HistoryStore(tmp_path, FakeEncoder())
    tidy, calls = store._tidy, itertools.count()

    def stopped(*given: Any) -> None:
        if next(calls) == 1:
            raise KeyboardInterrupt
        tidy(*given)

    monkeypatch.setattr(store, "_tidy", stopped)
    with pytest.raises(KeyboardInterrupt):
        store.add(USERS)
    assert len(store) == 4


def test_a_directory_as_a_url(tmp_path: Path):
    HistoryStore(f"file://{tmp_path}/a b", FakeEncoder()).add(USERS)
    store = HistoryStore(tmp_path / "a b", FakeEncoder())
    assert store.add(USERS) == 0
    check(store, USERS)


def test_a_file_where_the_directory_should_be(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"^config\.data\.history_store: .*file"):
        HistoryStore(tmp_path / "file", FakeEncoder())


def test_what_killed_jobs_left_is_deleted_in_time(place: str, monkeypatch: pytest.MonkeyPatch):
    store = HistoryStore(place, FakeEncoder())
    store.add(USERS)
    left = shards.pack(np.ones((2, 6)), shards.row_dtype("float16", 6))
    store._write([(1, np.array([1, 2]), left)])
    with store._placed("other") as made:
        made.write_text("")
    with pytest.raises(AssertionError):
        listed(store)
    for later, is_left in ((3600, True), (25 * 3600, False)):
        clock = time.time() + later
        monkeypatch.setattr(history.time, "time", lambda clock=clock: clock)
        store = HistoryStore(place, FakeEncoder())
        store.add([])
        assert len([name for name in store._names() if name[0].isdigit()]) == 2 + is_left
    assert "other" in store._names()
    check(store, USERS)


def test_a_commit_that_no_job_wrote(place: str):
    store = HistoryStore(place, FakeEncoder())
    store.add(USERS)
    files, root = fsspec.url_to_fs(store.directory)
    (path,) = files.glob(f"{root}/*.json")
    for content in (files.cat_file(path)[:-2], b"{}", b"null", b'{"shards": [{}], "replaces": []}'):
        files.pipe_file(path, content)
        with pytest.raises(
            InputError, match=r"\.json: this is not what a job wrote .* delete it, "
        ):
            HistoryStore(place, FakeEncoder())


@pytest.mark.parametrize("url", ["gs://bucket/history", "nothing://there"])
def test_a_url_that_nothing_reads(url: str):
    problem = "[Ii]nstall gcsfs|Protocol not known"
    with pytest.raises(InputError, match=f"config.data.history_store: {url}: .*({problem})"):
        HistoryStore(url, FakeEncoder())


def test_int8(place: str):
    store, halves = (HistoryStore(place, FakeEncoder(), numbers=x) for x in ("int8", "float16"))
    histories = [*USERS, ("v", TEXTS)]
    store.add(histories)
    halves.add(histories)
    assert store.directory != halves.directory
    store._merge(list(store._commits))
    assert len(listed(store)) == 1
    for user, texts in histories:
        expected = np.array([store.encoder.vector(text) for text in texts])
        step = np.abs(expected).max(axis=1, keepdims=True) / 127
        assert np.all(np.abs(store.vectors(History.of(user, texts)) - expected) <= step * 0.501)
    rows = shards.pack(np.zeros((1, 6), np.float32), shards.row_dtype("int8", 6))
    assert rows.nbytes == 10
    np.testing.assert_array_equal(shards.unpack(rows), np.zeros((1, 6)))


# Processes


class Watched(list):
    """Remembers what was asked for."""

    def __getitem__(self, i):
        self.asked.add(i)
        return super().__getitem__(i)


def test_processes_that_share_a_store_divide_the_histories(
    place: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(history, "from_all", lambda value: np.array([value] * 4))
    shares = []
    for process in (1, 3):
        monkeypatch.setattr(history.jax, "process_index", lambda process=process: process)
        store = HistoryStore(place, FakeEncoder())
        store._sharers = [1, 3]
        users = Watched(USERS)
        users.asked = set()
        store.add(users)
        shares.append(users.asked)
    assert shares == [{0, 1, 2}, {3, 4, 5, 6}]
    check(store, USERS)


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
    while not any(tmp_path.glob("*/*.json")):
        assert killed.poll() is None
        time.sleep(0.001)
    killed.kill()
    said = other.communicate(timeout=120)
    assert other.returncode == 0, said
    store = HistoryStore(tmp_path, FakeEncoder())
    assert len(store) >= 100  # the other's, at least
    store.add(filled(0, 400))
    check(store, filled(0, 400))
