"""The paper: a user's history and the input at hand become soft prompt tokens.

PPlug, arXiv 2409.11901, section 3:

q = Enc_inp(x)                              trained
w = softmax_i(q . H_i / temperature)        H_i = Enc_his(h_i), frozen, from the history store
P = W2 (sum_i w_i GELU(W1 H_i + b1)) + b2   the paper's sum_i w_i Proj(H_i): exact, as sum_i w_i = 1
I = MLP(v)
soft prompt = scale * [I ; P]               scale = mean norm of the LLM's embedding rows
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pplug_jax.encoder.bert import Bert
from pplug_jax.mesh import rows

# E[GELU(z)^2] for z ~ N(0, 1): what the first layer hands to the second at initialisation.
GELU_POWER = 0.4252


class Projector(nnx.Module):
    """Linear - GELU (exact) - Linear from unit vectors (..., E) to (..., out).

    The outputs are of about unit norm at initialisation. The layers are called one by one, since
    the pooler sums between them.
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
        """(..., E) -> (..., hidden)."""
        return jax.nn.gelu(
            x @ self.up[...].astype(x.dtype) + self.up_bias[...].astype(x.dtype), approximate=False
        )

    def second(self, h: jax.Array) -> jax.Array:
        """(..., hidden) -> (..., tokens, out)."""
        out = h @ self.down[...].astype(h.dtype) + self.down_bias[...].astype(h.dtype)
        return out.reshape(*h.shape[:-1], self.tokens, -1)


def attention_weights(
    query: jax.Array,
    history: jax.Array,
    mask: jax.Array,
    temperature: jax.Array | float,
    nearest: int = 0,
) -> jax.Array:
    """softmax_i(q . H_i / temperature) over the unmasked items; all zero for an empty history.

    Args:
        query: (B, E), unit norm. history: (B, H, E), unit norm. mask: (B, H) bool.
        nearest: only so many items, those of the highest score; 0 is all.

    Returns:
        (B, H) float32.
    """
    scores = (
        jnp.einsum("be,bhe->bh", query, history, preferred_element_type=jnp.float32) / temperature
    )
    scores = jnp.where(mask, scores, -jnp.inf)
    if 0 < nearest < scores.shape[1]:
        mask &= scores >= jax.lax.top_k(scores, nearest)[0][:, -1:]
        scores = jnp.where(mask, scores, -jnp.inf)
    top = jnp.max(scores, axis=1, keepdims=True)
    weights = jnp.where(mask, jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0)), 0)
    return weights / jnp.maximum(jnp.sum(weights, axis=1, keepdims=True), 1e-30)


class Reading(NamedTuple):
    """How a plug reads a user; the defaults are the paper's method, the others its ablations.

    uniform: weigh all items alike instead of by the input. top: only that many items, those
    nearest to the input; 0 is all. instruction: whether I stands in front of P.
    """

    uniform: bool = False
    top: int = 0
    instruction: bool = True


PAPER = Reading()


class UserEmbedder(nnx.Module):
    """The plug: all that is trained.

    Args of the constructor:
        input_encoder: Enc_inp, its weights `nnx.Param`.
        llm_size: D. scale: the soft tokens' norm at initialisation.
        num_persona_tokens: k; 1 is the paper. projector_size: the persona projector's
            hidden units; 0 is D, the paper.
        temperature: of the attention; 1.0 is the paper. learned_temperature: train it from there.
        dtype: of the computation; parameters stay float32.
    """

    def __init__(
        self,
        input_encoder: Bert,
        llm_size: int,
        scale: float,
        *,
        num_persona_tokens: int = 1,
        projector_size: int = 0,
        temperature: float = 1.0,
        learned_temperature: bool = False,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        size = input_encoder.config.hidden_size
        self.input_encoder = input_encoder
        hidden = projector_size or llm_size
        self.projector = Projector(size, hidden, llm_size, num_persona_tokens, rngs)
        self.instruction_projector = Projector(size, llm_size, llm_size, 1, rngs)
        v = jax.random.normal(rngs.params(), (size,))
        self.instruction = nnx.Param(v / jnp.linalg.norm(v), axes=("encoder",))
        null = jax.random.normal(rngs.params(), (num_persona_tokens, llm_size)) / math.sqrt(
            llm_size
        )
        self.null_persona = nnx.Param(null, axes=("tokens", "llm"))
        self.log_temperature = (
            nnx.Param(jnp.float32(math.log(temperature)), axes=()) if learned_temperature else None
        )
        self.temperature = temperature
        self.scale = scale
        self.dtype = dtype

    def __call__(
        self,
        query: jax.Array,
        query_mask: jax.Array,
        history: jax.Array,
        history_mask: jax.Array,
        *,
        reading: Reading = PAPER,
        remat: bool = False,
    ) -> jax.Array:
        """The soft prompt [I ; P].

        Args:
            query, query_mask: (B, Q) int32 and bool, the input as Enc_inp's tokens.
            history, history_mask: (B, H, E) and (B, H) bool, the encoded history; a row without
                items gets the null persona.
            reading: static; one of the paper's ablations.
            remat: recompute the input encoder's activations in the backward pass.

        Returns:
            (B, 1 + k, D) in the computation's dtype; (B, k, D) without the instruction.
        """
        weights = self.attention(
            query, query_mask, history, history_mask, reading=reading, remat=remat
        )
        # A masked item may hold anything, and 0 * NaN is NaN: hence the `where`.
        history = jnp.where(history_mask[..., None], history, 0).astype(self.dtype)
        items = rows(self.projector.first(history))
        pooled = jnp.einsum("bh,bhd->bd", weights.astype(self.dtype), items)
        persona = self.projector.second(pooled)
        empty = ~jnp.any(history_mask, axis=1)
        persona = jnp.where(
            empty[:, None, None], self.null_persona[...].astype(self.dtype), persona
        )
        if not reading.instruction:
            return persona * self.scale
        vector = self.instruction[...].astype(self.dtype)
        instruction = self.instruction_projector.second(self.instruction_projector.first(vector))
        instruction = jnp.broadcast_to(instruction, (persona.shape[0], *instruction.shape))
        return jnp.concatenate([instruction, persona], axis=1) * self.scale

    def attention(
        self,
        query: jax.Array,
        query_mask: jax.Array,
        history: jax.Array,
        history_mask: jax.Array,
        *,
        reading: Reading = PAPER,
        remat: bool = False,
    ) -> jax.Array:
        """The items' weights, (B, H) float32; arguments as `__call__`'s."""
        if reading.uniform:
            return history_mask / jnp.maximum(
                jnp.sum(history_mask, axis=1, keepdims=True), 1
            ).astype(jnp.float32)
        temperature: Any = (
            self.temperature if self.log_temperature is None else jnp.exp(self.log_temperature[...])
        )
        vectors = self.input_encoder(query, query_mask, remat)
        history = jnp.where(history_mask[..., None], history, 0).astype(jnp.float32)
        return attention_weights(vectors, history, history_mask, temperature, reading.top)
