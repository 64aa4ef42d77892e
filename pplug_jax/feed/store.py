"""The history store: users' texts as vectors, computed once per encoder.

A store is a directory named after the encoder's fingerprint, so that vectors of another encoder are
never read. It is on a disk or in a bucket, and holds shards (`feed.shards`) and commits: files that
list the shards which a job added, and the commits that it merged into them. Neither is ever
changed, and what no commit lists is not read. So jobs may fill one store at once without a lock, a
reader needs none, and a killed job keeps all that it has listed.

The processes of a job that share a store divide the histories among them; a process whose store is
its own encodes all.
"""

import contextlib
import errno
import functools
import hashlib
import itertools
import json
import math
import re
import secrets
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import fsspec
import jax
import numpy as np
from filelock import FileLock, Timeout
from fsspec.implementations.local import LocalFileSystem

from pplug_jax.data.keys import text_keys
from pplug_jax.data.lamp import Subset
from pplug_jax.encoder import Encoder
from pplug_jax.errors import InputError
from pplug_jax.feed import shards
from pplug_jax.feed.shards import Entry, Shard
from pplug_jax.runtime.console import Progress, say
from pplug_jax.runtime.distributed import from_all, from_primary, wait_for_all
from pplug_jax.runtime.retry import retrying
from pplug_jax.storage.files import whole

CHUNK = 4096  # texts encoded at a time
SECONDS = 60  # of encoding, after which a shard is written
ITEMS = 1 << 20  # of a merged shard, about
COMMITS = 8  # of about the same size; more are merged
NEWEST = 512  # items of a user that merging keeps at least
OPEN = 128  # shards that are open at a time
COMMIT = re.compile(r"\d+-[0-9a-f]+\.json")  # a commit's name: `_new_name`
USERS = 1024  # asked for at a time
ABANDONED = 24 * 3600  # seconds after which what a job did not finish is taken for a dead one's

Histories = Sequence[tuple[str, Sequence[str]]]


class History(NamedTuple):
    """Some texts of a user, as every store knows them.

    Attributes:
        user: the user's key.
        texts: (n,) int64, the texts' keys.
    """

    user: int
    texts: np.ndarray

    @classmethod
    def of(cls, user: str, texts: Sequence[str]) -> Self:
        return cls(int(text_keys([user])[0]), text_keys(texts))


class Commit(NamedTuple):
    """What a job has done to a store.

    Attributes:
        shards: those that it added.
        replaces: the names of the commits whose shards these are instead of.
        newest: a user's items that the job reads, or another that has said so.
    """

    shards: Sequence[Entry]
    replaces: Sequence[str]
    newest: int


class HistoryStore:
    """Vectors of users' texts.

    Args:
        directory: holds the stores of all encoders; a path, or a URL that fsspec knows.
        encoder: makes the vectors.
        queries: encode the texts as inputs, for a plug that does not train Enc_inp.
        newest: a user's items that jobs read; if it is more than NEWEST, merging keeps so many, by
            whatever job.
        numbers: `float16` or `int8`, what vectors are kept in.

    Raises:
        InputError: nothing that is installed reads such a URL, the directory cannot be made, or a
            commit is not what a job wrote.
    """

    def __init__(
        self,
        directory: str | Path,
        encoder: Encoder,
        queries: bool = False,
        newest: int = NEWEST,
        numbers: str = "float16",
    ):
        name = encoder.fingerprint
        if queries:
            prefix = hashlib.sha256(encoder.query_prefix.encode()).hexdigest()[:8]
            name += f"-queries-{prefix}"
        if numbers != "float16":
            name += f"-{numbers}"
        self.directory = f"{directory}/{name}"
        self.encoder, self.queries, self.newest = encoder, queries, max(newest, NEWEST)
        self._row = shards.row_dtype(numbers, encoder.size)
        try:
            self._files, self._root = fsspec.url_to_fs(self.directory)
        except (ImportError, ValueError) as error:
            raise InputError(f"config.data.history_store: {directory}: {error}") from error
        self._on_disk = isinstance(self._files, LocalFileSystem)
        try:
            self._files.makedirs(self._root, exist_ok=True)
        except OSError as error:
            if not self._files.isdir(self._root):  # else it may only be read
                raise InputError(f"config.data.history_store: {error}") from error
        self._shard = functools.lru_cache(OPEN)(
            lambda name: Shard(self._files, f"{self._root}/{name}", self._row)
        )
        self._commits: dict[str, Commit] = {}
        self._is_checked = False
        self._sharers = self._find_sharers() if jax.process_count() > 1 else [0]
        self._open()

    def _find_sharers(self) -> list[int]:
        """Return the numbers of the processes whose directory is this one, by marks they leave."""
        job = f"-of-job-{int(from_primary(np.int32(secrets.randbits(31))))}-process-"
        mine = f"{self._root}/{_new_name()}{job}{jax.process_index()}"
        self._files.touch(mine)
        wait_for_all("all have left a mark in the history store")
        marks = [name.partition(job)[2] for name in self._names() if job in name]
        wait_for_all("all have looked for marks")
        self._files.rm_file(mine)
        return sorted(map(int, marks))

    def _names(self) -> list[str]:
        self._files.invalidate_cache(self._root)
        return [path.rpartition("/")[2] for path in self._files.ls(self._root, detail=False)]

    def _read_commit(self, name: str) -> Commit:
        try:
            commit = json.loads(self._files.cat_file(f"{self._root}/{name}"))
            return Commit(
                [Entry(**entry) for entry in commit["shards"]], commit["replaces"], commit["newest"]
            )
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{self.directory}/{name}: this is not what a job wrote ({error}); delete it, and "
                "what it lists is encoded again"
            ) from error

    def _open(self) -> None:
        """Take up what was added since, by this job or another."""
        while True:
            names = sorted(filter(COMMIT.fullmatch, self._names()))
            try:
                commits = {
                    name: self._commits.get(name) or self._read_commit(name) for name in names
                }
            except FileNotFoundError:
                continue  # another job has merged it
            break
        replaced = {name for commit in commits.values() for name in commit.replaces}
        self._commits = {name: commits[name] for name in names if name not in replaced}
        self._shards = [entry for commit in self._commits.values() for entry in commit.shards]
        self._firsts, self._lasts = (
            np.array([getattr(entry, end) for entry in self._shards], np.int64)
            for end in ("first", "last")
        )

    def _said_to_be_read(self) -> int:
        """Return the most items of a user that a job has said it reads."""
        return max((commit.newest for commit in self._commits.values()), default=NEWEST)

    def __len__(self) -> int:
        """Count the users' items; some may be there twice before shards are merged."""
        return sum(entry.items for entry in self._shards)

    def _read(self, users: Sequence[int], parts: slice) -> list[list[list[bytes]]]:
        """Return each user's ranges in each shard that has some, oldest first.

        All are asked for at once, since a bucket is slow to answer.

        Args:
            users: the users' keys.
            parts: which of the ranges of `Shard.ranges` are read.
        """
        holders, ranges = [], []
        try:
            for place, user in enumerate(users):
                for i in np.flatnonzero((self._firsts <= user) & (user <= self._lasts)):
                    if of_user := self._shard(self._shards[i].name).ranges(user):
                        holders.append(place)
                        ranges += of_user[parts]
            columns = map(list, zip(*ranges, strict=True)) if ranges else ([], [], [])
            content = self._get(*columns)
        except FileNotFoundError:
            before = self._shards
            self._open()
            if self._shards == before:
                raise
            return self._read(users, parts)  # another job has merged them
        found: list[list[list[bytes]]] = [[] for _ in users]
        for place in holders:
            found[place].append(list(itertools.islice(content, len(ranges) // len(holders))))
        return found

    def _get(self, *ranges: list[Any]) -> Iterator[bytes]:
        """Return what is in the ranges: the files' paths, where they begin and where they end."""

        def get() -> list[bytes]:
            content = self._files.cat_ranges(*ranges)
            for error in content:  # fsspec of 2025 could not raise it
                if isinstance(error, Exception):
                    raise error
            return content

        return iter(retrying(f"reading {self.directory}", get))

    def read(self, histories: Sequence[History]) -> list[np.ndarray]:
        """Return the vectors of each history's texts, (n, E) float32.

        Raises:
            KeyError: a text was never added for its user.
        """
        found = self._read([history.user for history in histories], slice(2))
        return [self._chosen(*x) for x in zip(histories, found, strict=True)]

    def _chosen(self, history: History, found: list[list[bytes]]) -> np.ndarray:
        texts, rows = (b"".join(part) for part in zip(*found, strict=True)) if found else (b"", b"")
        places = {text: i for i, text in enumerate(np.frombuffer(texts, shards.TEXT).tolist())}
        asked = [places[text] for text in history.texts.tolist()]
        return shards.unpack(np.frombuffer(rows, self._row)[asked])

    def vectors(self, history: History) -> np.ndarray:
        """Return what `read` does, for one history."""
        return self.read([history])[0]

    def add(self, histories: Iterable[tuple[str, Sequence[str]]], batch_size: int = 64) -> int:
        """Encode the texts that the store lacks, with a progress bar, and return their number.

        All processes must bring the same texts, of which each reads its share. A process encodes a
        text of several users once.

        Args:
            histories: users and their texts, oldest first; what is no sequence is held in memory,
                of a sequence's texts 9 bytes are.
            batch_size: texts that are encoded at once.
        """
        if not isinstance(histories, Sequence):
            histories = list(histories)
        place, count = self._sharers.index(jax.process_index()), len(self._sharers)
        first, end = (len(histories) * i // count for i in (place, place + 1))
        mine = Subset(histories, range(first, end))
        self._tidy()
        is_new, new = self._lacking(mine)
        try:
            if len(new):
                what = "inputs" if self.queries else "histories"
                with Progress(f"encoding {what}", len(new), "texts") as progress:
                    encode = lambda texts: self.encoder.encode(
                        texts, batch_size, progress.advance, queries=self.queries
                    )
                    self._encode(itertools.compress(_items(mine), is_new), new, encode)
            encoded = from_all(np.int32(len(new)))
            self._tidy()
        finally:
            self._open()
        return int(encoded[self._sharers].sum())

    def trim(self) -> None:
        """Merge more than a job does as it adds, and keep of each user what is read alone.

        Call it on all processes of a job before any adds something.
        """
        if self.newest > self._said_to_be_read():
            self._commit([])  # says so
        self._tidy(COMMITS // 2, trims=True)
        wait_for_all("the history store is trimmed")

    def _lacking(self, histories: Histories) -> tuple[np.ndarray, np.ndarray]:
        """Return which of the texts the store lacks, bool, and their keys, sorted, each once."""
        keys, lacking = [np.zeros(0, np.int64)], [np.zeros(0, bool)]
        asked = (History.of(*history) for history in histories)
        while some := list(itertools.islice(asked, USERS)):
            read = self._read([history.user for history in some], slice(1))
            for history, found in zip(some, read, strict=True):
                known = np.frombuffer(b"".join(itertools.chain(*found)), shards.TEXT)
                keys.append(history.texts)
                lacking.append(~np.isin(history.texts, known))
        is_new = np.concatenate(lacking)
        return is_new, np.unique(np.concatenate(keys)[is_new])

    def _encode(
        self,
        items: Iterator[tuple[int, int, str]],
        new: np.ndarray,
        encode: Callable[[list[str]], np.ndarray],
    ) -> None:
        """Encode texts, each once, and write them for all their users.

        Args:
            items: what the store lacks: user, key and text.
            new: the keys, sorted, each once.
            encode: returns the vectors of texts.
        """
        row_of, count = np.full(len(new), -1), 0  # the texts' places in `made`
        waiting: list[np.ndarray] = []  # users and texts of what is encoded
        with tempfile.TemporaryFile(dir=self._root if self._on_disk else None) as file:
            made = np.memmap(file, self._row, "w+", shape=len(new))

            def write() -> None:
                if waiting:
                    rows = (
                        (user, texts, made[row_of[np.searchsorted(new, texts)]])
                        for user, texts in _by_user(np.concatenate(waiting, axis=1))
                    )
                    self._commit([self._write(rows)])
                    waiting.clear()
                    self._tidy()

            start = time.monotonic()
            try:
                while chunk := list(itertools.islice(items, CHUNK)):
                    users, keys, texts = zip(*chunk, strict=True)
                    places = np.searchsorted(new, keys)
                    lacking = dict(itertools.compress(zip(places, texts), row_of[places] < 0))
                    if lacking:
                        vectors = encode(list(lacking.values()))
                        row_of[list(lacking)] = rows = np.arange(count, count + len(lacking))
                        count += len(rows)
                        made[rows] = shards.pack(vectors, self._row)
                    waiting.append(np.array([users, keys]))
                    if time.monotonic() - start > SECONDS:
                        write()
                        start = time.monotonic()
            finally:
                write()

    @contextlib.contextmanager
    def _placed(self, name: str) -> Iterator[Path]:
        """Yield where to write a file or directory that becomes `name` of the store."""
        if self._on_disk:
            with whole(Path(self._root, name)) as made:
                yield made
            return
        with tempfile.TemporaryDirectory() as scratch:
            made = Path(scratch, name)
            yield made
            for path in [made, *made.rglob("*")]:
                if path.is_file():
                    target = f"{self._root}/{path.relative_to(scratch)}"
                    put = functools.partial(self._files.put_file, str(path), target)
                    self._files.makedirs(target.rpartition("/")[0], exist_ok=True)
                    retrying(f"writing {target}", put)

    def _write(self, users: Iterable[tuple[int, np.ndarray, np.ndarray]]) -> Entry:
        """Write a shard, which nobody reads before a commit lists it."""
        with self._placed(_new_name()) as made:
            made.mkdir()
            return shards.write(made, self._row, users)

    def _commit(self, added: Sequence[Entry], replaced: Sequence[str] = ()) -> None:
        """List shards, instead of those of the replaced commits, which are deleted."""
        with self._placed(f"{_new_name()}.json") as made:
            entries = [entry._asdict() for entry in added]
            newest = max(self.newest, self._said_to_be_read())
            commit = Commit(entries, replaced, newest)  # type: ignore[arg-type]  # JSON
            made.write_text(json.dumps(commit._asdict(), indent=1))
        kept = {entry.name for entry in added}
        for name in replaced:
            gone = {entry.name for entry in self._commits[name].shards} - kept
            for path in (name, *gone):
                with contextlib.suppress(FileNotFoundError):
                    self._files.rm(f"{self._root}/{path}", recursive=True)

    def _tidy(self, most: int = COMMITS, trims: bool = False) -> None:
        """Merge commits where more than `most` are of about the same size.

        So an item is merged a few times, however many come after it. The first time also deletes
        what is damaged, and what killed jobs left.

        Args:
            most: the number of commits.
            trims: keep the newest items of a user alone, as many as jobs read.
        """
        self._open()
        # Another does it, nobody may, or what is read has just been merged by another.
        with contextlib.suppress(Timeout, PermissionError, FileNotFoundError), self._merging():
            self._open()
            if not self._is_checked:
                self._drop_damaged()
                self._is_checked = True
            while names := next((x for x in self._by_size() if len(x) > most), None):
                self._merge(names, self._said_to_be_read() if trims else None)

    @contextlib.contextmanager
    def _merging(self) -> Iterator[None]:
        """Let one job at a time merge; if two do all the same, items are there twice for a time.

        Raises:
            Timeout: another job merges.
        """
        path = f"{self._root}/merging"
        if self._on_disk:
            lock = FileLock(path)
            try:
                lock.acquire(timeout=0)
            except OSError as error:
                if error.errno == errno.EROFS:
                    raise PermissionError(*error.args) from error
                raise
            try:
                yield
            finally:
                lock.release()
            return
        now = time.time()
        try:
            self._files.pipe_file(path, str(now).encode(), mode="create")
        except FileExistsError as error:
            if now - float(self._files.cat_file(path)) < ABANDONED:
                raise Timeout(path) from error
        try:
            yield
        finally:
            self._files.rm_file(path)

    def _by_size(self) -> Iterable[list[str]]:
        """Return the names of commits, those together whose items are as many to a factor of 8."""
        levels: dict[int, list[str]] = defaultdict(list)
        for name, commit in self._commits.items():
            items = sum(entry.items for entry in commit.shards)
            levels[int(math.log(max(items, 1), COMMITS))].append(name)
        return levels.values()

    def _drop_damaged(self) -> None:
        """List no shards whose files have another size than was written; delete unlisted ones.

        Raises:
            OSError: the directory cannot be listed.
        """
        before, sizes = self._commits.keys(), self._sizes()
        self._open()
        for name in before & self._commits.keys():  # what was there all the time
            commit = self._commits[name]
            intact = [entry for entry in commit.shards if sizes.get(entry.name) == entry.bytes]
            for entry in commit.shards:
                if entry not in intact:
                    self._warn(entry)
            if len(intact) < len(commit.shards):
                self._commit(intact, [name])
        self._open()
        listed = {entry.name for entry in self._shards}
        for name in sizes.keys() - listed - self._commits.keys():
            began = name.partition("-")[0]
            if began.isdigit() and time.time() - int(began) / 1e9 > ABANDONED:
                self._files.rm(f"{self._root}/{name}", recursive=True)

    def _sizes(self) -> dict[str, int]:
        """Return the bytes of each thing in the directory."""
        if self._on_disk:  # fsspec would take what cannot be listed for empty
            return {
                path.name: sum(
                    part.stat().st_size for part in (path.iterdir() if path.is_dir() else ())
                )
                for path in Path(self._root).iterdir()
            }
        sizes: Counter[str] = Counter()
        for path, about in self._files.find(self._root, detail=True).items():
            sizes[path.removeprefix(self._root).lstrip("/").partition("/")[0]] += about["size"]
        return sizes

    def _warn(self, entry: Entry) -> None:
        say(f"warning: {self.directory}/{entry.name} is damaged: it is encoded again")

    def _merge(self, names: Sequence[str], newest: int | None = None) -> None:
        """Merge commits into one, each of whose shards has other users.

        Args:
            names: the commits'.
            newest: the number of a user's items that are kept; None keeps all.
        """
        with contextlib.ExitStack() as stack:
            opened = [
                shard
                for name in names
                for entry in self._commits[name].shards
                if (shard := self._copied(entry, stack))
            ]
            count = sum(len(shard) for shard in opened)
            parts = -(-count // ITEMS)
            edges = [i * (1 << 64) // max(parts, 1) - (1 << 63) for i in range(parts + 1)]
            new = []
            for low, high in itertools.pairwise(edges):
                users = (s.users[(low <= s.users) & (s.users < high)].tolist() for s in opened)
                keys = sorted(set().union(*users))
                if keys:
                    new.append(self._write((key, *_merged(opened, key, newest)) for key in keys))
            self._commit(new, names)
        self._open()

    def _copied(self, entry: Entry, stack: contextlib.ExitStack) -> Shard | None:
        """Return the shard on a disk, until the stack ends; None if it is damaged."""
        path = f"{self._root}/{entry.name}"
        if not self._on_disk:
            scratch = stack.enter_context(tempfile.TemporaryDirectory())
            for name in shards.FILES:
                self._files.get_file(f"{path}/{name}", f"{scratch}/{name}")
            path = scratch
        if shards.digest(Path(path)) != entry.digest:
            self._warn(entry)
            return None
        return Shard(fsspec.filesystem("file"), path, self._row)


def _new_name() -> str:
    """Return a name that no other has, and that is behind those of before."""
    return f"{time.time_ns():019d}-{secrets.token_hex(4)}"


def _items(histories: Histories) -> Iterator[tuple[int, int, str]]:
    """Yield the user's key, the text's key and the text of each item."""
    for name, texts in histories:
        history = History.of(name, texts)
        for key, text in zip(history.texts.tolist(), texts, strict=True):
            yield history.user, key, text


def _by_user(items: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the users in order, each with the texts, of items (2, n): their users and texts."""
    users, texts = items[:, np.argsort(items[0], kind="stable")]
    keys, starts = np.unique(users, return_index=True)
    for user, of_user in zip(keys.tolist(), np.split(texts, starts[1:]), strict=True):
        yield user, of_user[_newest(of_user)]


def _newest(texts: np.ndarray, most: int | None = None) -> np.ndarray:
    """Return the places of the `most` newest of a user's texts, each where it is last."""
    _, behind = np.unique(texts[::-1], return_index=True)
    return np.sort(len(texts) - 1 - behind)[-most if most else None :]


def _merged(
    opened: Sequence[Shard], user: int, newest: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the user's texts and rows in these shards together."""
    texts, rows = map(np.concatenate, zip(*(shard.read(user) for shard in opened), strict=True))
    kept = _newest(texts, newest)
    return texts[kept], rows[kept]
