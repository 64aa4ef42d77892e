"""Random weights for models that are made from nothing."""

import jax
import jax.numpy as jnp
from flax import nnx


def initialise(module: nnx.Module, key: jax.Array) -> nnx.Module:
    """Fills the abstract `module`: norms and biases neutral, every other weight normal.

    Its variance is 1 / fan-in. The fan-in of a (..., in, out) kernel is its second-last dimension,
    that of an embedding table its width.
    """
    graph, state = nnx.split(module)

    def fill(path: tuple, variable: nnx.Variable, key: jax.Array) -> nnx.Variable:
        abstract, axes, name = variable.get_value(), variable.get_metadata("axes"), str(path[-1])
        if axes[-1] in ("norm", "bias") or name.endswith("bias"):
            return variable.replace(
                jnp.zeros(abstract.shape) if name.endswith("bias") else jnp.ones(abstract.shape)
            )
        is_table = "embedding" in name
        fan_in = abstract.shape[-1] if is_table else abstract.shape[-2]
        return variable.replace(jax.random.normal(key, abstract.shape) * fan_in**-0.5)

    flat = nnx.to_flat_state(state)
    keys = jax.random.split(key, len(flat))
    return nnx.merge(
        graph, nnx.from_flat_state([(path, fill(path, v, k)) for (path, v), k in zip(flat, keys)])
    )
