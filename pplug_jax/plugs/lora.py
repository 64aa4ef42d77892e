"""Trained low-rank updates of a frozen LLM's kernels: LoRA (Hu et al. 2021, arXiv 2106.09685)."""

import jax
import jax.numpy as jnp
from flax import nnx

from pplug_jax.encoder.bert import Bert
from pplug_jax.feed.batches import Batch
from pplug_jax.llm import LLM
from pplug_jax.nn.linear import Adapted
from pplug_jax.plugs.base import Kind, Plug, parameter_count
from pplug_jax.plugs.reading import Reading
from pplug_jax.settings import LoraSettings, Settings


class Lora(Plug):
    """An update of every kernel of every layer, which is 0 at initialisation.

    Args:
        llm: the frozen LLM, whose shapes alone are used.
        settings: r, and the alpha of the update alpha / r * A B.
        users: if given, the number of updates, one for each row of a batch.
        rngs: draws A.
    """

    def __init__(
        self, llm: LLM, settings: LoraSettings, users: int | None = None, *, rngs: nnx.Rngs
    ):
        rank = settings.rank

        def param(shape: tuple[int, ...], axes: tuple[str | None, ...], std: float) -> nnx.Param:
            value = jax.random.normal(rngs.params(), shape) * std if std else jnp.zeros(shape)
            if users is not None:
                # All begin alike: what a user gets does not depend on who else is in the batch.
                value = jnp.tile(value[:, None], (1, users, 1, 1))
                axes = axes[0], "batch", None, None
            return nnx.Param(value, axes=axes)

        down, up = {}, {}
        for path, variable in nnx.to_flat_state(nnx.state(llm)):
            kernel = variable.get_value()
            while isinstance(kernel, Adapted):
                kernel = kernel.base
            if len(kernel.shape) == 3:  # only the layers' kernels are stacks of matrices
                layers, inputs, outputs = kernel.shape
                _, *axes = variable.get_metadata("axes")
                name = ".".join(map(str, path))
                down[name] = param(
                    (layers, inputs, rank), ("layers", axes[0], "rank"), inputs**-0.5
                )
                up[name] = param((layers, rank, outputs), ("layers", "rank", axes[1]), 0)
        self.down, self.up = nnx.Dict(down), nnx.Dict(up)
        self.scale = settings.alpha / rank

    def on(self, llm: LLM) -> LLM:
        """Return the LLM with these updates."""
        graph, state = nnx.split(llm)
        flat = []
        for path, variable in nnx.to_flat_state(state):
            if (name := ".".join(map(str, path))) in self.down:
                update = self.down[name][...], self.up[name][...] * self.scale
                variable = variable.replace(Adapted(variable.get_value(), *update))
            flat.append((path, variable))
        return nnx.merge(graph, nnx.from_flat_state(flat))

    def adapt(self, llm: LLM, batch: Batch, reading: Reading, remat: bool) -> tuple[LLM, None]:
        return self.on(llm), None

    def trained(self, reading: Reading) -> int:
        return parameter_count(self, nnx.Param)


def _build(
    config: Settings, llm: LLM, encoder: Bert | None, scale: jax.Array, key: jax.Array
) -> Lora:
    return Lora(llm, config.lora, rngs=nnx.Rngs(key))


KIND = Kind(_build)
