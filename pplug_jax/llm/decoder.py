"""One causal decoder for every decoder-only LLM; families differ in `DecoderConfig` alone.

Numerics follow `transformers`: norms, softmax and RoPE angles in float32, the rest in the weights'
dtype.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pplug_jax.nn.attention import attend
from pplug_jax.nn.linear import linear
from pplug_jax.nn.remat import checkpointed
from pplug_jax.nn.splash import OwnText, pays
from pplug_jax.nn.variables import Frozen, abstract_weights
from pplug_jax.runtime.mesh import constrain, rows


@dataclasses.dataclass(frozen=True)
class Llama3Stretch:
    """Llama 3.1's choice of the frequencies that `Rope.factor` divides (`rope_type: llama3`)."""

    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def kept(self, rope: "Rope", head_dim: int) -> jax.Array:
        """Return how much of each frequency stays undivided, (head_dim / 2,) in [0, 1]."""
        turns = self.original_max_position_embeddings * rope.unstretched(head_dim) / (2 * math.pi)
        smooth = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return jnp.clip(smooth, 0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN's choice of those frequencies (arXiv 2309.00071, `rope_type: yarn`).

    Attributes:
        original_max_position_embeddings: the original length.
        beta_fast: a frequency of at least so many turns within the original length stays as it is.
        beta_slow: a frequency of at most so many turns is divided.
        truncate: round the dimensions of these two frequencies outwards.
    """

    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def kept(self, rope: "Rope", head_dim: int) -> jax.Array:
        """Return how much of each frequency stays undivided, (head_dim / 2,) in [0, 1]."""

        def dimension(turns: float) -> float:
            wavelength = self.original_max_position_embeddings / (turns * 2 * math.pi)
            return head_dim * math.log(wavelength) / (2 * math.log(rope.theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        ramp = (jnp.arange(head_dim // 2, dtype=jnp.float32) - low) / (high - low or 0.001)
        return 1 - jnp.clip(ramp, 0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embeddings: angles are position * frequency.

    Attributes:
        theta: the base of the frequencies.
        factor: divides the frequencies, all of them or those that `stretch` chooses.
        stretch: its `kept` returns how much of each frequency stays undivided.
    """

    theta: float
    factor: float = 1.0
    stretch: Llama3Stretch | Yarn | None = None

    def unstretched(self, head_dim: int) -> jax.Array:
        """Return the undivided frequencies, (head_dim / 2,) float32."""
        return self.theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)

    def frequencies(self, head_dim: int) -> jax.Array:
        """Return the frequencies, (head_dim / 2,) float32."""
        inverse = self.unstretched(head_dim)
        if self.stretch is None:
            return inverse / self.factor
        kept = self.stretch.kept(self, head_dim)
        return (1 - kept) * inverse / self.factor + kept * inverse


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shapes and variants of a decoder; the defaults of the variants are Llama's.

    Attributes:
        vocab_size: V.
        hidden_size: D.
        intermediate_size: the MLP's width.
        num_layers: the number of layers.
        num_heads: the number of query heads.
        num_kv_heads: the number of key and value heads.
        head_dim: the width of a head.
        norm_eps: of the norms.
        rope: rotary position embeddings.
        tied_head: whether the output head is the embedding table.
        max_length: the most tokens that the LLM was made for.
        eos_ids: the tokens at which generation stops.
        pad_id: the padding token.
        activation: a key of ACTIVATIONS.
        embedding_scale: `embed` multiplies by it.
        norm_offset: norms scale by 1 + weight instead of by weight.
        qkv_bias: query, key and value projections have biases.
        qk_norm: each head's queries and keys are normalised before RoPE.
        post_norms: attention and MLP are normalised again before they are added.
        attention_scale: of the scores; None is head_dim ** -0.5.
        attention_cap: scores x become cap * tanh(x / cap).
        logit_cap: logits x become cap * tanh(x / cap).
        sliding: for each layer, whether it sees only the `window` newest tokens, the current one
            included, and uses `sliding_rope`; empty: no layer does.
        window: the length of the window.
        sliding_rope: the sliding layers' RoPE; None is `rope`.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: Rope
    tied_head: bool
    max_length: int
    eos_ids: tuple[int, ...]
    pad_id: int
    activation: str = "silu"
    embedding_scale: float = 1.0
    norm_offset: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    attention_scale: float | None = None
    attention_cap: float | None = None
    logit_cap: float | None = None
    sliding: tuple[bool, ...] = ()
    window: int | None = None
    sliding_rope: Rope | None = None


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class Context(NamedTuple):
    """Keys and values of texts that others go on from, made by `Decoder.read`.

    Each of P texts serves B / P consecutive rows of a batch.

    Attributes:
        keys: (layers, P, S, kv_heads, head_dim).
        values: (layers, P, S, kv_heads, head_dim).
        positions: (P, S) float32, the slots' places in the text.
        mask: (P, S) bool.
    """

    keys: jax.Array
    values: jax.Array
    positions: jax.Array
    mask: jax.Array

    def for_rows(self, count: int) -> tuple[jax.Array, jax.Array]:
        """Return `positions` and `mask` as `count` rows of a batch see them, (B, S) each."""
        return jax.tree.map(
            lambda x: jnp.repeat(x, count // len(x), axis=0), (self.positions, self.mask)
        )


class KeysValues(NamedTuple):
    """A `Context`'s keys and values by text, which lie on the mesh as `AXES` says.

    Attributes:
        keys: (P, layers, S, kv_heads, head_dim).
        values: (P, layers, S, kv_heads, head_dim).
    """

    keys: jax.Array
    values: jax.Array

    @classmethod
    def of(cls, context: Context) -> "KeysValues":
        by_text = (jnp.moveaxis(x, 1, 0) for x in (context.keys, context.values))
        return cls(*(constrain(x, *AXES) for x in by_text))

    def context(self, mask: jax.Array) -> Context:
        """Return them as a context of texts with mask (P, S) bool."""
        keys, values = (jnp.moveaxis(x, 0, 1) for x in self)
        return Context(keys, values, positions(mask), mask)


AXES = ("batch", None, None, "kv_heads", None)


class KVCache(NamedTuple):
    """Keys and values of the tokens so far; a slot holds a token of a row, or padding, or nothing.

    A row's K beams share the slots of its prompt, the first ones. Then every step fills K slots,
    one a beam, and `seen` says which of them a beam descends from: no beam's tokens are ever
    copied.

    Attributes:
        keys: (layers, B, S, kv_heads, head_dim).
        values: (layers, B, S, kv_heads, head_dim).
        positions: (B, S) float32, the slots' places in the text.
        seen: (B, K, S) bool.
        length: () int32, the slots taken, the same for all rows.
        context: the texts that the rows go on from, if any; all beams see them.
    """

    keys: jax.Array
    values: jax.Array
    positions: jax.Array
    seen: jax.Array
    length: jax.Array
    context: Context | None = None


def see_own(seen: jax.Array, length: jax.Array) -> jax.Array:
    """Let each beam see its slot among the K slots that the next step fills: seen (B, K, S)."""
    B, K, _ = seen.shape
    slots = jnp.broadcast_to(jnp.eye(K, dtype=bool), (B, K, K))
    return jax.lax.dynamic_update_slice(seen, slots, (0, 0, length))


def write(
    cached: Sequence[jax.Array], new: Sequence[jax.Array], layer: jax.Array, length: jax.Array
) -> list[jax.Array]:
    """Return all keys and values (layers, B, S, ...) with a step's (B, K, ...) of one layer."""
    return [
        jax.lax.dynamic_update_slice(old, added[None], (layer, 0, length, 0, 0))
        for old, added in zip(cached, new, strict=True)
    ]


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, offset: bool = False) -> jax.Array:
    """Divide x by its root mean square, times `weight`, or times 1 + `weight` with `offset`."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    if offset:
        return (y * (1 + weight.astype(jnp.float32))).astype(x.dtype)
    return weight * y.astype(x.dtype)


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """Return cap * tanh(x / cap), or x without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Apply RoPE to x (B, L, heads, head_dim) with angles (B, L, head_dim / 2).

    Halves are rotated as in `transformers`.
    """
    cos, sin = (wave(angles)[:, :, None].astype(x.dtype) for wave in (jnp.cos, jnp.sin))
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
        norm = (config.hidden_size, "norm")
        self.attention_norm = stacked(norm)
        self.query = stacked(embed, heads)
        self.key = stacked(embed, kv_heads)
        self.value = stacked(embed, kv_heads)
        self.output = stacked(heads, embed)
        self.mlp_norm = stacked(norm)
        self.gate = stacked(embed, mlp)
        self.up = stacked(embed, mlp)
        self.down = stacked(mlp, embed)
        self.query_bias = stacked(heads) if config.qkv_bias else None
        self.key_bias = stacked(kv_heads) if config.qkv_bias else None
        self.value_bias = stacked(kv_heads) if config.qkv_bias else None
        self.query_norm = stacked((config.head_dim, "norm")) if config.qk_norm else None
        self.key_norm = stacked((config.head_dim, "norm")) if config.qk_norm else None
        self.attention_post_norm = stacked(norm) if config.post_norms else None
        self.mlp_post_norm = stacked(norm) if config.post_norms else None
        self.config = config

    def __call__(
        self,
        x: jax.Array,
        angles: jax.Array,
        mask: jax.Array | OwnText,
        context_mask: jax.Array | None = None,
        context: tuple[jax.Array, jax.Array] | None = None,
        extend: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]] = lambda key, value: (
            key,
            value,
        ),
    ) -> jax.Array:
        """Apply a layer, (B, L, D) -> (B, L, D).

        Args:
            x: (B, L, D).
            angles: (B, L, head_dim / 2), RoPE's.
            mask: (B, L or 1, S) bool or an `OwnText`, which keys each query sees.
            context_mask: (B, L or 1, S) bool, the same for the context's keys.
            context: this layer's keys and values of a `Context`.
            extend: turns the call's keys and values into all of the text's.
        """
        config = self.config

        def norm(x: jax.Array, weight: Frozen | None) -> jax.Array:
            if weight is None:
                return x
            return rms_norm(x, weight[...], config.norm_eps, config.norm_offset)

        def heads(x: jax.Array, weight: Frozen, bias: Frozen | None) -> jax.Array:
            x = linear(x, weight)
            x = x if bias is None else x + bias[...]
            return x.reshape(*x.shape[:2], -1, config.head_dim)

        h = norm(x, self.attention_norm)
        query = rotate(norm(heads(h, self.query, self.query_bias), self.query_norm), angles)
        key = rotate(norm(heads(h, self.key, self.key_bias), self.key_norm), angles)
        key, value = extend(key, heads(h, self.value, self.value_bias))
        h = attend(
            query,
            key,
            value,
            mask,
            config.attention_scale,
            config.attention_cap,
            before=None if context is None or context_mask is None else (*context, context_mask),
        )
        h = linear(h.reshape(*x.shape[:2], -1), self.output)
        x = x + norm(h, self.attention_post_norm)
        h = norm(x, self.mlp_norm)
        h = ACTIVATIONS[config.activation](linear(h, self.gate)) * linear(h, self.up)
        return x + norm(linear(h, self.down), self.mlp_post_norm)


class Decoder(nnx.Module):
    """A frozen decoder-only LLM.

    It is built abstract (`jax.ShapeDtypeStruct` weights), and `load_llm` fills it.

    The trainer, the evaluator and the generator use only `embed`, `target_hidden`, `unembed`,
    `prefill`, `step`, `embedding_norm`, `decoder_only`, `prompt_end` and `config.{hidden_size,
    vocab_size, max_length, eos_ids, pad_id}`, and of a decoder-only LLM also `read`.
    """

    decoder_only: bool = True  # reads prompt and target as one text
    prompt_end: tuple[int, ...] = ()  # the tokens that close a prompt

    def __init__(self, config: DecoderConfig, dtype: str | jnp.dtype = "bfloat16"):
        weight = abstract_weights(dtype)
        vocab, embed = (config.vocab_size, "vocab"), (config.hidden_size, "embed")
        self.embedding = weight(vocab, embed)
        self.layers = Layers(config, weight)
        self.norm = weight((config.hidden_size, "norm"))
        self.head = None if config.tied_head else weight(vocab, embed)
        self.config = config

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Embed tokens, (B, L) int32 -> (B, L, D), scaled as the model expects `inputs_embeds`."""
        embeds = jnp.take(self.embedding[...], tokens, axis=0)
        return embeds * jnp.asarray(self.config.embedding_scale, embeds.dtype)

    def embedding_norm(self) -> jax.Array:
        """Return the mean L2 norm of all embedded tokens, () float32: the scale for soft tokens."""
        return self.config.embedding_scale * mean_norm(self.embedding[...], self.config.vocab_size)

    def _views(
        self, at: jax.Array, *seen: tuple[jax.Array, jax.Array | OwnText] | None
    ) -> Callable[[jax.Array], tuple]:
        """Return a function from whether a layer slides to what it sees: RoPE's angles, and masks.

        Args:
            at: (B, L) float32, the queries' positions.
            *seen: for each group of keys their positions, (B, S) float32, and what a layer with an
                endless window sees of them, (B, L or 1, S) bool or an `OwnText`; None gives the
                mask None.
        """
        config = self.config

        def angles(rope: Rope) -> jax.Array:
            return at[..., None] * rope.frequencies(config.head_dim)

        full = angles(config.rope), *(keys and keys[1] for keys in seen)
        if (window := config.window) is None:
            return lambda slides: full

        def near(slots: jax.Array, visible: jax.Array | OwnText) -> jax.Array | OwnText:
            if isinstance(visible, OwnText):
                return dataclasses.replace(visible, slides=jnp.bool(True))
            return visible & (at[:, :, None] - slots[:, None] < window)

        local = angles(config.sliding_rope or config.rope), *(keys and near(*keys) for keys in seen)
        return lambda slides: jax.tree.map(functools.partial(jnp.where, slides), local, full)

    def _own_views(
        self, mask: jax.Array, context: Context | None
    ) -> tuple[jax.Array, Callable[[jax.Array], tuple]]:
        """Return the positions of texts that see themselves and their context, and their views.

        Args:
            mask: (B, L) bool.
            context: the texts that they go on from, if any.
        """
        if context is None:
            at = positions(mask)
            alone = pays(mask.shape[1])
            visible = OwnText(mask, jnp.bool(False), self.config.window) if alone else causal(mask)
            return at, self._views(at, (at, visible), None)
        slots, context_mask = context.for_rows(len(mask))
        at = positions(mask) + jnp.sum(context_mask, axis=1, keepdims=True)
        return at, self._views(at, (at, causal(mask)), (slots, context_mask[:, None]))

    def _scanned(self, context: Context | None = None) -> tuple:
        """Return the layers, which of them slide, and each layer's part of the context."""
        config = self.config
        slides = jnp.array(config.sliding or (False,) * config.num_layers)
        return self.layers, slides, context and (context.keys, context.values)

    def hidden(
        self,
        inputs_embeds: jax.Array,
        mask: jax.Array,
        remat: bool = False,
        context: Context | None = None,
    ) -> jax.Array:
        """Return the last hidden states, (B, L, D).

        Args:
            inputs_embeds: (B, L, D).
            mask: (B, L) bool; padding stands on either side of a text.
            remat: recompute the layers' activations in the backward pass.
            context: the texts that these go on from.
        """
        _, view = self._own_views(mask, context)

        def layer(x: jax.Array, scanned: tuple) -> tuple[jax.Array, None]:
            weights, slides, before = scanned
            return weights(rows(x), *view(slides), before), None

        x = inputs_embeds.astype(self.embedding.dtype)
        x, _ = jax.lax.scan(checkpointed(layer, remat), x, self._scanned(context))
        return self._final_norm(x)

    def _with_keys(
        self, inputs_embeds: jax.Array, mask: jax.Array, context: Context | None = None
    ) -> tuple[jax.Array, Context]:
        """Return `hidden` before the final norm, and the texts as a context."""
        at, view = self._own_views(mask, context)

        def layer(x: jax.Array, scanned: tuple) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            weights, slides, before = scanned
            keys_values = []

            def keep(key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
                keys_values.append((key, value))
                return key, value

            return weights(rows(x), *view(slides), before, keep), keys_values[0]

        x = inputs_embeds.astype(self.embedding.dtype)
        x, (keys, values) = jax.lax.scan(layer, x, self._scanned(context))
        return x, Context(keys, values, at, mask)

    def read(self, inputs_embeds: jax.Array, mask: jax.Array) -> Context:
        """Read texts (P, S, D) with mask (P, S) bool into a context that others can go on from.

        The context depends on nothing that follows. So if soft tokens stand behind a prompt, the
        prompt is read once for all users, and no gradient runs through it.
        """
        return self._with_keys(inputs_embeds, mask)[1]

    def _final_norm(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.norm[...], self.config.norm_eps, self.config.norm_offset)

    def target_hidden(
        self,
        inputs_embeds: jax.Array,
        mask: jax.Array,
        targets: jax.Array,
        target_mask: jax.Array,
        remat: bool = False,
        context: Context | None = None,
    ) -> jax.Array:
        """Return the hidden state that predicts each target token.

        Args:
            inputs_embeds: (B, L, D), the prompt and, right behind it, the target but for its last
                token; an LLM with an encoder reads the prompt alone.
            mask: (B, L) bool, padding behind.
            targets: (B, T) int32, the target, which an LLM with an encoder reads here.
            target_mask: (B, T) bool, padding behind.
            remat: recompute the layers' activations in the backward pass.
            context: the texts that the prompts go on from.

        Returns:
            (B, T, D), anything at padding; `unembed` makes logits of it.
        """
        hidden = self.hidden(inputs_embeds, mask, remat, context)
        first = jnp.sum(mask, axis=1, keepdims=True) - jnp.sum(target_mask, axis=1, keepdims=True)
        at = first + jnp.arange(targets.shape[1])
        return jnp.take_along_axis(hidden, at[..., None], axis=1, mode="clip")

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Return logits of hidden states, (..., D) -> (..., padded V) float32; padding has -inf."""
        table = self.embedding if self.head is None else self.head
        return unembed(hidden, table[...], self.config.vocab_size, self.config.logit_cap)

    def logits(
        self, inputs_embeds: jax.Array, mask: jax.Array, targets: jax.Array | None = None
    ) -> jax.Array:
        """Return next-token logits, float32.

        Args:
            inputs_embeds: (B, L, D), the prompt.
            mask: (B, L) bool.
            targets: (B, T) int32, tokens behind the prompt.

        Returns:
            (B, L, V) at the prompt's tokens, or (B, T, V) at the targets if they are given.
        """
        if targets is None:
            hidden = self.hidden(inputs_embeds, mask)
        else:
            embeds = jnp.concatenate(
                [inputs_embeds.astype(self.embedding.dtype), self.embed(targets)], axis=1
            )
            text_mask = jnp.concatenate([mask, jnp.ones(targets.shape, bool)], axis=1)
            order = jnp.argsort(text_mask, axis=1, stable=True)  # no padding inside a text
            embeds = jnp.take_along_axis(embeds, order[..., None], axis=1)
            text_mask = jnp.take_along_axis(text_mask, order, axis=1)
            hidden = self.hidden(embeds, text_mask)[:, mask.shape[1] :]
        return self.unembed(hidden)[..., : self.config.vocab_size]

    def prefill(
        self,
        inputs_embeds: jax.Array,
        mask: jax.Array,
        max_new_tokens: int,
        num_beams: int = 1,
        context: Context | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """Read the prompt, or what follows the context.

        Returns:
            the hidden state that predicts the first new token, (B, D), and the cache with room for
                the new tokens.
        """
        x, (keys, values, at, _) = self._with_keys(inputs_embeds, mask, context)
        x = self._final_norm(last(x, mask))
        steps = max_new_tokens - 1  # the last token is not read
        room = (0, steps * num_beams)
        pad = ((0, 0), (0, 0), room, (0, 0), (0, 0))
        new = jnp.max(at, axis=1, keepdims=True) + 1 + jnp.repeat(jnp.arange(steps), num_beams)
        return x, KVCache(
            jnp.pad(keys, pad),
            jnp.pad(values, pad),
            jnp.concatenate([at, new], axis=1),
            jnp.pad(jnp.repeat(mask[:, None], num_beams, axis=1), ((0, 0), (0, 0), room)),
            jnp.int32(mask.shape[1]),
            context,
        )

    def step(self, tokens: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """Read one new token of every beam.

        Args:
            tokens: (B, K) int32.
            cache: the keys and values so far.

        Returns:
            the hidden states that predict the next tokens, (B, K, D), and the longer cache.
        """
        seen = see_own(cache.seen, cache.length)
        at = jax.lax.dynamic_slice_in_dim(cache.positions, cache.length, 1, axis=1)
        before = None
        if cache.context is not None:
            slots, context_mask = cache.context.for_rows(len(tokens))
            before = slots, context_mask[:, None]
        view = self._views(at, (cache.positions, seen), before)

        # The cache is carried, not scanned over, so that XLA writes the new slots in place.
        def layer(carry: tuple, scanned: tuple) -> tuple[tuple, None]:
            x, *cached = carry
            (weights, slides, context), i = scanned
            after = []

            def extend(*new: jax.Array) -> tuple[jax.Array, ...]:
                after.extend(write(cached, new, i, cache.length))
                return tuple(part[i] for part in after)

            x = weights(rows(x), *view(slides), context, extend)
            return (x, *after), None

        (x, keys, values), _ = jax.lax.scan(
            layer,
            (self.embed(tokens), cache.keys, cache.values),
            (self._scanned(cache.context), jnp.arange(self.config.num_layers)),
        )
        length = cache.length + tokens.shape[1]
        return self._final_norm(x), cache._replace(
            keys=keys, values=values, seen=seen, length=length
        )


def mean_norm(table: jax.Array, vocab_size: int) -> jax.Array:
    """Return the mean L2 norm of the first `vocab_size` rows, () float32."""
    return jnp.mean(jnp.linalg.norm(table[:vocab_size].astype(jnp.float32), axis=-1))


def unembed(
    hidden: jax.Array, table: jax.Array, vocab_size: int, cap: float | None = None
) -> jax.Array:
    """Return logits, (B, ..., D), (padded V, D) -> (B, ..., padded V) float32.

    They are -inf from `vocab_size` on.
    """
    hidden = rows(hidden)
    logits = jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)
    logits = soft_cap(constrain(logits, "batch", *[None] * (logits.ndim - 2), "vocab"), cap)
    if len(table) == vocab_size:
        return logits
    return jnp.where(jnp.arange(len(table)) < vocab_size, logits, -jnp.inf)


def positions(mask: jax.Array) -> jax.Array:
    """Return each token's place among its row's tokens, (B, L) bool -> (B, L) float32.

    Padding is not counted.
    """
    return jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0).astype(jnp.float32)


def causal(mask: jax.Array) -> jax.Array:
    """Return which slots each slot sees, (B, L) bool -> (B, L, L) bool."""
    L = mask.shape[1]
    return jnp.tril(jnp.ones((L, L), bool)) & mask[:, None]


def last(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Return x at each row's last token, (B, L, D), (B, L) bool -> (B, D)."""
    index = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    return jnp.take_along_axis(x, index[:, None, None], axis=1)[:, 0]
