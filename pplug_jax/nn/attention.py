"""The one attention call of every model: by XLA, or for long texts on TPUs by the splash kernel."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pplug_jax.nn.splash import OwnText, splash
from pplug_jax.runtime.mesh import parts

# Scores of more bytes on a device are made for some queries at a time, so that a TPU can hold them
# in its on-chip memory, instead of sending them to HBM and back for every step of the softmax.
SCORES_BYTES = 2**25
FEWEST_QUERIES = 64  # or the matrix units would have too little to do at a time


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | OwnText,
    scale: float | None = None,
    cap: float | None = None,
    bias: jax.Array | None = None,
    before: tuple[jax.Array, jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Compute softmax attention, with the softmax in float32.

    Args:
        query: (B, L, heads, head_dim).
        key: (B, S, kv_heads, head_dim); each head serves heads / kv_heads query heads.
        value: as `key`.
        mask: (B, L, S) or (B, 1, S) bool, True where a query sees a key. An `OwnText` chooses the
            splash kernel, which has no bias and nothing before.
        scale: of the scores; None is 1/sqrt(head_dim).
        cap: scores x become cap * tanh(x / cap), as in Gemma 2.
        bias: (B or 1, heads, L, S), added to the scores, as in T5.
        before: more keys and values, (P, S', kv_heads, head_dim), and their mask (B, L or 1, S').
            Each of the P rows serves B / P rows of queries that follow each other.

    Returns:
        (B, L, heads, head_dim).
    """
    if isinstance(mask, OwnText):
        return splash(query, key, value, mask, scale, cap)
    seen = [(key, value, mask)] if before is None else [before, (key, value, mask)]
    keys_values, masks = [s[:2] for s in seen], [s[2] for s in seen]
    B, L, N, _ = query.shape
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else parts(mesh, "batch") * parts(mesh, "heads")
    scores_bytes = 4 * B * N * L * sum(m.shape[2] for m in masks) / devices
    count = min(math.ceil(scores_bytes / SCORES_BYTES), L // FEWEST_QUERIES)
    if count <= 1:
        return _attend(query, keys_values, masks, scale, cap, bias)
    size = -(-L // count)

    def chunks(x: jax.Array, axis: int) -> jax.Array:
        """Cut the queries' axis; an axis of 1 stands for all of them."""
        if x.shape[axis] == 1:
            return jnp.broadcast_to(x, (count, *x.shape))
        padding = [(0, size * count - L if i == axis else 0) for i in range(x.ndim)]
        x = jnp.pad(x, padding)
        x = x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    # Their gradients are summed over the chunks, in float32.
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), keys_values)

    def chunk(cut: tuple[jax.Array, list[jax.Array], jax.Array | None]) -> jax.Array:
        query, masks, bias = cut
        narrow = jax.tree.map(lambda x, like: x.astype(like.dtype), wide, keys_values)
        return _attend(query, narrow, masks, scale, cap, bias)

    cut = (
        chunks(query, 1),
        [chunks(m, 1) for m in masks],
        None if bias is None else chunks(bias, 2),
    )
    h = jax.lax.map(jax.checkpoint(chunk, prevent_cse=False), cut)
    return jnp.moveaxis(h, 0, 1).reshape(B, count * size, N, -1)[:, :L]


def _attend(
    query: jax.Array,
    keys_values: Sequence[tuple[jax.Array, jax.Array]],
    masks: Sequence[jax.Array],
    scale: float | None,
    cap: float | None,
    bias: jax.Array | None,
) -> jax.Array:
    """Compute attention for all queries at once; the softmax is over all keys together."""
    B, L, N, D = query.shape
    K = keys_values[0][0].shape[2]

    # Products of stacks of matrices: XLA's CPU backend takes three to five times as long for the
    # same sums as einsums with the heads in their midst.
    def scores_of(key: jax.Array, mask: jax.Array) -> jax.Array:
        P = len(key)
        stacks = query.reshape(P, -1, L, K, N // K, D).transpose(0, 3, 1, 4, 2, 5)
        scores = jnp.matmul(
            stacks.reshape(P, K, -1, D),
            key.transpose(0, 2, 3, 1),
            preferred_element_type=jnp.float32,
        )
        scores = scores.reshape(P, K, B // P, N // K, L, -1).swapaxes(1, 2).reshape(B, N, L, -1)
        scores *= D**-0.5 if scale is None else scale
        if cap is not None:
            scores = cap * jnp.tanh(scores / cap)
        if bias is not None:
            scores += bias
        return jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)

    def sum_of(weights: jax.Array, value: jax.Array) -> jax.Array:
        P = len(value)
        stacks = weights.reshape(P, B // P, K, N // K, L, -1).swapaxes(1, 2)
        h = stacks.reshape(P, K, -1, stacks.shape[-1]) @ value.transpose(0, 2, 1, 3)
        h = h.reshape(P, K, B // P, N // K, L, D)
        return h.transpose(0, 2, 4, 1, 3, 5).reshape(B, L, N, D)

    scores = [scores_of(key, mask) for (key, _), mask in zip(keys_values, masks, strict=True)]
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1))
    ends = np.cumsum([x.shape[-1] for x in scores[:-1]])
    parts_of = jnp.split(weights, ends, axis=-1)
    sums = [
        sum_of(w.astype(value.dtype), value)
        for w, (_, value) in zip(parts_of, keys_values, strict=True)
    ]
    return functools.reduce(jnp.add, sums)
