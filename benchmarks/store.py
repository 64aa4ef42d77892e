"""The history store, against other files: `python -m benchmarks.store [--items=10000,100000]`

Writes made-up vectors of ITEMS items a user, side by side and sorted by user, in each form; `store`
is ours, to whose writing belong the making of keys and the merging of shards. A fresh process opens
them and reads random users, from the disk (`cold`) and then the same ones from the system's cache.
Memory is the process' own, and all that it has mapped.
"""

import dataclasses
import functools
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from pplug_jax.feed.store import History, HistoryStore

flags.DEFINE_list("items", ["10000", "100000", "1000000"], "Items in all.")
flags.DEFINE_list("forms", [], "Forms to measure; all by default.")

ITEMS, E = 100, 384
PART = 1000  # users made up at a time
READS = 2000


def parts(users: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the texts' keys (n, ITEMS) and vectors (n, ITEMS, E) of PART users at a time."""
    rng = np.random.default_rng(0)
    for start in range(0, len(users), PART):
        n = len(users[start : start + PART])
        keys = rng.integers(0, 2**63, (n, ITEMS))
        yield keys, rng.integers(0, 2**15, (n, ITEMS, E), np.uint16).view(np.float16)


Read = Callable[[Any], np.ndarray]


def write_npy(path: Path, users: np.ndarray) -> None:
    path.mkdir()
    n = len(users) * ITEMS
    np.save(path / "users.npy", users)
    np.save(path / "ends.npy", np.arange(0, n + 1, ITEMS))
    keys = np.lib.format.open_memmap(path / "keys.npy", "w+", np.int64, (n,))
    vectors = np.lib.format.open_memmap(path / "vectors.npy", "w+", np.float16, (n, E))
    at = 0
    for part_keys, part in parts(users):
        end = at + part_keys.size
        keys[at:end], vectors[at:end] = part_keys.ravel(), part.reshape(-1, E)
        at = end


def open_npy(path: Path) -> Read:
    users, ends, _, vectors = (
        np.load(path / f"{name}.npy", mmap_mode="r")
        for name in ("users", "ends", "keys", "vectors")
    )

    def read(user: int) -> np.ndarray:
        i = np.searchsorted(users, user)
        return np.array(vectors[ends[i] : ends[i + 1]])

    return read


def open_read(path: Path) -> Read:
    """As `open_npy`, but vectors are read from the file."""
    users, ends = (np.load(path / f"{name}.npy", mmap_mode="r") for name in ("users", "ends"))
    offset = np.load(path / "vectors.npy", mmap_mode="r").offset
    dtype = np.dtype((np.float16, (E,)))

    def read(user: int) -> np.ndarray:
        i = np.searchsorted(users, user)
        start, end = int(ends[i]), int(ends[i + 1])
        at = offset + 2 * E * start
        return np.fromfile(path / "vectors.npy", dtype, end - start, offset=at)

    return read


def write_parquet(path: Path, users: np.ndarray) -> None:
    """A row a user, ten a row group, whose statistics say which users it has."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    fields = [("user", pa.int64()), ("keys", pa.binary()), ("vectors", pa.binary())]
    options: dict[str, Any] = {"compression": "none", "use_dictionary": False}
    with pq.ParquetWriter(path, pa.schema(fields), write_page_index=True, **options) as file:
        at = 0
        for keys, vectors in parts(users):
            columns = [[row.tobytes() for row in x] for x in (keys, vectors)]
            part = [users[at : at + len(keys)], *columns]
            at += len(keys)
            file.write_table(pa.table(part, pa.schema(fields)), row_group_size=10)


def open_parquet(path: Path) -> Read:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path, memory_map=True)
    groups = range(file.num_row_groups)
    last = np.array([file.metadata.row_group(i).column(0).statistics.max for i in groups])

    def read(user: int) -> np.ndarray:
        table = file.read_row_group(int(np.searchsorted(last, user)), use_threads=False)
        (row,) = np.flatnonzero(table["user"].to_numpy() == user)
        return np.frombuffer(table["vectors"][row].as_buffer(), np.float16).reshape(-1, E)

    return read


def write_array_record(path: Path, users: np.ndarray) -> None:
    """A record a user, beside the sorted users."""
    from array_record.python.array_record_module import ArrayRecordWriter

    path.mkdir()
    np.save(path / "users.npy", users)
    writer = ArrayRecordWriter(str(path / "records"), "group_size:1,uncompressed")
    for keys, vectors in parts(users):
        for row_keys, row in zip(keys, vectors, strict=True):
            writer.write(row_keys.tobytes() + row.tobytes())
    writer.close()


def open_array_record(path: Path) -> Read:
    from array_record.python.array_record_module import ArrayRecordReader

    users = np.load(path / "users.npy", mmap_mode="r")
    reader = ArrayRecordReader(str(path / "records"), "readahead_buffer_size:0")

    def read(user: int) -> np.ndarray:
        (record,) = reader.read([int(np.searchsorted(users, user))])
        return np.frombuffer(record, np.float16, offset=8 * ITEMS).reshape(-1, E)

    return read


def tensorstore_spec(path: Path, n: int = 0) -> dict[str, Any]:
    """An array of n vectors in chunks of 128, 2^18 a file."""
    spec: dict[str, Any] = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    chunks = {"chunk_shape": [128, E], "codecs": [{"name": "bytes"}]}
    return spec | {
        "metadata": {
            "shape": [n, E],
            "data_type": "float16",
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1 << 18, E]}},
            "codecs": [{"name": "sharding_indexed", "configuration": chunks}],
        }
    }


def write_tensorstore(path: Path, users: np.ndarray) -> None:
    import tensorstore as ts

    path.mkdir()
    n = len(users) * ITEMS
    np.save(path / "users.npy", users)
    np.save(path / "ends.npy", np.arange(0, n + 1, ITEMS))
    array = ts.open(tensorstore_spec(path / "vectors", n), create=True).result()
    keys = np.lib.format.open_memmap(path / "keys.npy", "w+", np.int64, (n,))
    held: list[np.ndarray] = []
    at = written = 0
    for part_keys, part in parts(users):
        keys[at : at + part_keys.size] = part_keys.ravel()
        at += part_keys.size
        held.append(part.reshape(-1, E))
        if at - written >= 1 << 18 or at == n:  # a part of a file is written by reading the rest
            rows = np.concatenate(held)
            whole = len(rows) if at == n else (len(rows) >> 18) << 18
            array[written : written + whole] = rows[:whole]
            held, written = [rows[whole:]], written + whole


def open_tensorstore(path: Path) -> Read:
    import tensorstore as ts

    users, ends = (np.load(path / f"{name}.npy", mmap_mode="r") for name in ("users", "ends"))
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path / "vectors")}}
    array = ts.open(spec).result()

    def read(user: int) -> np.ndarray:
        i = np.searchsorted(users, user)
        return array[int(ends[i]) : int(ends[i + 1])].read().result()

    return read


class MadeUp:
    """An encoder that draws vectors."""

    size, fingerprint, cut_texts = E, "made-up", 0

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def encode(self, texts: list[str], *_: Any, queries: bool) -> np.ndarray:
        return self.rng.random((len(texts), E), np.float32)


def write_store(path: Path, users: np.ndarray, numbers: str = "float16") -> None:
    store = HistoryStore(path, MadeUp(), numbers=numbers)  # type: ignore[arg-type]
    store.add(Histories(users.tolist()))


@dataclasses.dataclass
class Histories(Sequence[tuple[str, list[str]]]):
    """Users and their texts, made at each pass."""

    users: list[int]

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, i: int) -> tuple[str, list[str]]:  # type: ignore[override]  # no slices
        user = self.users[i]
        return str(user), [f"{user} {item}" for item in range(ITEMS)]


def open_store(path: Path, numbers: str = "float16") -> Read:
    return HistoryStore(path, MadeUp(), numbers=numbers).vectors  # type: ignore[arg-type]


def history_of(user: int) -> History:
    """What a job asks the store for."""
    return History.of(*Histories([user])[0])


FORMS: dict[str, tuple[Callable[[Path, np.ndarray], None], Callable[[Path], Read]]] = {
    "store": (write_store, open_store),
    "store_int8": (
        functools.partial(write_store, numbers="int8"),
        functools.partial(open_store, numbers="int8"),
    ),
    "npy": (write_npy, open_npy),
    "npy_read": (write_npy, open_read),
    "parquet": (write_parquet, open_parquet),
    "array_record": (write_array_record, open_array_record),
    "tensorstore": (write_tensorstore, open_tensorstore),
}


def memory() -> np.ndarray:
    """The process' own memory and all that it has mapped, in MB."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return np.array([int(lines[name].split()[0]) / 1e3 for name in ("RssAnon", "VmRSS")])


def measure(form: str, path: Path, users: np.ndarray) -> tuple[float, ...]:
    """Seconds to open, users a second, cold and warm, and memory after it."""
    key = history_of if form.startswith("store") else int
    FORMS[form][1](path)(key(users[0]))  # imports
    chosen = [key(user) for user in np.random.default_rng(1).choice(users, READS)]
    before = memory()
    start = time.perf_counter()
    read = FORMS[form][1](path)
    opened = time.perf_counter() - start
    speeds = []
    for _ in range(2):
        start = time.perf_counter()
        for user in chosen:
            assert read(user).shape == (ITEMS, E)
        speeds.append(READS / (time.perf_counter() - start))
    return opened, *speeds, *(memory() - before)


def evict(files: Iterable[Path]) -> None:
    """Take the files out of the system's cache."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main(_: list[str]) -> None:
    print(
        f"{'form':13}{'items':>11}{'B/user':>9}{'write':>9}{'open':>10}{'cold/s':>9}{'warm/s':>9}"
        f"{'own MB':>8}{'all MB':>8}"
    )
    for items in map(int, flags.FLAGS.items):
        users = np.sort(np.random.default_rng(2).integers(0, 2**63, items // ITEMS))
        for form in flags.FLAGS.forms or FORMS:
            with tempfile.TemporaryDirectory() as scratch:
                path = Path(scratch) / "store"
                start = time.perf_counter()
                FORMS[form][0](path, users)
                wrote = time.perf_counter() - start
                files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
                size = sum(file.stat().st_size for file in files) / len(users)
                evict(files)
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    opened, *speeds, own, mapped = pool.apply(measure, (form, path, users))
            print(
                f"{form:13}{items:11,}{size:9,.0f}{wrote:8.2f}s{1e3 * opened:8.1f}ms"
                f"{speeds[0]:9,.0f}{speeds[1]:9,.0f}{own:8.1f}{mapped:8.1f}",
                flush=True,
            )


if __name__ == "__main__":
    app.run(main)
