"""The paper's plug: a user's history and the input at hand become soft prompt tokens.

PPlug, arXiv 2409.11901, section 3:

q = Enc_inp(x)                              trained
w = softmax_i(q . H_i / temperature)        H_i = Enc_his(h_i), frozen, from the history store
P = W2 (sum_i w_i GELU(W1 H_i + b1)) + b2   the paper's sum_i w_i Proj(H_i): exact, as sum_i w_i = 1
I = MLP(v)
soft prompt = scale * [I ; P]               scale = mean norm of the LLM's embedding rows

Two extensions, each off in the paper:

recency     w_i ~ exp(q . H_i / temperature) * (1 + age_i)^-softplus(rate), age_i the number of
            newer items
features    soft prompt = scale * [I ; P ; F ..], each F made like P, by another projector, from a
            feature of the items (feed/features.py) that H_i may lack: `form`, how the user writes,
            or `difference`, H_i - mean of what other users wrote on similar things (DEP, arXiv
            2507.20849)
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pplug_jax.encoder.bert import Bert, gelu
from pplug_jax.feed.batches import Batch, PlugInputs
from pplug_jax.feed.features import FEATURES
from pplug_jax.llm import LLM
from pplug_jax.nn.variables import Frozen
from pplug_jax.plugs.base import Kind, Plug, parameter_count
from pplug_jax.plugs.reading import PAPER, Reading, features_of, soft_tokens
from pplug_jax.runtime.mesh import rows
from pplug_jax.settings import PlugSettings, Settings

# E[GELU(z)^2] for z ~ N(0, 1): what the first layer hands to the second at initialisation.
GELU_POWER = 0.4252
PAPER_PLUG = PlugSettings()
FIRST_RECENCY = 0.01  # softplus(rate) at initialisation: the oldest of 512 items loses 6%


class Projector(nnx.Module):
    """Linear - GELU (exact) - Linear from unit vectors (..., E) to (..., tokens, out).

    The outputs have about unit norm at initialisation. The layers are called one by one, since the
    pooler sums between them.
    """

    def __init__(self, size: int, hidden: int, out: int, tokens: int, rngs: nnx.Rngs):
        def normal(shape: tuple[int, ...], std: float, *axes: str) -> nnx.Param:
            return nnx.Param(jax.random.normal(rngs.params(), shape) * std, axes=axes)

        self.up = normal((size, hidden), 1.0, "encoder", "embed")
        self.up_bias = nnx.Param(jnp.zeros(hidden), axes=("bias",))
        # A matrix, not (hidden, tokens, out): so XLA's CPU backend makes its gradient in the
        # parameter's own layout (the layer alone 23 ms instead of 104 at 2048 x 16 x 128).
        self.down = normal(
            (hidden, tokens * out), (GELU_POWER * hidden * out) ** -0.5, "embed", "llm"
        )
        self.down_bias = nnx.Param(jnp.zeros(tokens * out), axes=("bias",))
        self.tokens = tokens

    def first(self, x: jax.Array) -> jax.Array:
        """Apply the first layer and GELU, (..., E) -> (..., hidden)."""
        return gelu(x @ self.up[...].astype(x.dtype) + self.up_bias[...].astype(x.dtype))

    def second(self, h: jax.Array) -> jax.Array:
        """Apply the second layer, (..., hidden) -> (..., tokens, out)."""
        out = h @ self.down[...].astype(h.dtype) + self.down_bias[...].astype(h.dtype)
        return out.reshape(*h.shape[:-1], self.tokens, -1)


def attention_weights(
    query: jax.Array,
    history: jax.Array,
    mask: jax.Array,
    temperature: jax.Array | float,
    nearest: int = 0,
    penalty: jax.Array | None = None,
) -> jax.Array:
    """Return softmax_i(q . H_i / temperature - penalty_i) over the unmasked items, (B, H) float32.

    The weights of an empty history are all 0.

    Args:
        query: (B, E), unit norm.
        history: (B, H, E), unit norm.
        mask: (B, H) bool.
        temperature: divides the scores.
        nearest: keep only so many items, those of the highest score; 0 keeps all.
        penalty: (B, H), finite; None is none.
    """
    scores = (
        jnp.einsum("be,bhe->bh", query, history, preferred_element_type=jnp.float32) / temperature
    )
    if penalty is not None:
        scores -= penalty
    scores = jnp.where(mask, scores, -jnp.inf)
    if 0 < nearest < scores.shape[1]:
        mask &= scores >= jax.lax.top_k(scores, nearest)[0][:, -1:]
        scores = jnp.where(mask, scores, -jnp.inf)
    # The weights do not depend on `top`. Through the maximum a gradient would be 0 / 0 where XLA
    # makes the scores twice, rounded otherwise, and finds none of them equal to it.
    top = jax.lax.stop_gradient(jnp.max(scores, axis=1, keepdims=True))
    weights = jnp.where(mask, jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0)), 0)
    return weights / jnp.maximum(jnp.sum(weights, axis=1, keepdims=True), 1e-30)


def pool(weights: jax.Array, units: jax.Array) -> jax.Array:
    """Return sum_i w_i units_i, (B, H), (B, H, U) -> (B, U)."""
    return jnp.einsum("bh,bhd->bd", weights.astype(units.dtype), units)


class UserEmbedder(Plug):
    """The paper's plug.

    Args:
        input_encoder: Enc_inp with weights of `nnx.Param`, which is trained, as in the paper. With
            None it stays frozen, and the plug is called with the vectors that it makes of inputs.
        size: E.
        llm_size: D.
        scale: the soft tokens' norm at initialisation, kept with the weights.
        settings: k, the projector's size and the extensions; the defaults are the paper's.
        rngs: draws the parameters.
    """

    def __init__(
        self,
        input_encoder: Bert | None,
        size: int,
        llm_size: int,
        scale: jax.Array | float,
        settings: PlugSettings = PAPER_PLUG,
        *,
        rngs: nnx.Rngs,
    ):
        self.input_encoder = input_encoder
        k, hidden = settings.num_persona_tokens, settings.projector_size or llm_size
        self.projector = Projector(size, hidden, llm_size, k, rngs)
        self.instruction_projector = Projector(size, llm_size, llm_size, 1, rngs)
        v = jax.random.normal(rngs.params(), (size,))
        self.instruction = nnx.Param(v / jnp.linalg.norm(v), axes=("encoder",))

        def null_tokens() -> nnx.Param:
            null = jax.random.normal(rngs.params(), (k, llm_size)) / math.sqrt(llm_size)
            return nnx.Param(null, axes=("tokens", "llm"))

        self.null_persona = null_tokens()
        logarithm = jnp.float32(math.log(settings.temperature))
        learned = settings.learned_temperature
        self.log_temperature = nnx.Param(logarithm, axes=()) if learned else None
        rate = jnp.float32(math.log(math.expm1(FIRST_RECENCY)))
        self.recency_rate = nnx.Param(rate, axes=()) if settings.recency else None
        # Drawn last, so that no other parameter depends on whether they are there. Attributes of
        # their own name each, under which checkpoints have them.
        self.features = tuple(sorted(settings.features))
        for name in self.features:
            width = FEATURES[name].width(size)
            made = Projector(width, hidden, llm_size, k, rngs)
            setattr(self, f"{name}_projector", made)
            setattr(self, f"null_{name}", null_tokens())
        self.temperature = settings.temperature
        self.scale = Frozen(jnp.float32(scale), axes=())
        self.dtype = settings.dtype

    def __call__(
        self, inputs: PlugInputs, *, reading: Reading = PAPER, remat: bool = False
    ) -> jax.Array:
        """Return the soft prompt [I ; P], and behind it the features' tokens.

        Args:
            inputs: of B users, with at least the features of `reading.features_of`.
            reading: static; the paper's method or one of its ablations.
            remat: recompute the input encoder's activations in the backward pass.

        Returns:
            (B, 1 + k, D) in the computation's dtype; k more for each feature, and 1 less without
                the instruction.
        """
        weights, mask = self.attention(inputs, reading=reading, remat=remat), inputs.history_mask

        def tokens(projector: Projector, vectors: jax.Array, null: nnx.Param) -> jax.Array:
            # A masked item may hold anything, and 0 * NaN is NaN: hence the `where`.
            vectors = jnp.where(mask[..., None], vectors, 0).astype(self.dtype)
            made = projector.second(pool(weights, rows(projector.first(vectors))))
            empty = ~jnp.any(mask, axis=1)
            return jnp.where(empty[:, None, None], null[...].astype(self.dtype), made)

        parts = [tokens(self.projector, inputs.history, self.null_persona)]
        for name in self.features:
            projector, null = getattr(self, f"{name}_projector"), getattr(self, f"null_{name}")
            parts.append(tokens(projector, inputs.features[name], null))
        if reading.instruction:
            vector = self.instruction[...].astype(self.dtype)
            made = self.instruction_projector.second(self.instruction_projector.first(vector))
            parts.insert(0, jnp.broadcast_to(made, (len(mask), *made.shape)))
        scale = jax.lax.stop_gradient(self.scale[...]).astype(self.dtype)
        return jnp.concatenate(parts, axis=1) * scale

    def attention(
        self, inputs: PlugInputs, *, reading: Reading = PAPER, remat: bool = False
    ) -> jax.Array:
        """Return the items' weights, (B, H) float32; the arguments are those of `__call__`."""
        mask = inputs.history_mask
        if reading.uniform:
            count = jnp.sum(mask, axis=1, keepdims=True)
            return mask / jnp.maximum(count, 1).astype(jnp.float32)
        temperature: Any = (
            self.temperature if self.log_temperature is None else jnp.exp(self.log_temperature[...])
        )
        vectors = inputs.query
        if self.input_encoder is not None and jnp.issubdtype(vectors.dtype, jnp.integer):
            vectors = self.input_encoder(vectors, inputs.query_mask, remat)
        vectors = jnp.repeat(vectors, len(mask) // len(vectors), axis=0)
        history = jnp.where(mask[..., None], inputs.history, 0).astype(jnp.float32)
        penalty = None
        if self.recency_rate is not None:
            age = jnp.where(mask, inputs.features["age"][..., 0], 0)
            penalty = jax.nn.softplus(self.recency_rate[...]) * jnp.log1p(age)
        return attention_weights(vectors, history, mask, temperature, reading.top, penalty)

    def adapt(self, llm: LLM, batch: Batch, reading: Reading, remat: bool) -> tuple[LLM, jax.Array]:
        return llm, self(batch.plug_inputs, reading=reading, remat=remat)

    def trained(self, reading: Reading) -> int:
        idle: list[nnx.Module | nnx.Param] = []
        if reading.uniform and self.input_encoder is not None:
            idle.append(self.input_encoder)
        if not reading.instruction:
            idle += [self.instruction_projector, self.instruction]
        if not reading.history:
            idle += [
                self.projector,
                *(getattr(self, f"{name}_projector") for name in self.features),
            ]
        if reading.uniform:
            idle += [x for x in (self.recency_rate, self.log_temperature) if x is not None]
        return parameter_count(self, nnx.Param) - sum(map(_size, idle))


def _size(part: nnx.Module | nnx.Param) -> int:
    return part.get_value().size if isinstance(part, nnx.Param) else parameter_count(part)


def _trains_encoder(config: Settings) -> bool:
    return config.plug.encoder_rate > 0


def build(
    config: Settings, llm: LLM, encoder: Bert | None, scale: jax.Array, key: jax.Array
) -> UserEmbedder:
    """Make a plug whose Enc_inp is `encoder`, if it is trained; the key draws the other parts."""
    assert encoder is not None  # as `Kind.reads_input` asks
    return UserEmbedder(
        encoder if _trains_encoder(config) else None,
        encoder.config.hidden_size,
        llm.config.hidden_size,
        scale,
        config.plug,
        rngs=nnx.Rngs(key),
    )


KIND = Kind(
    build,
    reads_input=True,
    trains_encoder=_trains_encoder,
    soft_tokens=lambda config, reading: soft_tokens(config.plug, reading),
    features=lambda config: features_of(config.plug),
)
