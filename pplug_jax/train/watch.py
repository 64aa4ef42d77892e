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
from pplug_jax.plugs.base import Plug
from pplug_jax.plugs.reading import Reading
from pplug_jax.storage.scalars import read_scalars
from pplug_jax.storage.workdir import METRICS
from pplug_jax.train.step import in_parts, loss_fn

RISE = 1.0  # nats a token: 2.7 times the perplexity
USELESS = 0.1  # nats above the LLM's own, at a training's end


class _Nothing(Plug):
    """Weights that change nothing: no soft tokens, wherever they would stand."""

    def adapt(self, llm: LLM, batch: Batch, reading: Reading, remat: bool) -> tuple[LLM, jax.Array]:
        del reading, remat
        return llm, jnp.zeros((len(batch.target), 0, llm.config.hidden_size))

    def trained(self, reading: Reading) -> int:
        return 0


@functools.partial(jax.jit, static_argnames=("place", "accumulation"))
def llm_loss(llm: LLM, batch: Batch, *, place: Place, accumulation: int) -> jax.Array:
    """Return the LLM's own mean loss per target token of a training batch, () float32."""
    total, tokens = jax.lax.map(
        lambda part: loss_fn(_Nothing(), llm, part, place), in_parts(batch, accumulation)
    )
    return jnp.sum(total) / jnp.maximum(jnp.sum(tokens), 1)


class Start(NamedTuple):
    """The losses of a training's first batch; infinite and 0 if an older version noted none.

    Attributes:
        loss: with the untrained weights.
        llm_loss: the LLM's own, without them.
    """

    loss: float = math.inf
    llm_loss: float = 0.0

    @classmethod
    def read(cls, directory: Path, method: str) -> Self:
        """Return what an earlier start of the run wrote to metrics.jsonl."""
        path = directory / METRICS
        if not path.is_file():
            return cls()
        losses = {name: read_scalars(path, f"start_{name}").get(method) for name in cls._fields}
        return cls(**{name: steps[1] for name, steps in losses.items() if steps})

    def suspect(self, loss: float) -> bool:
        """Return whether a loss may have left; batches differ, so that `problem` must say."""
        return not loss <= max(self) + RISE

    def problem(self, loss: float, llm_loss: float) -> str:
        """Return what is wrong with the loss of a batch, in words; empty if nothing is.

        Args:
            loss: the loss.
            own: the LLM's own on the same batch.
        """
        if loss - llm_loss <= max(0.0, self.loss - self.llm_loss) + RISE:
            return ""
        return (
            f"the loss is {loss:.3f}, where the LLM alone has {llm_loss:.3f}; it began at "
            f"{self.loss:.3f}, where the LLM has {self.llm_loss:.3f}"
        )
