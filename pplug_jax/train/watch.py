"""Tell when the loss of a training leaves, by where it began and by the LLM's own."""

import functools
import math
from pathlib import Path
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp

from pplug_jax.feed.batches import Batch
from pplug_jax.llm import LLM
from pplug_jax.llm.prompts import Place
from pplug_jax.plugs.reading import Reading
from pplug_jax.storage.scalars import read_scalars
from pplug_jax.storage.workdir import METRICS
from pplug_jax.train.step import in_parts, loss_fn

RISE = 1.0  # nats a token: 2.7 times the perplexity, more than the chance of a few batches


class _Nothing:
    """Weights that change nothing: no soft tokens, wherever they would stand."""

    def adapt(self, llm: LLM, batch: Batch, reading: Reading, remat: bool) -> tuple[LLM, jax.Array]:
        del reading, remat
        return llm, jnp.zeros((len(batch.target), 0, llm.config.hidden_size))


@functools.partial(jax.jit, static_argnames=("place", "accumulation"))
def llm_loss(llm: LLM, batch: Batch, *, place: Place, accumulation: int) -> jax.Array:
    """Return the LLM's own mean loss per target token of a training batch, () float32."""
    total, tokens = jax.lax.map(
        lambda part: loss_fn(_Nothing(), llm, part, place), in_parts(batch, accumulation)
    )
    return jnp.sum(total) / jnp.maximum(jnp.sum(tokens), 1)


class Start(NamedTuple):
    """The losses of a training's first batch; infinite if an older version did not note them.

    Attributes:
        loss: with the untrained weights.
        llm_loss: the LLM's own, without them.
    """

    loss: float = math.inf
    llm_loss: float = math.inf

    @classmethod
    def read(cls, directory: Path, method: str) -> Self:
        """Return what an earlier start of the run wrote to metrics.jsonl."""
        path = directory / METRICS
        if not path.is_file():
            return cls()
        losses = (read_scalars(path, f"start_{name}").get(method, {}) for name in cls._fields)
        return cls(*(each.get(1, math.inf) for each in losses))

    def problem(self, loss: float) -> str:
        """Return what is wrong with a loss in training, in words; empty if nothing is."""
        if math.isfinite(loss) and loss <= max(self) + RISE:
            return ""
        return (
            f"the loss is {loss:.3f}, where it began at {self.loss:.3f} and the LLM alone has "
            f"{self.llm_loss:.3f},"
        )
