"""Shards of the history store: files of vectors, a user's side by side.

A shard is a directory of arrays as NumPy writes them:

    index.npy    (2, U) int64, the users' keys, sorted, and where each one's rows end
    texts.npy    (N,) int64, the key of each row's text
    vectors.npy  (N,), each E float16, or E int8 and a float32 scale

Of the last two, a user's ranges are read, on a disk or in a bucket. The first is held in memory,
or mapped where it is on a disk.
"""

import functools
import hashlib
import io
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem

from pplug_jax.errors import InputError

TEXT = np.dtype("<i8")
FILES = ("index.npy", "texts.npy", "vectors.npy")
NUMBERS = {"float16": "<f2", "int8": "i1"}


def row_dtype(numbers: str, width: int) -> np.dtype:
    """Return the dtype of a vector of `width` numbers, float16 or int8, as it is stored."""
    scale = [("scale", "<f4")] if numbers == "int8" else []
    return np.dtype([*scale, ("vector", NUMBERS[numbers], (width,))])


def pack(vectors: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return vectors (n, E) as rows (n,) of `row_dtype`."""
    rows = np.empty(len(vectors), dtype)
    if "scale" in (dtype.names or ()):
        largest = np.abs(vectors).max(axis=1, initial=0)
        rows["scale"] = scale = np.where(largest > 0, largest, 1) / 127
        vectors = np.rint(vectors / scale[:, None])
    rows["vector"] = vectors
    return rows


def unpack(rows: np.ndarray) -> np.ndarray:
    """Return the vectors (n, E) float32 of rows (n,) of `row_dtype`."""
    vectors = rows["vector"].astype(np.float32)
    return vectors * rows["scale"][:, None] if "scale" in (rows.dtype.names or ()) else vectors


class Entry(NamedTuple):
    """What a commit says of a shard.

    Attributes:
        name: of its directory.
        items: N.
        first: its users' least key.
        last: the largest one.
        bytes: of its files.
        digest: a checksum of its files.
    """

    name: str
    items: int
    first: int
    last: int
    bytes: int
    digest: str


class Range(NamedTuple):
    """A part of a file: bytes from `start` to `end`."""

    path: str
    start: int
    end: int


class Shard:
    """A shard to read from.

    Args:
        files: the file system that it is on.
        path: its directory there.
        dtype: of its rows.

    Raises:
        FileNotFoundError: it is not there.
        InputError: it is damaged.

    Attributes:
        users: (U,) int64, the users' keys, sorted.
    """

    def __init__(self, files: fsspec.AbstractFileSystem, path: str, dtype: np.dtype):
        self.files, self.path, self.dtype = files, path, dtype
        index = f"{path}/index.npy"
        on_disk = isinstance(files, LocalFileSystem)
        try:
            array = (
                np.load(index, mmap_mode="r") if on_disk else np.load(io.BytesIO(files.cat(index)))
            )
            self.users, self._ends = np.asarray(array)
        except ValueError as error:
            raise InputError(
                f"{index} is damaged ({error}): delete {path}, and it is encoded again"
            ) from error

    def __len__(self) -> int:
        """Count its items."""
        return int(self._ends[-1])

    def ranges(self, user: int) -> list[Range]:
        """Return where the user's texts are and where his rows are, nothing for another's user."""
        i = int(np.searchsorted(self.users, user))
        if i == len(self.users) or self.users[i] != user:
            return []
        first, last = int(self._ends[i - 1]) if i else 0, int(self._ends[i])
        return [
            Range(
                f"{self.path}/{name}.npy",
                *(len(_header(dtype)) + row * dtype.itemsize for row in (first, last)),
            )
            for name, dtype in (("texts", TEXT), ("vectors", self.dtype))
        ]

    def read(self, user: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the user's texts (n,) int64 and rows (n,)."""
        texts, rows = [self.files.cat_file(*part) for part in self.ranges(user)] or [b"", b""]
        return np.frombuffer(texts, TEXT), np.frombuffer(rows, self.dtype)


def digest(path: Path) -> str:
    """Return a checksum of the shard's files."""
    total = hashlib.blake2b(digest_size=16)
    for part in sorted(path.iterdir()):
        with part.open("rb") as file:
            total.update(hashlib.file_digest(file, "blake2b").digest())
    return total.hexdigest()


def write(
    directory: Path, dtype: np.dtype, users: Iterable[tuple[int, np.ndarray, np.ndarray]]
) -> Entry:
    """Write a shard, and return what a commit says of it.

    Args:
        directory: an empty one, on a disk.
        dtype: of the rows.
        users: each user's key, texts (n,) int64 and rows (n,), in the order of the keys; one user's
            are in memory at a time.
    """
    index, texts, count = [], [], 0
    with (directory / "vectors.npy").open("wb") as file:
        file.write(_header(dtype))
        for user, keys, rows in users:
            file.write(rows.tobytes())
            count += len(keys)
            index.append((user, count))
            texts.append(keys)
        file.seek(0)
        file.write(_header(dtype, count))
    (directory / "texts.npy").write_bytes(
        _header(TEXT, count) + np.concatenate(texts).astype(TEXT).tobytes()
    )
    np.save(directory / "index.npy", np.array(index, np.int64).T.copy())
    size = sum(part.stat().st_size for part in directory.iterdir())
    return Entry(directory.name, count, index[0][0], index[-1][0], size, digest(directory))


@functools.cache
def _header(dtype: np.dtype, count: int = 0) -> bytes:
    """Return NumPy's header of an array (count,), which has room for a longer one."""
    descr = np.lib.format.dtype_to_descr(dtype)
    file = io.BytesIO()
    header = {"descr": descr, "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()
