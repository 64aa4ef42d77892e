"""A layer's matrix product, for any kernel: plain, quantised, or with a low-rank update."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import qwix
from flax import nnx


class Adapted(NamedTuple):
    """A kernel W with a low-rank update: x W + (x A) B.

    Attributes:
        base: W, (..., in, out), of any kind, even adapted itself.
        down: A, (..., [rows,] in, rank); with `rows`, every row of the batch has its own update.
        up: B, (..., [rows,] rank, out).
    """

    base: Any
    down: jax.Array
    up: jax.Array


def linear(x: jax.Array, weight: nnx.Variable) -> jax.Array:
    """Multiply x (B, L, in) by the variable's kernel (in, out): (B, L, out), in x's dtype."""
    return _product(x, weight.get_value())


def _product(x: jax.Array, kernel: Any) -> jax.Array:
    if isinstance(kernel, qwix.QArray):
        if kernel.scale.shape[-2] == 1:
            # One scale an output: the product takes the integers, which bfloat16 holds exactly, and
            # no scaled copy of the kernel is made.
            return (x @ kernel.qvalue.astype(x.dtype)) * kernel.scale[0]
        kernel = qwix.dequantize(kernel)
    if not isinstance(kernel, Adapted):
        return x @ kernel
    down, up = kernel.down.astype(x.dtype), kernel.up.astype(x.dtype)
    return _product(x, kernel.base) + _widened(x @ down, up)


@jax.custom_vjp
def _widened(x: jax.Array, up: jax.Array) -> jax.Array:
    """Multiply x (B, L, rank) by `up` ([B,] rank, out)."""
    return x @ up


def _widened_backward(
    kept: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    # The sum over L has the narrow operand first, where JAX's own gradient has the wide one: XLA's
    # CPU backend writes a transposed copy of the first, and a LoRA's step took half as long again.
    x, up = kept
    rows = "b" if up.ndim == 3 else ""
    return gradient @ up.mT, jnp.einsum(f"blr,blo->{rows}ro", x, gradient)


_widened.defvjp(lambda x, up: (x @ up, (x, up)), _widened_backward)
