"""Keep what the frozen LLM has read of prompts, so that it reads none of them twice.

With soft tokens behind the input nothing that is trained comes before them. So every epoch, every
plug and every seed would read the training's prompts again. Their keys and values are kept in the
host's memory instead, and a step costs no more than the soft tokens and the answers.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from pplug_jax.feed.batches import Batch
from pplug_jax.llm import LLM
from pplug_jax.llm.decoder import AXES, KeysValues
from pplug_jax.plugs.forward import read_prompts
from pplug_jax.runtime.console import say
from pplug_jax.runtime.mesh import sharding

GB = 10**9

Read = Callable[[LLM, jax.Array, jax.Array], KeysValues]  # as `forward.read_prompts`


class PromptCache:
    """The keys and values of prompts that were read, up to a number of bytes.

    Only a job of one process keeps any: several would have to read a prompt together, and another
    epoch gives a batch's rows to other processes.

    Args:
        llm: the LLM's shapes.
        mesh: where batches lie.
        budget: the most bytes.
    """

    def __init__(self, llm: LLM, mesh: Mesh, budget: float):
        self._llm, self._mesh = llm, mesh
        self._room = budget if jax.process_count() == 1 else 0
        self._wanted: set[bytes] = set()
        self._kept: dict[bytes, tuple[np.ndarray, ...]] = {}

    def keep(self, prompts: Iterable[np.ndarray]) -> bool:
        """Return whether there is room for these prompts too; if so, they are kept once read.

        Args:
            prompts: their tokens, (n,) int32 each.
        """
        if not self._room:
            return False
        new = {prompt.tobytes(): len(prompt) for prompt in prompts}
        new = {key: length for key, length in new.items() if key not in self._wanted}
        size = sum(new.values()) * self._bytes_per_token
        if size > self._room:
            say(
                f"{len(new)} prompts are read anew at each use: to keep them takes "
                f"{size / GB:.1f} GB, and config.train.prompt_cache has {self._room / GB:.1f} left"
            )
            return False
        self._room -= size
        self._wanted |= new.keys()
        return True

    def read(self, llm: LLM, batch: Batch, read: Read = read_prompts) -> Batch:
        """Return the batch with its prompts as the LLM has read them, now or before.

        Args:
            llm: the LLM.
            batch: a batch as `place_batch` lays it out, of prompts that are kept.
            read: `read_prompts`, or that compiled for the batch's shape.
        """
        text, mask = np.asarray(batch.text), np.asarray(batch.text_mask)
        prompts = [row[real] for row, real in zip(text, mask, strict=True)]
        if any(prompt.tobytes() not in self._kept for prompt in prompts):
            was_read = read(llm, batch.text, batch.text_mask)
            of_rows = zip(prompts, *map(np.asarray, was_read), strict=True)
            for prompt, *arrays in of_rows:
                self._kept[prompt.tobytes()] = tuple(x[:, : len(prompt)].copy() for x in arrays)
            return batch._replace(was_read=was_read)

        def together(whole: Any, arrays: Iterable[np.ndarray]) -> jax.Array:
            rows = np.zeros(whole.shape, whole.dtype)
            for row, array in zip(rows, arrays, strict=True):
                row[:, : array.shape[1]] = array
            return jax.device_put(rows, whole.sharding)

        kept = zip(*(self._kept[prompt.tobytes()] for prompt in prompts), strict=True)
        keys_values = map(together, self._abstract(*text.shape), kept)
        return batch._replace(was_read=KeysValues(*keys_values))

    def abstract(self, batch: Batch) -> Batch:
        """Return the batch with the shapes, dtypes and places of what `read` adds to it."""
        return batch._replace(was_read=self._abstract(*batch.text.shape))

    def _abstract(self, rows: int, length: int) -> KeysValues:
        def placed(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            where = sharding(self._mesh, AXES, x.shape)
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

        text, mask = (jax.ShapeDtypeStruct((rows, length), dtype) for dtype in (np.int32, bool))
        return jax.tree.map(placed, jax.eval_shape(read_prompts, self._llm, text, mask))

    @property
    def _bytes_per_token(self) -> int:
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in self._abstract(1, 1))
