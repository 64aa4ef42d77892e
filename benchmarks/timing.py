"""What the side-by-side benchmarks share: calls timed in turn, a table, and a JSON file."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from absl import flags

from pplug_jax.scoring.tables import Rows, show_table

FLAGS = flags.FLAGS
flags.DEFINE_string("record", None, "The JSON file; by default runs/benchmarks/NAME.json.")
flags.DEFINE_integer("repeats", 5, "Timed calls of each, of which the median is taken.")


def in_turn(cases: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """The median seconds of each call, of `--repeats` rounds that call every case once.

    A call returns when its work is done. Each is called once before, untimed: to compile, and to
    touch its memory.
    """
    for call in cases.values():
        call()
    return medians(cases, FLAGS.repeats)


def medians(cases: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The same of calls that have compiled already, and without flags."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, call in cases.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def machine() -> dict[str, Any]:
    """What the figures were measured with."""
    packages = ("jax", "flax", "numpy", "torch", "transformers")
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


def report(
    name: str, title: str, header: Sequence[str], rows: Rows, records: Sequence[Mapping[str, Any]]
) -> None:
    """Prints the table, and writes the same figures unrounded, with the machine's facts."""
    show_table(title, header, rows)
    path = Path(FLAGS.record or f"runs/benchmarks/{name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"benchmark": name, "machine": machine(), "records": list(records)}
    path.write_text(json.dumps(found, indent=1))
    print(f"written: {path}")
