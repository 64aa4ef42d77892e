"""The one attention call of every model; other backends (splash, cuDNN) belong behind it."""

import jax


def attend(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax attention, scaled by 1/sqrt(head_dim), the softmax in float32.

    Args:
        query: (B, L, heads, head_dim).
        key, value: (B, S, kv_heads, head_dim); each serves heads / kv_heads query heads.
        mask: (B, L, S) or (B, 1, S) bool, True where a query sees a key.

    Returns:
        (B, L, heads, head_dim).
    """
    return jax.nn.dot_product_attention(query, key, value, mask=mask[:, None])
