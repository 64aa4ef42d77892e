"""A layer's matrix product, whatever its kernel is: plain, quantised, or with a low-rank update."""

from typing import Any, NamedTuple

import jax
import qwix
from flax import nnx


class Adapted(NamedTuple):
    """A kernel W with a low-rank update: x W + (x A) B.

    base: (..., in, out), of any kind, also itself adapted. down: A, (..., [rows,] in, rank).
    up: B, (..., [rows,] rank, out). With `rows` every row of the batch has an update of its own.
    """

    base: Any
    down: jax.Array
    up: jax.Array


def linear(x: jax.Array, weight: nnx.Variable) -> jax.Array:
    """x (B, L, in) by the variable's kernel (in, out) -> (B, L, out), in x's dtype."""
    return _product(x, weight.get_value())


def _product(x: jax.Array, kernel: Any) -> jax.Array:
    if isinstance(kernel, qwix.QArray):
        kernel = qwix.dequantize(kernel)
    if not isinstance(kernel, Adapted):
        return x @ kernel
    down, up = kernel.down.astype(x.dtype), kernel.up.astype(x.dtype)
    # A row's beams lie next to each other and share its update.
    rows = x.reshape(*down.shape[:-2], -1, x.shape[-1]) if down.ndim > 2 else x
    update = (rows @ down) @ up
    return _product(x, kernel.base) + update.reshape(*x.shape[:-1], -1)
