"""Histories encoded on Ray: what one process would store, though a worker is killed."""

import functools
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from pplug_jax.feed.store import HistoryStore
from pplug_jax.session import on_ray
from pplug_jax.session.on_ray import encode_on_ray
from tests.support.encoders import FakeEncoder

ray = pytest.importorskip("ray", reason="needs pip install -r requirements-ray.txt")

HISTORIES = [(f"user {i}", [f"text {i} {k}" for k in range(i % 7)]) for i in range(200)]


class SlowEncoder(FakeEncoder):
    """Says who encodes, and takes its time."""

    def __init__(self, directory: Path):
        super().__init__()
        directory.mkdir(parents=True, exist_ok=True)
        (directory / str(os.getpid())).touch()

    def encode(self, *arguments: object, **settings: object) -> np.ndarray:
        time.sleep(0.1)
        return super().encode(*arguments, **settings)


def open_store(directory: Path) -> HistoryStore:
    return HistoryStore(directory / "store", SlowEncoder(directory / "workers"))


def kill_one(directory: Path, count: int) -> None:
    """Kill one of so many workers when all have begun, and one has added something."""
    workers: list[Path] = []
    while len(workers) < count or not any(directory.glob("store/*/*.json")):
        workers = list(directory.glob("workers/*"))
        time.sleep(0.01)
    os.kill(int(workers[0].name), signal.SIGKILL)


def content(store: HistoryStore) -> list[bytes]:
    """The files of the one shard that all are merged to."""
    store._merge(list(store._commits))
    (shard,) = store._shards
    files = sorted(Path(store.directory, shard.name).iterdir())
    return [path.read_bytes() for path in files]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_worker_costs_its_part_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(on_ray, "PART", 10)
    killing = threading.Thread(target=kill_one, args=(tmp_path, workers), daemon=True)
    killing.start()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        opened = functools.partial(open_store, tmp_path)
        new, _ = encode_on_ray(opened, HISTORIES, 64, workers, num_cpus=1)
    finally:
        ray.shutdown()
    killing.join(timeout=0)
    assert not killing.is_alive()
    alone = HistoryStore(tmp_path / "alone", FakeEncoder())
    count = alone.add(HISTORIES)
    assert count - 6 * 10 <= new <= count
    assert content(HistoryStore(tmp_path / "store", FakeEncoder())) == content(alone)
