"""Fill the history store on Ray: workers, each with an encoder, add parts of the examples."""

from collections.abc import Callable
from typing import Any

import numpy as np

from pplug_jax.data.lamp import Subset
from pplug_jax.errors import InputError
from pplug_jax.feed.store import Histories, HistoryStore
from pplug_jax.runtime.console import Progress

PART = 256  # histories of a unit of work, at most


class AddPart:
    """A worker: adds the histories from one place to another to the store.

    Args:
        open_store: opens the store, with an encoder on the worker's devices.
        histories: users and their texts, read when they are asked for.
        batch_size: texts that are encoded at once.
    """

    def __init__(
        self, open_store: Callable[[], HistoryStore], histories: Histories, batch_size: int
    ):
        self.store, self.histories, self.batch_size = open_store(), histories, batch_size

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        (first,), (end,) = batch["first"], batch["end"]
        part = Subset(self.histories, range(int(first), int(end)))
        before = self.store.encoder.cut_texts
        new = self.store.add(part, self.batch_size)
        cut = self.store.encoder.cut_texts - before
        return batch | {"new": np.array([new]), "cut": np.array([cut])}


def encode_on_ray(
    open_store: Callable[[], HistoryStore],
    histories: Histories,
    batch_size: int,
    workers: int,
    **needs: Any,
) -> tuple[int, int]:
    """Add the histories to the store; return how many texts were encoded, and how many of them cut.

    A part whose worker dies is done again by another. Texts that users of several parts share are
    encoded in each.

    Args:
        open_store: as in `AddPart`; it is sent to the workers, as are the histories.
        histories: likewise.
        batch_size: likewise.
        workers: their number.
        **needs: what each one needs, as Ray says it: `num_cpus`, `num_gpus` or `resources`.

    Raises:
        InputError: Ray is not installed.
    """
    try:
        import ray.data
    except ModuleNotFoundError as error:
        raise InputError(f"--engine=ray: {error}; pip install -r requirements-ray.txt") from error
    # Made here, for a task that reads them would wait for a CPU that the workers have.
    count = len(histories)
    size = min(PART, -(-count // (4 * workers)))  # so that all workers end at about the same time
    parts = [{"first": i, "end": min(i + size, count)} for i in range(0, count, size)]
    added = ray.data.from_items(parts, override_num_blocks=len(parts)).map_batches(
        AddPart,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=workers),
        fn_constructor_args=(open_store, histories, batch_size),
        **needs,
    )
    new = cut = 0
    with Progress("encoding on Ray", count, "histories") as progress:
        for part in added.iter_rows():
            new, cut = new + int(part["new"]), cut + int(part["cut"])
            progress.advance(part["end"] - part["first"])
    return new, cut
