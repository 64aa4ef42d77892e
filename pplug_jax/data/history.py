"""The history store: every unique text's vector on disk, computed once per encoder.

A store is a directory named after the encoder's fingerprint, so that no other encoder's vectors
are ever read, with two append-only files: `keys` (16-byte digests of texts) and `vectors` (float16
rows in the same order). A row counts when both files hold all of it, so a process may be killed at
any moment and the next one goes on from there.
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from pplug_jax.encoder import Encoder
from pplug_jax.progress import Progress

KEY_BYTES = 16
CHUNK = 4096  # texts encoded between two writes
WINDOW = 1 << 26  # characters sorted by length at a time; all texts may be more than the memory


def text_key(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=KEY_BYTES).digest()


def _chunks(texts: Iterable[str], wanted: set[bytes]) -> Iterator[list[str]]:
    """The texts whose keys are wanted, each once, sorted by length within windows."""
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
    """Vectors (N, E) float16 of unique texts, memory-mapped."""

    def __init__(self, directory: str | Path, encoder: Encoder):
        self.directory = Path(directory) / encoder.fingerprint
        self.directory.mkdir(parents=True, exist_ok=True)
        self.encoder = encoder
        self._open()

    def _open(self) -> None:
        keys, vectors = self.directory / "keys", self.directory / "vectors"
        keys.touch()
        vectors.touch()
        row_bytes = 2 * self.encoder.size
        rows = min(keys.stat().st_size // KEY_BYTES, vectors.stat().st_size // row_bytes)
        for path, size in ((keys, KEY_BYTES), (vectors, row_bytes)):
            if path.stat().st_size != rows * size:  # what a killed process left unfinished
                with open(path, "r+b") as file:
                    file.truncate(rows * size)
        data = keys.read_bytes()
        self._rows = {data[i * KEY_BYTES : (i + 1) * KEY_BYTES]: i for i in range(rows)}
        shape = (rows, self.encoder.size)
        self._vectors = (
            np.memmap(vectors, np.float16, "r", shape=shape)
            if rows
            else np.zeros(shape, np.float16)
        )

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, text: str) -> bool:
        return text_key(text) in self._rows

    def add(self, texts: Iterable[str], batch_size: int = 64) -> int:
        """Encodes the texts that the store lacks, with a progress bar; returns how many.

        Goes through the texts twice; only an iterator's are held in memory.
        """
        if isinstance(texts, Iterator):
            texts = list(texts)
        new = {key for key in map(text_key, texts) if key not in self._rows}
        count = len(new)
        if not new:
            return 0
        try:
            with (
                Progress("encoding histories", count, "texts") as progress,
                open(self.directory / "vectors", "ab") as vectors,
                open(self.directory / "keys", "ab") as keys,
            ):
                # Like lengths together, so that little is padded; chunk by chunk, so that a killed
                # run keeps what it had.
                for chunk in _chunks(texts, new):
                    vectors.write(
                        self.encoder.encode(chunk, batch_size, progress.advance)
                        .astype(np.float16)
                        .tobytes()
                    )
                    vectors.flush()
                    keys.write(b"".join(map(text_key, chunk)))
                    keys.flush()
        finally:
            self._open()
        return count

    def rows(self, texts: Sequence[str]) -> np.ndarray:
        """The texts' row numbers, (n,) int64.

        Raises:
            KeyError: a text that was never added.
        """
        return np.array([self._rows[text_key(text)] for text in texts], np.int64)

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """(n,) -> (n, E) float32."""
        return np.asarray(self._vectors[rows], np.float32)
