"""Read the records of Parquet files a batch at a time, with their places to read each again."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pplug_jax.data.records import Place, raise_bad
from pplug_jax.errors import DataError

BATCH = 64  # records in memory


def files(directory: Path) -> dict[str, list[Path]]:
    """Return the Parquet files of each split that the directory holds.

    They are SPLIT.parquet, SPLIT-00000-of-00002.parquet and so on, also in the directory `data`, as
    on the hub, or all in the directory SPLIT.

    Raises:
        DataError: a part is missing, or a split is there in two of these ways.
    """
    found: Any = defaultdict(lambda: defaultdict(list))
    for path in sorted([*directory.glob("*.parquet"), *directory.glob("*/*.parquet")]):
        part = re.fullmatch(r"(.+)-\d+-of-(\d+)", path.stem)
        if path.parent != directory and not (part and path.parent.name == "data"):
            split, parts = path.parent.name, None
        else:
            split, parts = (part[1], int(part[2])) if part else (path.stem, None)
        found[split][path.parent, parts].append(path)
    for split, ways in found.items():
        (first, *others), (_, parts) = ways.values(), next(iter(ways))
        if others:
            raise DataError(others[0][0], f"{split} is also in {first[0]}: remove one of them")
        if parts and len(first) != parts:
            raise DataError(first[0], f"{len(first)} of {parts} parts are there: get the others")
    return {split: next(iter(ways.values())) for split, ways in found.items()}


def _batches(path: Path, row: int = 0) -> Iterator[tuple[int, Any]]:
    """Yield the record batches from the row group of `row` on, each behind its first row."""
    import pyarrow as pa  # it takes half a second, which who has other files need not wait
    import pyarrow.parquet as pq

    try:
        # Mapped, as Arrow would otherwise read the columns of a whole row group into memory.
        with pq.ParquetFile(path, memory_map=True) as file:
            first, group = 0, 0
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            while group < len(sizes) and first + sizes[group] <= row:
                first, group = first + sizes[group], group + 1
            for batch in file.iter_batches(BATCH, range(group, len(sizes))):
                yield first, batch
                first += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise DataError(path, f"no whole Parquet file: {error}") from error


def _record(batch: Any, index: int) -> Any:
    return batch.slice(index, 1).to_pylist()[0]


def records(
    paths: Sequence[Path], on_bad: Callable[[DataError], None] = raise_bad
) -> Iterator[tuple[Place, Any]]:
    """Yield the records of the files, one file after the other.

    Args:
        paths: the files.
        on_bad: called for a row whose texts are not UTF-8, which is then left out.

    Raises:
        DataError: a file is not Parquet, or not whole.
    """
    for path in paths:
        for first, batch in _batches(path):
            for index in range(len(batch)):
                place = Place(path, first + index, 1, None)
                try:
                    yield place, _record(batch, index)
                except UnicodeDecodeError as error:
                    on_bad(DataError(path, f"not UTF-8: {error.reason}", place.where))


class Reader:
    """A reader of single records, which is quick in their order: it keeps the batch it is at."""

    def __init__(self) -> None:
        self._path, self._first = Path(), 0
        self._batch: Any = None
        self._batches: Iterator[tuple[int, Any]] = iter(())

    def __reduce__(self) -> tuple[type["Reader"], tuple[()]]:
        return Reader, ()  # a copy for another process begins anew

    def load(self, place: Place) -> Any:
        """Return the record at `place`."""
        if place.path != self._path or place.start < self._first:
            self._path, self._batches = place.path, _batches(place.path, place.start)
            self._first, self._batch = next(self._batches)
        while place.start >= self._first + len(self._batch):
            self._first, self._batch = next(self._batches)
        return _record(self._batch, place.start - self._first)
