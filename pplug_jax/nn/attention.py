"""The one attention call of every model: by XLA, or for long texts on TPUs by the splash kernel."""

import math

import jax
import jax.numpy as jnp

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
) -> jax.Array:
    """Compute softmax attention, with the softmax in float32.

    Args:
        query: (B, L, heads, head_dim).
        key: (B, S, kv_heads, head_dim); each head serves heads / kv_heads query heads.
        value: as `key`.
        mask: (B, L, S) or (B, 1, S) bool, True where a query sees a key. An `OwnText` chooses the
            splash kernel, which has no bias.
        scale: of the scores; None is 1/sqrt(head_dim).
        cap: scores x become cap * tanh(x / cap), as in Gemma 2.
        bias: (B or 1, heads, L, S), added to the scores, as in T5.

    Returns:
        (B, L, heads, head_dim).
    """
    if isinstance(mask, OwnText):
        return splash(query, key, value, mask, scale, cap)
    B, L, N, _ = query.shape
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else parts(mesh, "batch") * parts(mesh, "heads")
    scores_bytes = 4 * B * N * L * key.shape[1] / devices
    count = min(math.ceil(scores_bytes / SCORES_BYTES), L // FEWEST_QUERIES)
    if count <= 1:
        return _attend(query, key, value, mask, scale, cap, bias)
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
    wide = key.astype(jnp.float32), value.astype(jnp.float32)

    def chunk(cut: tuple[jax.Array, jax.Array, jax.Array | None]) -> jax.Array:
        query, mask, bias = cut
        keys_and_values = (x.astype(y.dtype) for x, y in zip(wide, (key, value), strict=True))
        return _attend(query, *keys_and_values, mask, scale, cap, bias)

    cut = chunks(query, 1), chunks(mask, 1), None if bias is None else chunks(bias, 2)
    h = jax.lax.map(jax.checkpoint(chunk, prevent_cse=False), cut)
    return jnp.moveaxis(h, 0, 1).reshape(B, count * size, N, -1)[:, :L]


def _attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    scale: float | None,
    cap: float | None,
    bias: jax.Array | None,
) -> jax.Array:
    """Compute attention for all queries at once."""
    B, L, N, D = query.shape
    K = key.shape[2]

    # Products of stacks of matrices: XLA's CPU backend takes three to five times as long for the
    # same sums as einsums with the heads in their midst.
    query = query.reshape(B, L, K, -1, D).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, D)
    key, value = key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3)
    scores = jnp.matmul(query, key, preferred_element_type=jnp.float32).reshape(B, N, L, -1)
    scores *= D**-0.5 if scale is None else scale
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    if bias is not None:
        scores += bias
    scores = jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores).astype(value.dtype)
    h = (weights.reshape(B, K, -1, weights.shape[-1]) @ value).reshape(B, K, -1, L, D)
    return h.transpose(0, 3, 1, 2, 4).reshape(B, L, N, D)
