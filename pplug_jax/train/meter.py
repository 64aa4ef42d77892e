"""The metrics and the speed of a training: measured while it runs, and read again."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from pplug_jax.storage.scalars import read_scalars
from pplug_jax.storage.workdir import METRICS


class Meter:
    """The mean metrics of the steps since the last reading, and their speed."""

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self.since, self.tokens = time.monotonic(), 0
        self.metrics: list[dict[str, jax.Array]] = []

    def add(self, metrics: dict[str, jax.Array], tokens: int) -> None:
        """Note a step, without waiting for the device."""
        self.metrics.append(metrics)
        self.tokens += tokens

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time that the context takes."""
        before = time.monotonic()
        yield
        self.since += time.monotonic() - before

    def read(self) -> dict[str, float]:
        """Return each metric's mean, `steps_per_second` and `tokens_per_second`, and start anew.

        Only here does the host wait for the device.
        """
        # NumPy would wrap what interrupts the wait into an error of its own.
        metrics = jax.device_get(self.metrics)
        values = {name: float(np.mean([step[name] for step in metrics])) for name in metrics[0]}
        seconds = time.monotonic() - self.since
        values["steps_per_second"] = len(metrics) / seconds
        values["tokens_per_second"] = self.tokens / seconds
        self._restart()
        return values


def training_seconds(directory: Path, method: str) -> float:
    """Return the seconds that training took for the method's steps, over all starts."""
    seconds, before = 0.0, 0
    for step, speed in read_scalars(directory / METRICS, "steps_per_second")[method].items():
        seconds += (step - before) / speed
        before = step
    return seconds
