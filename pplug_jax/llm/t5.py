"""T5 v1.1 and FlanT5, the paper's LLM, behind the decoder's interface.

The prompt, soft tokens in front, is the encoder's input; the answer is the decoder's.
"""

import dataclasses
import math
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import transformers
from flax import nnx

from pplug_jax.llm.decoder import (
    ACTIVATIONS,
    Context,
    mean_norm,
    positions,
    rms_norm,
    see_own,
    unembed,
    write,
)
from pplug_jax.llm.llama import check
from pplug_jax.nn.attention import attend
from pplug_jax.nn.linear import linear
from pplug_jax.nn.remat import checkpointed
from pplug_jax.nn.variables import Frozen, abstract_weights
from pplug_jax.runtime.mesh import rows
from pplug_jax.storage.hf import Source

ATTENTION = {"query": "q", "key": "k", "value": "v", "output": "o"}
MLP = {"gate": "wi_0", "up": "wi_1", "down": "wo"}


def _layer_sources(stack: str, parts: dict[str, tuple[str, dict[str, str]]]) -> dict[str, Source]:
    """Map our tensors of a stack's layers to a checkpoint's.

    Args:
        stack: the stack's name.
        parts: our name -> (the checkpoint's, its kernels), in a block's order.
    """
    sources = {}
    for i, (ours, (theirs, kernels)) in enumerate(parts.items()):
        block = f"{stack}.block.{{}}.layer.{i}"
        sources[f"{stack}.{ours}.norm"] = Source(f"{block}.layer_norm.weight")
        for part, name in kernels.items():
            sources[f"{stack}.{ours}.{part}"] = Source(f"{block}.{theirs}.{name}.weight", True)
    return sources


SOURCES = {
    "embedding": Source("shared.weight"),
    "encoder_norm": Source("encoder.final_layer_norm.weight"),
    "decoder_norm": Source("decoder.final_layer_norm.weight"),
    "head": Source("lm_head.weight"),
}
for _stack, _parts in {
    "encoder": {"attention": ("SelfAttention", ATTENTION), "mlp": ("DenseReluDense", MLP)},
    "decoder": {
        "attention": ("SelfAttention", ATTENTION),
        "cross": ("EncDecAttention", ATTENTION),
        "mlp": ("DenseReluDense", MLP),
    },
}.items():
    SOURCES |= _layer_sources(_stack, _parts)
    # Every layer uses the first one's table.
    SOURCES[f"{_stack}_bias"] = Source(
        f"{_stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    )


@dataclasses.dataclass(frozen=True)
class T5Config:
    """The shapes of a T5.

    Attributes:
        vocab_size: V.
        hidden_size: D.
        intermediate_size: the MLP's width.
        num_encoder_layers: the number of layers of the encoder.
        num_decoder_layers: the number of layers of the decoder.
        num_heads: the number of heads.
        head_dim: the width of a head.
        norm_eps: of the norms.
        buckets: the number of buckets of relative positions.
        max_distance: distances beyond share the last bucket.
        start_id: the decoder's first token.
        eos_ids: the tokens at which generation stops.
        pad_id: the padding token.
        max_length: the most tokens that the LLM was made for.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_encoder_layers: int
    num_decoder_layers: int
    num_heads: int
    head_dim: int
    norm_eps: float
    buckets: int
    max_distance: int
    start_id: int
    eos_ids: tuple[int, ...]
    pad_id: int
    max_length: int = sys.maxsize  # relative positions have no end


def config_from_hf(hf: transformers.PreTrainedConfig, eos_ids: tuple[int, ...]) -> T5Config:
    """Read a T5's shapes from its `transformers` config.

    Raises:
        InputError: this code does not implement a setting.
    """
    check(hf, feed_forward_proj="gated-gelu", scale_decoder_outputs=False)
    return T5Config(
        vocab_size=hf.vocab_size,
        hidden_size=hf.d_model,
        intermediate_size=hf.d_ff,
        num_encoder_layers=hf.num_layers,
        num_decoder_layers=hf.num_decoder_layers,
        num_heads=hf.num_heads,
        head_dim=hf.d_kv,
        norm_eps=hf.layer_norm_epsilon,
        buckets=hf.relative_attention_num_buckets,
        max_distance=hf.relative_attention_max_distance,
        start_id=hf.decoder_start_token_id,
        eos_ids=eos_ids,
        pad_id=hf.pad_token_id,
    )


class Attention(nnx.Module):
    """A sublayer that normalises, attends and adds; inside `lax.scan` the object is one layer's."""

    def __init__(self, config: T5Config, weight: Callable[..., Frozen]):
        embed = (config.hidden_size, "embed")
        heads = (config.num_heads * config.head_dim, "heads")
        self.norm = weight((config.hidden_size, "norm"))
        self.query, self.key, self.value = (weight(embed, heads) for _ in range(3))
        self.output = weight(heads, embed)
        self.config = config

    def _split(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], self.config.num_heads, self.config.head_dim)

    def normed(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.norm[...], self.config.norm_eps)

    def keys_values(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return keys and values, (B, S, D) -> two of (B, S, heads, head_dim)."""
        return self._split(linear(x, self.key)), self._split(linear(x, self.value))

    def __call__(
        self,
        x: jax.Array,
        key: jax.Array,
        value: jax.Array,
        mask: jax.Array,
        bias: jax.Array | None = None,
    ) -> jax.Array:
        """Let x (B, L, D) attend to keys and values where mask (B, L or 1, S) allows."""
        query = self._split(linear(self.normed(x), self.query))
        h = attend(query, key, value, mask, scale=1.0, bias=bias)
        return x + linear(h.reshape(*x.shape[:2], -1), self.output)


class Mlp(nnx.Module):
    def __init__(self, config: T5Config, weight: Callable[..., Frozen]):
        embed, mlp = (config.hidden_size, "embed"), (config.intermediate_size, "mlp")
        self.norm = weight((config.hidden_size, "norm"))
        self.gate, self.up, self.down = weight(embed, mlp), weight(embed, mlp), weight(mlp, embed)
        self.eps = config.norm_eps

    def __call__(self, x: jax.Array) -> jax.Array:
        h = rms_norm(x, self.norm[...], self.eps)
        h = ACTIVATIONS["gelu_tanh"](linear(h, self.gate)) * linear(h, self.up)
        return x + linear(h, self.down)


class EncoderLayers(nnx.Module):
    """All encoder layers, their weights stacked on axis 0."""

    def __init__(self, config: T5Config, weight: Callable[..., Frozen]):
        self.attention = Attention(config, weight)
        self.mlp = Mlp(config, weight)


class DecoderLayers(EncoderLayers):
    def __init__(self, config: T5Config, weight: Callable[..., Frozen]):
        super().__init__(config, weight)
        self.cross = Attention(config, weight)


class T5Cache(NamedTuple):
    """What the decoder attends to: the answer's tokens, and the prompt, which a row's beams share.

    Attributes:
        keys: (layers, B, S, heads, head_dim), of which every step fills K slots, one a beam.
        values: (layers, B, S, heads, head_dim), likewise.
        positions: (1 or B, S) float32, the slots' places in the answer.
        seen: (B, K, S) bool, as in `KVCache`.
        length: () int32, as in `KVCache`.
        cross_keys: (layers, B, L, heads, head_dim), the prompt's.
        cross_values: (layers, B, L, heads, head_dim), the prompt's.
        mask: (B, L) bool, the prompt's.
    """

    keys: jax.Array
    values: jax.Array
    positions: jax.Array
    seen: jax.Array
    length: jax.Array
    cross_keys: jax.Array
    cross_values: jax.Array
    mask: jax.Array


def relative_buckets(
    distance: jax.Array, buckets: int, max_distance: int, bidirectional: bool
) -> jax.Array:
    """Return T5's buckets of key position minus query position; any shape, int32.

    Half of a direction's buckets are for exact distances, half logarithmic up to `max_distance`.
    """
    offset = jnp.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        offset = jnp.where(distance > 0, buckets, 0)
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    exact = buckets // 2
    log = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact)
    far = exact + (log / math.log(max_distance / exact) * (buckets - exact)).astype(jnp.int32)
    return offset + jnp.where(distance < exact, distance, jnp.minimum(far, buckets - 1))


class T5(nnx.Module):
    """A frozen T5, built abstract (`jax.ShapeDtypeStruct` weights) and filled by `load_llm`."""

    decoder_only = False

    def __init__(self, config: T5Config, dtype: str | jnp.dtype = "bfloat16"):
        weight = abstract_weights(dtype)

        def stacked(layers: int) -> Callable[..., Frozen]:
            return lambda *dims: weight((layers, "layers"), *dims)

        vocab, embed = (config.vocab_size, "vocab"), (config.hidden_size, "embed")
        table = (config.buckets, "buckets"), (config.num_heads, "bias_heads")
        self.embedding, self.head = weight(vocab, embed), weight(vocab, embed)
        self.encoder = EncoderLayers(config, stacked(config.num_encoder_layers))
        self.decoder = DecoderLayers(config, stacked(config.num_decoder_layers))
        self.encoder_bias, self.decoder_bias = weight(*table), weight(*table)
        self.encoder_norm = weight((config.hidden_size, "norm"))
        self.decoder_norm = weight((config.hidden_size, "norm"))
        self.config = config

    @property
    def prompt_end(self) -> tuple[int, ...]:
        """The tokens that close a prompt: T5 was trained to find its end-of-sequence there."""
        return self.config.eos_ids[:1]

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Embed tokens, (B, L) int32 -> (B, L, D)."""
        return jnp.take(self.embedding[...], tokens, axis=0)

    def embedding_norm(self) -> jax.Array:
        """Return the mean L2 norm of all embedded tokens, () float32: the scale for soft tokens."""
        return mean_norm(self.embedding[...], self.config.vocab_size)

    def _bias(
        self, table: Frozen, at: jax.Array, slots: jax.Array, bidirectional: bool
    ) -> jax.Array:
        """Return the bias of queries at `at` (B, L) to keys at `slots` (B, S), (B, heads, L, S)."""
        config = self.config
        distance = (slots[:, None] - at[:, :, None]).astype(jnp.int32)
        index = relative_buckets(distance, config.buckets, config.max_distance, bidirectional)
        return jnp.moveaxis(table[...][index], -1, 1)

    def encode(self, inputs_embeds: jax.Array, mask: jax.Array, remat: bool = False) -> jax.Array:
        """Encode the prompt, (B, L, D), (B, L) bool -> (B, L, D); padding may be anywhere."""
        at = positions(mask)
        bias = self._bias(self.encoder_bias, at, at, bidirectional=True)

        def layer(x: jax.Array, weights: EncoderLayers) -> tuple[jax.Array, None]:
            x, attention = rows(x), weights.attention
            keys_values = attention.keys_values(attention.normed(x))
            return weights.mlp(attention(x, *keys_values, mask[:, None], bias)), None

        x = inputs_embeds.astype(self.embedding.dtype)
        x, _ = jax.lax.scan(checkpointed(layer, remat), x, self.encoder)
        return rms_norm(x, self.encoder_norm[...], self.config.norm_eps)

    def decode(
        self, tokens: jax.Array, encoded: jax.Array, mask: jax.Array, remat: bool = False
    ) -> jax.Array:
        """Run the decoder, (B, T, D).

        Args:
            tokens: (B, T) int32, the decoder's inputs.
            encoded: (B, L, D), the encoded prompt.
            mask: (B, L) bool, the prompt's.
            remat: recompute the layers' activations in the backward pass.
        """
        T = tokens.shape[1]
        at = jnp.broadcast_to(jnp.arange(T), tokens.shape)
        bias = self._bias(self.decoder_bias, at, at, bidirectional=False)
        causal = jnp.tril(jnp.ones((1, T, T), bool))

        def layer(x: jax.Array, weights: DecoderLayers) -> tuple[jax.Array, None]:
            attention, cross = weights.attention, weights.cross
            x = rows(x)
            x = attention(x, *attention.keys_values(attention.normed(x)), causal, bias)
            x = cross(x, *cross.keys_values(encoded), mask[:, None])
            return weights.mlp(x), None

        x, _ = jax.lax.scan(checkpointed(layer, remat), self.embed(tokens), self.decoder)
        return rms_norm(x, self.decoder_norm[...], self.config.norm_eps)

    def target_hidden(
        self,
        inputs_embeds: jax.Array,
        mask: jax.Array,
        targets: jax.Array,
        target_mask: jax.Array,
        remat: bool = False,
        context: Context | None = None,
    ) -> jax.Array:
        """Return the hidden state that predicts each target token, as `Decoder.target_hidden` does.

        The targets' padding stands behind them, where no token sees it.
        """
        assert context is None  # an encoder reads the whole prompt at once
        start = jnp.full_like(targets[:, :1], self.config.start_id)
        tokens = jnp.concatenate([start, targets[:, :-1]], axis=1)
        return self.decode(tokens, self.encode(inputs_embeds, mask, remat), mask, remat)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Return logits of hidden states, (..., D) -> (..., padded V) float32; padding has -inf."""
        return unembed(hidden, self.head[...], self.config.vocab_size)

    def logits(self, inputs_embeds: jax.Array, mask: jax.Array, targets: jax.Array) -> jax.Array:
        """Return next-token logits, (B, T, V) float32.

        Args:
            inputs_embeds: (B, L, D), the prompt.
            mask: (B, L) bool.
            targets: (B, T) int32, the decoder's inputs.
        """
        hidden = self.decode(targets, self.encode(inputs_embeds, mask), mask)
        return self.unembed(hidden)[..., : self.config.vocab_size]

    def prefill(
        self, inputs_embeds: jax.Array, mask: jax.Array, max_new_tokens: int, num_beams: int = 1
    ) -> tuple[jax.Array, T5Cache]:
        """Read the prompt, as `Decoder.prefill` does."""
        config, B = self.config, mask.shape[0]
        encoded = self.encode(inputs_embeds, mask)
        _, (keys, values) = jax.lax.scan(
            lambda _, weights: (None, weights.cross.keys_values(encoded)), None, self.decoder
        )
        slots = max_new_tokens * num_beams
        room = (config.num_decoder_layers, B, slots, config.num_heads, config.head_dim)
        empty = jnp.zeros(room, self.embedding.dtype)
        seen = jnp.zeros((B, num_beams, slots), bool)
        start = jnp.full((B, num_beams), config.start_id, jnp.int32)
        at = jnp.arange(slots, dtype=jnp.float32)[None] // num_beams
        cache = T5Cache(empty, empty, at, seen, jnp.int32(0), keys, values, mask)
        hidden, cache = self.step(start, cache)
        return hidden[:, 0], cache

    def step(self, tokens: jax.Array, cache: T5Cache) -> tuple[jax.Array, T5Cache]:
        """Read one new token of every beam, as `Decoder.step` does."""
        K = tokens.shape[1]
        seen = see_own(cache.seen, cache.length)
        at = jax.lax.dynamic_slice_in_dim(cache.positions, cache.length, 1, axis=1)
        bias = self._bias(self.decoder_bias, at, cache.positions, bidirectional=False)

        # The own tokens' cache is carried, so that XLA writes the new slots in place.
        def layer(carry: tuple, scanned: tuple) -> tuple[tuple, None]:
            x, *cached = carry
            weights, cross, i = scanned
            x = rows(x)
            new = weights.attention.keys_values(weights.attention.normed(x))
            cached = write(cached, new, i, cache.length)
            x = weights.attention(x, *(part[i] for part in cached), seen, bias)
            x = weights.cross(x, *cross, cache.mask[:, None])
            return (weights.mlp(x), *cached), None

        cross = cache.cross_keys, cache.cross_values
        (x, keys, values), _ = jax.lax.scan(
            layer,
            (self.embed(tokens), cache.keys, cache.values),
            (self.decoder, cross, jnp.arange(self.config.num_decoder_layers)),
        )
        x = rms_norm(x, self.decoder_norm[...], self.config.norm_eps)
        return x, cache._replace(keys=keys, values=values, seen=seen, length=cache.length + K)
