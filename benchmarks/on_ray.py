"""What Ray costs: `python -m benchmarks.on_ray [--items=100000] [--ms=1]`

Fills a history store in this process, and by one and by two workers on Ray. The encoder only waits,
MS a text, as if for a device, so that workers do not share what a device does. The texts' keys, the
shards and the merging are the store's own. A first line says how long Ray takes to start a worker.
"""

import functools
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import app, flags

from benchmarks.store import ITEMS, Histories, MadeUp
from pplug_jax.feed.store import HistoryStore
from pplug_jax.session.on_ray import encode_on_ray

flags.FLAGS.set_default("items", ["100000"])
flags.DEFINE_float("ms", 1.0, "Milliseconds that the encoder takes for a text.")


class Waiting(MadeUp):
    """An encoder that draws vectors in its time."""

    def __init__(self, seconds: float):
        super().__init__()
        self.seconds = seconds

    def encode(self, texts: list[str], *given: object, queries: bool) -> np.ndarray:
        start = time.perf_counter()
        vectors = super().encode(texts, *given, queries=queries)
        time.sleep(max(0, len(texts) * self.seconds - (time.perf_counter() - start)))
        return vectors


def open_store(directory: Path, seconds: float) -> HistoryStore:
    return HistoryStore(directory, Waiting(seconds))  # type: ignore[arg-type]


def main(_: list[str]) -> None:
    import ray

    with tempfile.TemporaryDirectory() as scratch:
        opens = functools.partial(open_store, seconds=flags.FLAGS.ms / 1e3)
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        start = time.perf_counter()
        one = Histories([0])
        encode_on_ray(functools.partial(opens, Path(scratch, "first")), one, 64, 1, num_cpus=1)
        print(f"a worker starts in {time.perf_counter() - start:.1f} s")
        for items in map(int, flags.FLAGS.items):
            histories = Histories(list(range(items // ITEMS)))
            print(f"\n{'items':>12}{'workers':>16}{'seconds':>9}{'items/s':>9}")
            for workers in (0, 1, 2):
                opened = functools.partial(opens, Path(scratch, f"{items}-{workers}"))
                start = time.perf_counter()
                if workers:
                    encode_on_ray(opened, histories, 64, workers, num_cpus=1)
                else:
                    opened().add(histories)
                seconds = time.perf_counter() - start
                name = workers or "this process"
                print(f"{items:12,}{name:>16}{seconds:9.1f}{items / seconds:9,.0f}", flush=True)


if __name__ == "__main__":
    app.run(main)
