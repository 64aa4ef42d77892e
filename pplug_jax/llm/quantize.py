"""Frozen kernels stored as integers: a half or a quarter of bfloat16's bytes.

The arithmetic stays in the model's dtype: `linear` multiplies by the integers and scales the
product, or expands one layer's kernel at a time where groups of inputs have scales of their own.
Gradients pass through to the activations.
"""

import functools
import math

import jax
import qwix

KINDS = ("int8", "int4")
GROUP = 128  # inputs that share a scale in int4, where they divide so


@functools.partial(jax.jit, static_argnames="kind")
def quantize(kernels: jax.Array, kind: str) -> qwix.QArray:
    """Store kernels (layers, in, out) as `kind`, symmetric, with scales in the kernels' dtype.

    int8 has a scale per output channel, int4 one per output channel and group of inputs.
    """
    groups = {1: math.gcd(kernels.shape[1], GROUP)} if kind == "int4" else None
    return qwix.quantize(kernels, kind, channelwise_axes=(0, 2), tiled_axes=groups)
