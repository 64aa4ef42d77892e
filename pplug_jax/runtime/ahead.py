"""Compile programs in the background, before they are needed."""

import contextlib
import os
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import jax

CORES_A_COMPILER = 4  # about as many as XLA keeps busy with one program

Key = TypeVar("Key", bound=Hashable)


@contextlib.contextmanager
def compiled_ahead(
    lower: Callable[[Key], jax.stages.Lowered], keys: Iterable[Key]
) -> Iterator[Callable[[Key], jax.stages.Compiled]]:
    """Yield `compiled(key)`, which returns the program of a key and blocks until it is ready.

    On exit, compilations that have not begun are cancelled.

    Args:
        lower: returns a key's program, not yet compiled.
        keys: the keys to compile, the most urgent first.
    """
    tracing = threading.Lock()  # Python runs one trace at a time: the most urgent shall have it

    def compiled(key: Key) -> jax.stages.Compiled:
        with tracing:
            lowered = lower(key)
        return lowered.compile()

    pool = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // CORES_A_COMPILER))
    futures = {key: pool.submit(compiled, key) for key in keys}
    try:
        yield lambda key: futures[key].result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
