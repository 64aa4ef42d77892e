"""Keep what the frozen LLM has read of prompts, so that it reads none of them twice.

With soft tokens behind the input nothing that is trained comes before them. So every epoch, every
plug and every seed would read the training's prompts again. Their keys and values are kept in the
host's memory instead, and a step costs no more than the soft tokens and the answers.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

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


class _Kept(NamedTuple):
    """A prompt's keys and values, (layers, n, kv_heads, head_dim), and how far it was padded."""

    keys_values: KeysValues
    padded: int


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
        self._keeps = budget > 0 and jax.process_count() == 1
        self._room = budget
        self._wanted: set[bytes] = set()
        self._kept: dict[bytes, _Kept] = {}

    def keep(self, prompts: Iterable[np.ndarray]) -> bool:
        """Return whether there is room for these prompts too; if so, they are kept once read.

        Args:
            prompts: their tokens, (n,) int32 each.
        """
        if not self._keeps:
            return False
        lengths = {prompt.tobytes(): len(prompt) for prompt in prompts}
        new = lengths.keys() - self._wanted
        size = sum(lengths[key] for key in new) * self._bytes_per_token
        if size > self._room:
            say(
                f"{len(lengths)} prompts are read anew at each use: to keep them takes "
                f"{size / GB:.3g} GB more, and config.train.prompt_cache has {self._room / GB:.3g} "
                "left"
            )
            return False
        self._room -= size
        self._wanted |= new
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
        kept = [self._kept.get(prompt.tobytes()) for prompt in prompts]
        # Another padded length rounds otherwise. A run that was stopped would end with others.
        if any(one is None or one.padded != text.shape[1] for one in kept):
            was_read = read(llm, batch.text, batch.text_mask)
            for prompt, *arrays in zip(prompts, *map(np.asarray, was_read), strict=True):
                own = KeysValues(*(x[:, : len(prompt)].copy() for x in arrays))
                self._kept[prompt.tobytes()] = _Kept(own, text.shape[1])
            return batch._replace(was_read=was_read)

        def together(whole: Any, arrays: Iterable[np.ndarray]) -> jax.Array:
            rows = np.zeros(whole.shape, whole.dtype)
            for row, array in zip(rows, arrays, strict=True):
                row[:, : array.shape[1]] = array
            return jax.device_put(rows, whole.sharding)

        by_kind = zip(*(one.keys_values for one in kept if one), strict=True)
        keys_values = map(together, self._abstract(*text.shape), by_kind)
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
