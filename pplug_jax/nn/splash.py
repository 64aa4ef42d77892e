"""Attention of a long text to itself on TPUs: JAX's splash kernel, behind `attention.attend`.

The scores never leave a chip's on-chip memory. Those above the diagonal or outside a window are not
computed, except in the blocks at the edge.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    CausalMask,
    LocalMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha,
)

from pplug_jax.nn.remat import KEPT
from pplug_jax.runtime.mesh import parts, sharding

BLOCK = 512  # queries and keys at once; texts are padded to whole blocks
FEWEST_TOKENS = 4 * BLOCK  # below, scores made a part at a time move as little through HBM


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["mask", "slides"], meta_fields=["window"]
)
@dataclasses.dataclass(frozen=True)
class OwnText:
    """A mask by its meaning: each token sees the tokens of its text up to itself.

    Attributes:
        mask: (B, L) bool, False at padding, which stands on either side of a text.
        slides: () bool, whether a token sees only the `window` newest.
        window: the length of the window; None is none.
    """

    mask: jax.Array
    slides: jax.Array
    window: int | None


def pays(length: int) -> bool:
    """Return whether the kernel can run, and texts of `length` tokens are long enough for it."""
    mesh = jax.sharding.get_abstract_mesh()
    platform = jax.default_backend() if mesh.empty else mesh.abstract_device.platform
    return platform == "tpu" and length >= FEWEST_TOKENS


def splash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: OwnText,
    scale: float | None = None,
    cap: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Compute `attention.attend` with such a mask; results at padding mean nothing.

    Args:
        query: (B, L, heads, head_dim).
        key: (B, L, kv_heads, head_dim).
        value: as `key`.
        mask: the text's mask.
        scale: of the scores; None is 1/sqrt(head_dim).
        cap: scores x become cap * tanh(x / cap).
        interpret: run on a CPU, slowly.
    """
    L, N, D = query.shape[1:]
    mesh = jax.sharding.get_abstract_mesh()
    query = query * jnp.asarray(D**-0.5 if scale is None else scale, query.dtype)
    if not mesh.empty and key.shape[2] % parts(mesh, "heads"):  # there is not one for every device
        key, value = (jnp.repeat(x, N // x.shape[2], axis=2) for x in (key, value))

    def blocks(x: jax.Array) -> jax.Array:
        """Reorder (B, L, heads, D) to (B, heads, L in whole blocks, D)."""
        return jnp.pad(x, ((0, 0), (0, -L % BLOCK), (0, 0), (0, 0))).transpose(0, 2, 1, 3)

    arrays = *map(blocks, (query, key, value)), jnp.pad(mask.mask, ((0, 0), (0, -L % BLOCK)))

    def attend(window: int | None) -> jax.Array:
        local = functools.partial(_on_device, window=window, cap=cap, interpret=interpret)
        if mesh.empty:
            return local(*arrays)
        axes = [("batch", "heads", None, None)] * 3 + [("batch", None)]
        specs = tuple(sharding(mesh, a, x.shape).spec for a, x in zip(axes, arrays, strict=True))
        local = jax.shard_map(local, in_specs=specs, out_specs=specs[0], check_vma=False)
        return local(*arrays)

    if mask.window is None:
        h = attend(None)
    else:
        h = jax.lax.cond(mask.slides, lambda: attend(mask.window), lambda: attend(None))
    return h.transpose(0, 2, 1, 3)[:, :L]


def _on_device(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    window: int | None,
    cap: float | None,
    interpret: bool,
) -> jax.Array:
    """Run the kernel on (B, heads, L, D), (B, kv_heads, L, D) twice and (B, L)."""
    _, heads, length, _ = query.shape
    shape = length, length
    seen = CausalMask(shape) if window is None else LocalMask(shape, (window - 1, 0), offset=0)
    kernel = make_splash_mha(
        MultiHeadMask([seen] * heads),
        block_sizes=BlockSizes(*(BLOCK,) * 8),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=cap,
        residual_checkpoint_name=KEPT,
        interpret=interpret,
    )
    text = mask.astype(jnp.int32)
    return jax.vmap(kernel)(query, key, value, SegmentIds(text, text))
