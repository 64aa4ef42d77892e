"""The history store: users' texts as vectors on disk, computed once per encoder.

A store is a directory named after the encoder's fingerprint, so that vectors of another encoder are
never read. It holds shards (`feed.shards`), and a manifest that names those that count, the newest
last. A job appends shards, and where many overlap, it merges them into new ones, each of a range of
users. A shard is never changed, and the manifest is replaced under a lock. So several jobs may fill
one store at once, a reader needs no lock, and a killed job keeps all but its last minute.

If a job has several processes, either each has a store on its disk, or all share one, which the
first process writes.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import jax
import numpy as np
from filelock import FileLock, Timeout

from pplug_jax.data.keys import text_keys
from pplug_jax.encoder import Encoder
from pplug_jax.feed import shards
from pplug_jax.feed.shards import Shard
from pplug_jax.runtime.console import Progress, say
from pplug_jax.runtime.distributed import from_primary, on_any, wait_for_all
from pplug_jax.runtime.primary import is_primary
from pplug_jax.storage.files import whole

CHUNK = 4096  # texts encoded at a time
SECONDS = 60  # of encoding, after which a shard is written
ITEMS = 1 << 20  # of a merged shard, about
OVERLAP = 8  # shards that may hold the same user when a job has encoded its texts
NEWEST = 512  # items of a user that merging keeps at least
OPEN = 128  # shards that are open at a time

T = TypeVar("T")
Histories = Iterable[tuple[str, Sequence[str]]]


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


class HistoryStore:
    """Vectors of users' texts.

    Args:
        directory: holds the stores of all encoders.
        encoder: makes the vectors.
        queries: encode the texts as inputs, for a plug that does not train Enc_inp.
        newest: a user's items that jobs read; if it is more than NEWEST, merging keeps so many.
    """

    def __init__(
        self,
        directory: str | Path,
        encoder: Encoder,
        queries: bool = False,
        newest: int = NEWEST,
    ):
        name = encoder.fingerprint
        if queries:
            prefix = hashlib.sha256(encoder.query_prefix.encode()).hexdigest()[:8]
            name += f"-queries-{prefix}"
        self.directory = Path(directory) / name
        self.encoder, self.queries, self.newest = encoder, queries, max(newest, NEWEST)
        with contextlib.suppress(OSError):  # a served plug may only read it
            self.directory.mkdir(parents=True, exist_ok=True)
        self._manifest = self.directory / "manifest.json"
        self._lock, self._merging = (FileLock(self.directory / x) for x in ("lock", "merging"))
        self._shard = functools.lru_cache(OPEN)(lambda name: Shard(self.directory / name))
        shared = jax.process_count() > 1 and self._is_shared()
        self._writes = is_primary() or not shared
        self._open()

    def _is_shared(self) -> bool:
        """Return whether this is also the first process' directory, in which that leaves a mark."""
        mark = self.directory / f"shared-{int(from_primary(np.int32(secrets.randbits(31))))}"
        if is_primary():
            mark.touch()
        wait_for_all("the history store is marked")
        is_marked = mark.is_file()
        wait_for_all("all have looked for the mark")
        if is_primary():
            mark.unlink()
        return is_marked

    def _listed(self) -> list[dict[str, Any]]:
        return json.loads(self._manifest.read_text()) if self._manifest.is_file() else []

    def _open(self) -> None:
        """Take up what was added since, by this job or another."""
        self._shards = self._listed()
        self._firsts, self._lasts = (
            np.array([shard[end] for shard in self._shards], np.int64) for end in ("first", "last")
        )

    def __len__(self) -> int:
        """Count the users' items; some may be there twice before shards are merged."""
        return sum(shard["items"] for shard in self._shards)

    def _of(self, user: int, read: Callable[[Shard, int], T]) -> list[T]:
        """Return what `read` returns of each shard that may hold the user, oldest first."""
        overlapping = np.flatnonzero((self._firsts <= user) & (user <= self._lasts))
        try:
            return [read(self._shard(self._shards[i]["name"]), user) for i in overlapping]
        except FileNotFoundError:
            before = self._shards
            self._open()
            if self._shards == before:
                raise
            return self._of(user, read)  # another job has merged them

    def vectors(self, history: History) -> np.ndarray:
        """Return the vectors of the texts, (n, E) float32.

        Raises:
            KeyError: one was never added for this user.
        """
        none = np.zeros(0, np.int64), np.zeros((0, self.encoder.size), np.float16)
        found = zip(none, *self._of(history.user, Shard.rows), strict=True)
        texts, vectors = map(np.concatenate, found)
        rows = {text: row for row, text in enumerate(texts.tolist())}
        return vectors[[rows[text] for text in history.texts.tolist()]].astype(np.float32)

    def add(self, histories: Histories, batch_size: int = 64) -> int:
        """Encode the texts that the store lacks, with a progress bar, and return their number.

        All processes must bring the same texts; together they encode what one of them lacks. A text
        of several users is encoded once.

        Args:
            histories: users and their texts, oldest first; iterated twice. Only an iterator's are
                held in memory, of others 9 bytes a text.
            batch_size: texts that are encoded at once.
        """
        if isinstance(histories, Iterator):
            histories = list(histories)
        if self._writes:
            self._intact("bytes", shards.size)
        self._merge(OVERLAP // 2, self.newest)
        keys, lacking = [np.zeros(0, np.int64)], [np.zeros(0, bool)]
        for name, texts in histories:
            user, asked = History.of(name, texts)
            known = {x for found in self._of(user, Shard.texts) for x in found.tolist()}
            keys.append(asked)
            lacking.append(np.array([text not in known for text in asked.tolist()], bool))
        is_new = on_any(np.concatenate(lacking))
        new = np.unique(np.concatenate(keys)[is_new])
        if not len(new):
            return 0
        what = "inputs" if self.queries else "histories"
        try:
            with Progress(f"encoding {what}", len(new), "texts") as progress:
                encode = lambda texts: self.encoder.encode(
                    texts, batch_size, progress.advance, queries=self.queries
                )
                self._encode(itertools.compress(_items(histories), is_new), new, encode)
            wait_for_all(f"the {what} are encoded")
            self._merge(OVERLAP, None)
        finally:
            self._open()
        return len(new)

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
        with tempfile.TemporaryFile(dir=self.directory) as file:
            made = np.memmap(file, np.float16, "w+", shape=(len(new), self.encoder.size))

            def write() -> None:
                if self._writes and waiting:
                    each = _by_user(np.concatenate(waiting, axis=1))
                    rows = (
                        (user, texts, made[row_of[np.searchsorted(new, texts)]])
                        for user, texts in each
                    )
                    self._replace([], [shards.write(self.directory, self.encoder.size, rows)])
                    self._merge(OPEN, None)
                waiting.clear()

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
                        if self._writes:
                            made[rows] = vectors
                    waiting.append(np.array([users, keys]))
                    if time.monotonic() - start > SECONDS:
                        write()
                        start = time.monotonic()
            finally:
                write()

    def _replace(self, old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> None:
        """List the new shards instead of the old ones, unless another job has replaced those."""
        with self._lock:
            gone = {shard["name"] for shard in old}
            listed = self._listed()
            kept = [shard for shard in listed if shard["name"] not in gone]
            if replaces := len(kept) + len(old) == len(listed):
                # What was added meanwhile is newer than what was merged.
                content = [*new, *kept] if old else [*kept, *new]
                with whole(self._manifest) as made:
                    made.write_text(json.dumps(content, indent=1))
        for shard in old if replaces else new:
            shutil.rmtree(self.directory / shard["name"], ignore_errors=True)

    def _intact(self, name: str, of: Callable[[Path], int | str]) -> list[dict[str, Any]]:
        """Return the shards of which `of` is as the manifest says under `name`; drop the others."""
        kept = []
        for shard in self._shards:
            path = self.directory / shard["name"]
            if of(path) == shard[name]:
                kept.append(shard)
            elif shard in self._listed():  # otherwise another job has merged it
                say(f"warning: {path} is damaged: it is encoded again")
                self._replace([shard], [])
        return kept

    def _overlap(self) -> int:
        """Return how many shards may hold the same user, at most."""
        # Where a range begins: how many have begun, without those that have ended.
        begun = np.searchsorted(np.sort(self._firsts), self._firsts, "right")
        ended = np.searchsorted(np.sort(self._lasts), self._firsts, "left")
        return int((begun - ended).max(initial=0))

    def _merge(self, overlap: int, newest: int | None) -> None:
        """Merge the shards into new ones of different users, if more than `overlap` may hold one.

        Args:
            overlap: the number.
            newest: the number of a user's items that are kept; None keeps all.
        """
        self._open()
        if not self._writes or self._overlap() <= overlap:
            return
        with contextlib.suppress(Timeout), self._merging.acquire(timeout=0):  # else another does
            self._open()
            old, new = self._intact("digest", shards.digest), []
            opened = [Shard(self.directory / shard["name"]) for shard in old]
            parts = -(-len(self) // ITEMS)
            edges = [i * (1 << 64) // parts - (1 << 63) for i in range(parts + 1)]
            for low, high in itertools.pairwise(edges):
                keys = {key for shard in opened for key in shard.users(low, high).tolist()}
                users = ((key, *_merged(opened, key, newest)) for key in sorted(keys))
                if keys:
                    new.append(shards.write(self.directory, self.encoder.size, users))
            self._replace(old, new)
            self._open()


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
    """Return the user's texts and vectors in these shards together."""
    texts, vectors = map(np.concatenate, zip(*(shard.rows(user) for shard in opened), strict=True))
    kept = _newest(texts, newest)
    return texts[kept], vectors[kept]
