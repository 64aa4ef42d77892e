"""Adds texts to a store as on a slow disk, in small shards, merged often: DIR FIRST LAST."""

import sys
import time
from pathlib import Path
from typing import Any

from pplug_jax.feed import shards
from pplug_jax.feed import store as history
from tests.support.encoders import FakeEncoder

digest = shards.digest


def slow(path: Path) -> Any:
    time.sleep(0.03)
    return digest(path)


if __name__ == "__main__":
    history.CHUNK, history.SECONDS = 20, -1
    shards.digest = slow
    directory, first, last = Path(sys.argv[1]), *map(int, sys.argv[2:])
    histories = [(f"user {i // 10}", [f"text {i}"]) for i in range(first, last)]
    store = history.HistoryStore(directory, FakeEncoder())
    for part in (histories[:60], histories[60:]):
        store.add(part)
    for user, texts in histories:
        assert len(store.vectors(history.History.of(user, texts))) == 1
