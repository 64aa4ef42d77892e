"""The figures of one part, on disk after every one: what is cut off keeps what it had."""

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.cards import find_card
from benchmarks.timing import machine, medians


def accelerator() -> dict[str, Any]:
    """Card, driver and versions, and what the card is said to do at best."""
    query = "--query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit"
    try:
        command = ["nvidia-smi", query, "--format=csv,noheader"]
        card = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        card = None
    found = machine()
    known = find_card(found["device"])
    return found | {
        "nvidia_smi": card,
        "cuda_of_torch": torch.version.cuda,
        "cudnn_of_torch": torch.backends.cudnn.version(),
        "peak_flops": known and known.flops,
        "peak_bandwidth": known and known.bandwidth,
    }


class Record:
    """A part's JSON file.

    measurements: name -> figures. One that failed has an `error`, one for which no time was left is
    `skipped`; the part goes on after either.
    """

    def __init__(self, path: Path, part: str, seconds: float):
        self.path, self.end = path, time.monotonic() + seconds
        self.lock = threading.Lock()
        self.content: dict[str, Any] = {
            "part": part,
            "started": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            "seconds": seconds,
            "finished": False,
            "machine": accelerator(),
            "measurements": {},
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        self.write()

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.end - time.monotonic()

    def write(self) -> None:
        fresh = self.path.with_suffix(".new")
        fresh.write_text(json.dumps(self.content, indent=1))
        os.replace(fresh, self.path)

    def note(self, name: str, **figures: Any) -> None:
        """Adds figures to a measurement."""
        with self.lock:
            self.content["measurements"].setdefault(name, {}).update(figures)
            self.write()
        shown = ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"[:160]
            for key, value in figures.items()
        )
        print(f"{self.left:5.0f} s left | {name} | {shown}", flush=True)

    def attempt(self, name: str, call: Callable[[], Any], needs: float = 1.0) -> Any:
        """What `call()` gives; None where it fails, or fewer than `needs` seconds are left."""
        if self.left < needs:
            self.note(name, skipped=f"{self.left:.0f} s were left of the {needs:.0f} it needs")
            return None
        start = time.monotonic()
        try:
            return call()
        except Exception as error:  # noqa: BLE001  too large or unsupported: others may work
            text = f"{type(error).__name__}: {error}"[:1500]
            self.note(name, error=text, after=time.monotonic() - start)
            return None

    def finish(self) -> None:
        with self.lock:
            self.content["finished"] = True
            self.write()

    def guard(self) -> None:
        """Ends the process at the deadline, whatever runs then: no compiler can be asked to."""

        def end() -> None:
            with self.lock:
                self.write()
                print("the deadline is reached", flush=True)
                os._exit(0)

        timer = threading.Timer(max(0.0, self.left), end)
        timer.daemon = True
        timer.start()


class Contest:
    """Peers at the same work, timed in turn: who joins is raced with all who did before.

    name: of the work; a peer's measurement is `NAME: PEER`. common: figures that all have.
    """

    def __init__(self, record: Record, name: str, repeats: int, **common: Any):
        self.record, self.name, self.repeats, self.common = record, name, repeats, common
        self.calls: dict[str, Callable[[], Any]] = {}

    def join(self, peer: str, make: Callable[[], Callable[[], Any]], needs: float = 1.0) -> Any:
        """Returns what the first call gave; None where it failed.

        make: gives a call, which returns when its work is done. What it takes to make it and the
        first call, where all is compiled, is no part of the timing.
        """
        name = f"{self.name}: {peer}"

        def race() -> Any:
            self.record.note(name, peer=peer, **self.common)
            start = time.monotonic()
            call = make()
            made = time.monotonic()
            first = call()
            seconds = {"make_seconds": made - start, "first_seconds": time.monotonic() - made}
            self.record.note(name, **seconds)
            calls = self.calls | {peer: call}
            for each, median in medians(calls, self.repeats).items():
                self.record.note(f"{self.name}: {each}", seconds=median)
            self.calls = calls
            return first

        return self.record.attempt(name, race, needs)
