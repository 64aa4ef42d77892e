"""The record of how a model was made, kept beside its weights."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def training_log(output: Path) -> Iterator[Callable[[str], None]]:
    """Gives a function that prints a line and writes it to `training_log.txt`."""
    with open(output / "training_log.txt", "w") as file:

        def log(line: str) -> None:
            print(line, flush=True)
            print(line, file=file, flush=True)

        yield log
