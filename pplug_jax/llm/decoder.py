"""One causal decoder for every decoder-only LLM; families differ in `DecoderConfig` alone.

Numerics follow `transformers`: RMSNorm, softmax and RoPE angles in float32, the rest in the
weights' dtype.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pplug_jax.llm.attention import attend


class Frozen(nnx.Variable):
    """A weight that nothing trains: no `nnx.Param` filter sees it."""


@dataclasses.dataclass(frozen=True)
class Llama3Rope:
    """Llama 3.1's stretching of the slow RoPE frequencies (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Rope | None
    tied_head: bool
    max_length: int
    eos_ids: tuple[int, ...]
    pad_id: int

    def frequencies(self) -> jax.Array:
        """RoPE's angle per position, (head_dim / 2,) float32."""
        inverse = self.rope_theta ** (
            -jnp.arange(0, self.head_dim, 2, dtype=jnp.float32) / self.head_dim
        )
        if self.rope_scaling is None:
            return inverse
        scaling = self.rope_scaling
        turns = scaling.original_max_position_embeddings * inverse / (2 * math.pi)
        smooth = (turns - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        smooth = jnp.clip(smooth, 0.0, 1.0)
        return (1 - smooth) * inverse / scaling.factor + smooth * inverse


class KVCache(NamedTuple):
    """Keys and values of the tokens so far; a slot is a place in the sequence, used or padding.

    keys, values: (layers, B, S, kv_heads, head_dim); mask: (B, S) bool, which slots hold a token;
    length: () int32, the slots taken, the same for all rows.
    """

    keys: jax.Array
    values: jax.Array
    mask: jax.Array
    length: jax.Array

    def take(self, rows: jax.Array) -> "KVCache":
        """The cache with batch rows `rows` (B',) int32 (beam search moves beams so)."""
        return KVCache(self.keys[:, rows], self.values[:, rows], self.mask[rows], self.length)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return weight * y.astype(x.dtype)


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """RoPE on x (B, L, heads, head_dim) with angles (B, L, head_dim / 2).

    Halves are rotated as in `transformers`.
    """
    cos, sin = (
        jnp.cos(angles)[:, :, None].astype(x.dtype),
        jnp.sin(angles)[:, :, None].astype(x.dtype),
    )
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class Layers(nnx.Module):
    """All layers, their weights stacked on axis 0; inside `lax.scan` the object is one layer."""

    def __init__(self, config: DecoderConfig, weight: Callable[..., Frozen]):
        def stacked(*dims: tuple[int, str]) -> Frozen:
            return weight((config.num_layers, "layers"), *dims)

        embed = (config.hidden_size, "embed")
        heads = (config.num_heads * config.head_dim, "heads")
        kv_heads = (config.num_kv_heads * config.head_dim, "kv_heads")
        mlp = (config.intermediate_size, "mlp")
        self.attention_norm = stacked((config.hidden_size, "norm"))
        self.query = stacked(embed, heads)
        self.key = stacked(embed, kv_heads)
        self.value = stacked(embed, kv_heads)
        self.output = stacked(heads, embed)
        self.mlp_norm = stacked((config.hidden_size, "norm"))
        self.gate = stacked(embed, mlp)
        self.up = stacked(embed, mlp)
        self.down = stacked(mlp, embed)
        self.config = config

    def __call__(
        self,
        x: jax.Array,
        angles: jax.Array,
        mask: jax.Array,
        extend: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]] = lambda key, value: (
            key,
            value,
        ),
    ) -> jax.Array:
        """x (B, L, D) -> (B, L, D).

        `extend` turns this call's keys and values into all that are attended to.
        """
        config = self.config

        def split(x: jax.Array) -> jax.Array:
            return x.reshape(*x.shape[:2], -1, config.head_dim)

        h = rms_norm(x, self.attention_norm[...], config.norm_eps)
        query = rotate(split(h @ self.query[...]), angles)
        key = rotate(split(h @ self.key[...]), angles)
        key, value = extend(key, split(h @ self.value[...]))
        h = attend(query, key, value, mask)
        x = x + h.reshape(*x.shape[:2], -1) @ self.output[...]
        h = rms_norm(x, self.mlp_norm[...], config.norm_eps)
        return x + (jax.nn.silu(h @ self.gate[...]) * (h @ self.up[...])) @ self.down[...]


class Decoder(nnx.Module):
    """A frozen decoder-only LLM.

    Built abstract (`jax.ShapeDtypeStruct` weights); `load_llm` fills it.

    The trainer, the evaluator and the generator use only `embed`, `target_hidden`, `unembed`,
    `prefill`, `step`, `embedding_norm` and
    `config.{hidden_size, vocab_size, max_length, eos_ids, pad_id}`.
    """

    def __init__(self, config: DecoderConfig, dtype: str | jnp.dtype = "bfloat16"):
        def weight(*dims: tuple[int, str]) -> Frozen:
            shape, axes = zip(*dims, strict=True)
            return Frozen(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)), axes=axes)

        vocab, embed = (config.vocab_size, "vocab"), (config.hidden_size, "embed")
        self.embedding = weight(vocab, embed)
        self.layers = Layers(config, weight)
        self.norm = weight((config.hidden_size, "norm"))
        self.head = None if config.tied_head else weight(vocab, embed)
        self.config = config

    def embed(self, tokens: jax.Array) -> jax.Array:
        """(B, L) int32 -> (B, L, D), scaled as the model expects its `inputs_embeds`."""
        return jnp.take(self.embedding[...], tokens, axis=0)

    def embedding_norm(self) -> jax.Array:
        """Mean L2 norm of the embedding rows, () float32: the scale soft tokens should have."""
        return jnp.mean(jnp.linalg.norm(self.embedding[...].astype(jnp.float32), axis=-1))

    def hidden(self, inputs_embeds: jax.Array, mask: jax.Array, remat: bool = False) -> jax.Array:
        """(B, L, D), (B, L) bool -> the last hidden states, (B, L, D); padding may be anywhere."""
        angles = positions(mask)[..., None] * self.config.frequencies()
        visible = causal(mask)

        def layer(x: jax.Array, weights: Layers) -> tuple[jax.Array, None]:
            return weights(x, angles, visible), None

        x = inputs_embeds.astype(self.embedding.dtype)
        x, _ = jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, self.layers)
        return rms_norm(x, self.norm[...], self.config.norm_eps)

    def target_hidden(
        self,
        inputs_embeds: jax.Array,
        mask: jax.Array,
        targets: jax.Array,
        target_mask: jax.Array,
        remat: bool = False,
    ) -> jax.Array:
        """The hidden state that predicts each target token.

        Args:
            inputs_embeds: (B, L, D), the prompt.
            mask: (B, L) bool.
            targets: (B, T) int32, the answer.
            target_mask: (B, T) bool.

        Returns:
            (B, T, D); `unembed` makes logits of it.
        """
        L = inputs_embeds.shape[1]
        embeds = jnp.concatenate(
            [inputs_embeds.astype(self.embedding.dtype), self.embed(targets[:, :-1])], axis=1
        )
        hidden = self.hidden(embeds, jnp.concatenate([mask, target_mask[:, :-1]], axis=1), remat)
        return jnp.concatenate([last(hidden[:, :L], mask)[:, None], hidden[:, L:]], axis=1)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """(..., D) -> logits (..., V) float32."""
        table = self.embedding if self.head is None else self.head
        return jnp.einsum("...d,vd->...v", hidden, table[...], preferred_element_type=jnp.float32)

    def logits(self, inputs_embeds: jax.Array, mask: jax.Array) -> jax.Array:
        """(B, L, D), (B, L) bool -> next-token logits (B, L, V) float32."""
        return self.unembed(self.hidden(inputs_embeds, mask))

    def prefill(
        self, inputs_embeds: jax.Array, mask: jax.Array, max_new_tokens: int
    ) -> tuple[jax.Array, KVCache]:
        """Reads the prompt.

        Returns:
            the hidden state that predicts the first new token, (B, D), and the cache with room for
            the new tokens.
        """
        config = self.config
        room = ((0, 0), (0, 0), (0, max_new_tokens), (0, 0), (0, 0))
        angles = positions(mask)[..., None] * config.frequencies()
        visible = causal(mask)

        def layer(x: jax.Array, weights: Layers) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            made = []

            def keep(key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
                made.append((key, value))
                return key, value

            return weights(x, angles, visible, keep), made[0]

        x, (keys, values) = jax.lax.scan(
            layer, inputs_embeds.astype(self.embedding.dtype), self.layers
        )
        x = rms_norm(last(x, mask), self.norm[...], config.norm_eps)
        cache_mask = jnp.pad(mask, ((0, 0), (0, max_new_tokens)))
        return x, KVCache(
            jnp.pad(keys, room), jnp.pad(values, room), cache_mask, jnp.int32(mask.shape[1])
        )

    def step(self, tokens: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """One new token per row.

        (B,) int32 -> the hidden state that predicts the next, (B, D), and the longer cache.
        """
        angles = jnp.sum(cache.mask, axis=1)[:, None, None] * self.config.frequencies()
        mask = cache.mask.at[:, cache.length].set(True)

        # The cache is carried, not scanned over, so that XLA writes the new slot in place.
        def layer(carry: tuple, indexed: tuple[Layers, jax.Array]) -> tuple[tuple, None]:
            x, keys, values = carry
            weights, i = indexed
            after = []

            def extend(key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
                after.append(
                    jax.lax.dynamic_update_slice(keys, key[None], (i, 0, cache.length, 0, 0))
                )
                after.append(
                    jax.lax.dynamic_update_slice(values, value[None], (i, 0, cache.length, 0, 0))
                )
                return after[0][i], after[1][i]

            x = weights(x, angles, mask[:, None], extend)
            return (x, *after), None

        carry = (self.embed(tokens[:, None]), cache.keys, cache.values)
        (x, keys, values), _ = jax.lax.scan(
            layer, carry, (self.layers, jnp.arange(self.config.num_layers))
        )
        x = rms_norm(x[:, 0], self.norm[...], self.config.norm_eps)
        return x, KVCache(keys, values, mask, cache.length + 1)


def positions(mask: jax.Array) -> jax.Array:
    """(B, L) bool -> each token's place among its row's tokens, (B, L) float32.

    Padding counts for nothing.
    """
    return jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0).astype(jnp.float32)


def causal(mask: jax.Array) -> jax.Array:
    """(B, L) bool -> (B, L, L) bool: which slots each slot sees."""
    L = mask.shape[1]
    return jnp.tril(jnp.ones((L, L), bool)) & mask[:, None]


def last(x: jax.Array, mask: jax.Array) -> jax.Array:
    """(B, L, D), (B, L) bool -> (B, D), x at each row's last token."""
    index = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    return jnp.take_along_axis(x, index[:, None, None], axis=1)[:, 0]
