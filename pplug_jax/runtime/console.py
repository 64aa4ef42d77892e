"""Show the progress of long work: a bar on a terminal, a line now and then elsewhere."""

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from pplug_jax.runtime.primary import is_primary

console = Console()
if not console.is_terminal:
    console = Console(width=1000)  # a file or a pipe has no width: nothing is cut there
SECONDS_BETWEEN_LINES = 15


def say(text: str) -> None:
    """Print a line as it is, once for all processes, without markup or wrapping."""
    if is_primary():
        console.print(text, highlight=False, markup=False, soft_wrap=True)


class Progress:
    """Show progress: `with Progress("training", 100, "steps") as progress: progress.advance(1)`."""

    def __init__(self, title: str, total: int, unit: str, done: int = 0):
        self.title, self.total, self.unit = title, total, unit
        self.done = self.before = done  # what an earlier run did says nothing about the time left
        self.start = self.said = time.monotonic()
        self.info = ""
        self.bar: Bar | None = None
        if console.is_terminal and is_primary():
            columns = (
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[info]}"),
                TimeRemainingColumn(),
            )
            self.bar = Bar(TextColumn("{task.description}"), *columns, console=console)
            self.task = self.bar.add_task(title, total=total, completed=done, info=unit)

    def __enter__(self) -> Self:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar:
            self.bar.stop()
        elif exception[0] is None:
            self._report()

    def advance(self, count: int, info: str = "") -> None:
        """Count `count` more as done, and show `info` beside the bar."""
        self.done += count
        self.info = info
        if self.bar:
            self.bar.update(self.task, advance=count, info=info or self.unit)
        # The last line comes at the end, once.
        elif self.done < self.total and time.monotonic() - self.said > SECONDS_BETWEEN_LINES:
            self._report()

    def _report(self) -> None:
        self.said = time.monotonic()
        took = self.said - self.start
        left = took / max(1, self.done - self.before) * (self.total - self.done)
        times = (
            f"{took:.0f} s, {left:.0f} s left"
            if self.done < self.total
            else f"done in {took:.1f} s"
        )
        text = f"{self.title}: {self.done}/{self.total} {self.unit}, {times}"
        say(f"{text}, {self.info}" if self.info else text)
