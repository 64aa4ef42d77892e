"""Shards of the history store: files of vectors, a user's side by side.

A shard is a directory of arrays as NumPy writes them:

    index.npy    (2, U) int64, the users' keys, sorted, and where each one's rows end
    texts.npy    (N,) int64, the key of each row's text
    vectors.npy  (N, E) float16

The first two are mapped into memory, and of the third a user's rows are read, so nothing is held.
"""

import hashlib
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pplug_jax.storage.files import whole


class Shard:
    """A shard to read from.

    Args:
        path: its directory.
    """

    def __init__(self, path: Path):
        self._users, self._ends = np.asarray(np.load(path / "index.npy", mmap_mode="r"))
        self._texts = np.asarray(np.load(path / "texts.npy", mmap_mode="r"))
        self._path = path / "vectors.npy"
        vectors = np.load(self._path, mmap_mode="r")
        self._offset, self._row = vectors.offset, np.dtype((vectors.dtype, vectors.shape[1:]))

    def _range(self, user: int) -> tuple[int, int]:
        i = int(np.searchsorted(self._users, user))
        if i == len(self._users) or self._users[i] != user:
            return 0, 0
        return int(self._ends[i - 1]) if i else 0, int(self._ends[i])

    def users(self, low: int, high: int) -> np.ndarray:
        """Return the keys of the users in [low, high), sorted, (n,) int64."""
        return self._users[(low <= self._users) & (self._users < high)]

    def texts(self, user: int) -> np.ndarray:
        """Return the keys of the user's texts, (n,) int64, none for another shard's user."""
        return self._texts[slice(*self._range(user))]

    def vectors(self, user: int) -> np.ndarray:
        """Return the vectors of the user's texts, (n, E) float16."""
        first, last = self._range(user)
        offset = self._offset + first * self._row.itemsize
        return np.fromfile(self._path, self._row, last - first, offset=offset)

    def rows(self, user: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the user's texts and their vectors."""
        return self.texts(user), self.vectors(user)


def size(path: Path) -> int:
    """Return the bytes of the shard's files, 0 if it is gone."""
    return sum(part.stat().st_size for part in path.glob("*"))


def digest(path: Path) -> str:
    """Return a checksum of the shard's files."""
    total = hashlib.blake2b(digest_size=16)
    for part in sorted(path.iterdir()):
        with part.open("rb") as file:
            total.update(hashlib.file_digest(file, "blake2b").digest())
    return total.hexdigest()


def write(
    directory: Path, width: int, users: Iterable[tuple[int, np.ndarray, np.ndarray]]
) -> dict[str, Any]:
    """Write a shard, whole or not at all, and return what the manifest says of it.

    Args:
        directory: where it gets a directory of its own.
        width: E.
        users: each user's key, texts (n,) int64 and vectors (n, E), in the order of the keys; one
            user's are in memory at a time.
    """
    name = secrets.token_hex(8)
    index, texts, count = [], [], 0
    with whole(directory / name) as made:
        made.mkdir()
        with (made / "vectors.npy").open("wb") as file:
            _write_header(file, (0, width))
            for user, keys, vectors in users:
                file.write(vectors.astype("<f2").tobytes())
                count += len(keys)
                index.append((user, count))
                texts.append(keys)
            file.seek(0)
            _write_header(file, (count, width))
        np.save(made / "texts.npy", np.concatenate(texts))
        np.save(made / "index.npy", np.array(index, np.int64).T.copy())
        ends = {"first": index[0][0], "last": index[-1][0]}
        whole_files = {"bytes": size(made), "digest": digest(made)}
        return {"name": name, "items": count, **ends, **whole_files}


def _write_header(file: BinaryIO, shape: tuple[int, int]) -> None:
    """Write NumPy's header, which leaves room for a longer array."""
    header = {"descr": "<f2", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
