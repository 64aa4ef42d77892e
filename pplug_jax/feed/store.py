"""The history store: every unique text's vector on disk, computed once per encoder.

A store is a directory named after the encoder's fingerprint, so that vectors of another encoder are
never read. It has two append-only files: `keys` (16-byte digests of texts) and `vectors` (float16
rows in the same order). A row counts when both files hold all of it, so a process may be killed at
any moment and the next one goes on from there. Whoever reads or changes the files' ends holds their
lock, so several runs may fill one store at once.

If a run has several processes, either each has a store on its disk, or all share one, which the
first process writes.
"""

import contextlib
import hashlib
import itertools
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from filelock import FileLock

from pplug_jax.data.keys import KEY_BYTES, text_key
from pplug_jax.encoder import Encoder
from pplug_jax.runtime.console import Progress
from pplug_jax.runtime.distributed import from_primary, on_any, wait_for_all
from pplug_jax.runtime.primary import is_primary

CHUNK = 4096  # texts encoded between two writes
WINDOW = 1 << 26  # characters sorted by length at a time; all texts may be more than the memory


def _chunks(texts: Iterable[str], wanted: set[bytes]) -> Iterator[list[str]]:
    """Yield the texts whose keys are wanted, each once, sorted by length within windows."""
    window: list[str] = []
    size = 0
    for text in itertools.chain(texts, [None]):
        if text is not None and (key := text_key(text)) in wanted:
            wanted.remove(key)
            window.append(text)
            size += len(text)
        if size >= WINDOW or text is None:
            window.sort(key=len)
            yield from (window[i : i + CHUNK] for i in range(0, len(window), CHUNK))
            window, size = [], 0


class HistoryStore:
    """Vectors (N, E) float16 of unique texts, memory-mapped.

    Args:
        directory: holds the stores of all encoders.
        encoder: makes the vectors.
        queries: encode the texts as inputs, for a plug that does not train Enc_inp.
    """

    def __init__(self, directory: str | Path, encoder: Encoder, queries: bool = False):
        name = encoder.fingerprint
        if queries:
            prefix = hashlib.sha256(encoder.query_prefix.encode()).hexdigest()[:8]
            name += f"-queries-{prefix}"
        self.directory = Path(directory) / name
        self.queries = queries
        with contextlib.suppress(OSError):
            self.directory.mkdir(parents=True, exist_ok=True)
        self.encoder = encoder
        self._lock = FileLock(self.directory / "lock")
        self._rows: dict[bytes, int] = {}
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

    def _files(self) -> dict[Path, int]:
        """Return the files, and the bytes of a row in each."""
        keys, vectors = self.directory / "keys", self.directory / "vectors"
        return {keys: KEY_BYTES, vectors: 2 * self.encoder.size}

    def _cut(self) -> None:
        """Remove what a killed process left unfinished; the lock keeps living ones away."""
        files = self._files()
        for path in files:
            path.touch()
        rows = min(path.stat().st_size // size for path, size in files.items())
        for path, size in files.items():
            if path.stat().st_size != rows * size:
                with open(path, "r+b") as file:
                    file.truncate(rows * size)

    def _read_keys(self) -> None:
        """Read the keys of rows that were added since, by this run or another."""
        keys = next(iter(self._files()))
        if not keys.is_file():
            return
        with open(keys, "rb") as file:
            file.seek(len(self._rows) * KEY_BYTES)
            added = file.read()
        for start in range(0, len(added), KEY_BYTES):
            self._rows[added[start : start + KEY_BYTES]] = len(self._rows)

    def _open(self) -> None:
        try:
            with self._lock:
                self._cut()
                self._read_keys()
        except OSError:
            if os.access(self.directory, os.W_OK):
                raise
            self._read_keys()  # as a served plug may: nothing can be half written there
        _, vectors = self._files()
        shape = (len(self._rows), self.encoder.size)
        self._vectors = (
            np.memmap(vectors, np.float16, "r", shape=shape)
            if len(self._rows)
            else np.zeros(shape, np.float16)
        )

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, text: str) -> bool:
        return text_key(text) in self._rows

    def add(self, texts: Iterable[str], batch_size: int = 64) -> int:
        """Encode the texts that the store lacks, with a progress bar, and return their number.

        All processes must bring the same texts; together they encode what one of them lacks.

        Args:
            texts: the texts, iterated twice; only an iterator's are held in memory.
            batch_size: texts that are encoded at once.
        """
        if isinstance(texts, Iterator):
            texts = list(texts)
        unique = list(dict.fromkeys(map(text_key, texts)))
        lacking = on_any(np.array([key not in self._rows for key in unique], bool))
        new = set(itertools.compress(unique, lacking))
        count = len(new)
        if not new:
            return 0
        what = "inputs" if self.queries else "histories"
        try:
            with Progress(f"encoding {what}", count, "texts") as progress:
                # Like lengths together, so that little is padded; chunk by chunk, so that a killed
                # run keeps what it had.
                for chunk in _chunks(texts, new):
                    vectors = self.encoder.encode(
                        chunk, batch_size, progress.advance, queries=self.queries
                    )
                    if self._writes:
                        self._append(list(map(text_key, chunk)), vectors)
            wait_for_all(f"the {what} are encoded")
        finally:
            self._open()
        return count

    def _append(self, keys: Sequence[bytes], vectors: np.ndarray) -> None:
        with self._lock:
            self._cut()
            self._read_keys()
            # The other processes of this run may lack the rest, or another run has added it.
            new = np.array([key not in self._rows for key in keys], bool)
            contents = (
                b"".join(itertools.compress(keys, new)),
                vectors[new].astype(np.float16).tobytes(),
            )
            for path, content in zip(self._files(), contents, strict=True):
                with path.open("ab") as file:
                    file.write(content)

    def rows(self, texts: Sequence[str]) -> np.ndarray:
        """Return the texts' row numbers, (n,) int64.

        Raises:
            KeyError: a text was never added.
        """
        return np.array([self._rows[text_key(text)] for text in texts], np.int64)

    def keys(self, rows: np.ndarray) -> np.ndarray:
        """Return the keys of these rows' texts, alike in every store: (n,) -> (n, 16) uint8."""
        return np.fromfile(next(iter(self._files())), np.uint8).reshape(-1, KEY_BYTES)[rows]

    def rows_of(self, keys: np.ndarray) -> np.ndarray:
        """Return the rows of the texts with these keys, (n, 16) -> (n,) int64.

        Raises:
            KeyError: a text was never added.
        """
        return np.array([self._rows[key.tobytes()] for key in keys], np.int64)

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """Return the vectors in these rows, (n,) -> (n, E) float32."""
        return np.asarray(self._vectors[rows], np.float32)
