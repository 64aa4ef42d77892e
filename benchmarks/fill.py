"""Random arrays in the place of weights that nobody has at hand."""

from typing import Any

import jax
import jax.numpy as jnp


def fill(abstract: Any, seed: int = 0) -> Any:
    """Arrays for abstract ones that say where they lie, made there by one program.

    Kernels and tables are as large as keeps activations at the scale that they have in trained
    models, norms' weights about 1, integers token ids; masks have no padding.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract)

    def one(name: str, key: jax.Array, x: jax.ShapeDtypeStruct) -> jax.Array:
        if x.dtype == bool:
            return jnp.ones(x.shape, bool)
        if jnp.issubdtype(x.dtype, jnp.integer):
            return jax.random.randint(key, x.shape, 0, 1000, x.dtype) if x.ndim else jnp.int32(0)
        noise = jax.random.normal(key, x.shape, x.dtype)
        if "norm" in name and "bias" not in name:
            return (1 + 0.1 * noise).astype(x.dtype)
        return noise * (0.02 if x.ndim < 2 else min(x.shape[-2:]) ** -0.5)

    def make(key: jax.Array) -> list[jax.Array]:
        keys = jax.random.split(key, len(leaves))
        names = [jax.tree_util.keystr(path) for path, _ in leaves]
        return [one(*each, x) for each, (_, x) in zip(zip(names, keys), leaves, strict=True)]

    where = [x.sharding for _, x in leaves]
    return jax.tree.unflatten(tree, jax.jit(make, out_shardings=where)(jax.random.key(seed)))
