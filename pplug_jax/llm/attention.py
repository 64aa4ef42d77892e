"""The one attention call of every model; other backends (splash, cuDNN) belong behind it."""

import jax
import jax.numpy as jnp


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    scale: float | None = None,
    cap: float | None = None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention, the softmax in float32.

    Args:
        query: (B, L, heads, head_dim).
        key, value: (B, S, kv_heads, head_dim); each serves heads / kv_heads query heads.
        mask: (B, L, S) or (B, 1, S) bool, True where a query sees a key.
        scale: of the scores; None is 1/sqrt(head_dim).
        cap: scores x become cap * tanh(x / cap), as Gemma 2's.
        bias: (B or 1, heads, L, S), added to the scores, as T5's.

    Returns:
        (B, L, heads, head_dim).
    """
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
