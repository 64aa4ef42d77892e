"""Frozen weights, and weights of which only the shape is known yet."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx


class Frozen(nnx.Variable):
    """A weight that nothing trains: no `nnx.Param` filter sees it."""


# Vocabularies are padded to a multiple of it, so that any usual number of devices can share them.
# Every published one that we have a preset of is such a multiple as it is.
VOCAB_MULTIPLE = 64


def abstract_weights(dtype: str | jnp.dtype) -> Callable[..., Frozen]:
    """Return weight((size, axis), ...), which makes an abstract variable of that shape and axes.

    A `vocab` axis is padded; `stored_shape` then is the tensor's shape in a checkpoint.
    """

    def weight(*dims: tuple[int, str]) -> Frozen:
        stored_shape, axes = zip(*dims, strict=True)
        shape = tuple(
            -(-size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE if axis == "vocab" else size
            for size, axis in dims
        )
        array = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
        return Frozen(array, axes=axes, stored_shape=stored_shape)

    return weight
