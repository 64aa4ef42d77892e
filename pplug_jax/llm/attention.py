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
        bias: (B, heads, L, S), added to the scores, as T5's; not together with `cap`.

    Returns:
        (B, L, heads, head_dim).
    """

    def attended(
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        mask: jax.Array,
        bias: jax.Array | None,
    ) -> jax.Array:
        if cap is None:
            return jax.nn.dot_product_attention(
                query, key, value, bias, mask=mask[:, None], scale=scale
            )
        B, L, N, D = query.shape
        grouped = query.reshape(B, L, key.shape[2], -1, D)
        scores = jnp.einsum("blkgd,bskd->bkgls", grouped, key, preferred_element_type=jnp.float32)
        scores = cap * jnp.tanh(scores * (D**-0.5 if scale is None else scale) / cap)
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores).astype(query.dtype)
        return jnp.einsum("bkgls,bskd->blkgd", weights, value).reshape(B, L, N, D)

    # Left alone, a backward pass finds four arrays of (B, heads, L, S) kept of every layer. Made
    # anew they are a sixth more matmul work of attention alone, and less time even on a CPU. Layers
    # are scanned, so that nothing has to keep XLA from merging the two.
    return jax.checkpoint(attended, prevent_cse=False)(query, key, value, mask, bias)
