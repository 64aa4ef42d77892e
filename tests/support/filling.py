"""Adds texts to a store as on a slow disk, where opening the vectors takes long: DIR FIRST LAST."""

import sys
import time
from pathlib import Path
from typing import Any

from pplug_jax.feed import store as history
from tests.support.encoders import FakeEncoder

whole = Path.open


def slow(path: Path, *args: Any, **kwargs: Any) -> Any:
    if path.name == "vectors":
        time.sleep(0.03)
    return whole(path, *args, **kwargs)


if __name__ == "__main__":
    history.CHUNK = 20
    Path.open = slow
    directory, first, last = Path(sys.argv[1]), *map(int, sys.argv[2:])
    store = history.HistoryStore(directory, FakeEncoder())
    store.add([f"text {i}" for i in range(first, last)])
    assert len(store.rows([f"text {i}" for i in range(first, last)])) == last - first
