"""What the frozen LLM makes of a batch with trained weights: losses and answers."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pplug_jax.feed.batches import Batch
from pplug_jax.llm import LLM
from pplug_jax.llm.generate import generate
from pplug_jax.llm.loss import cross_entropy
from pplug_jax.plugs.base import Plug
from pplug_jax.plugs.reading import PAPER, Reading

Weights = Plug  # what is trained


def adapt(
    weights: Weights | None, llm: LLM, batch: Batch, reading: Reading = PAPER, remat: bool = False
) -> tuple[LLM, jax.Array | None]:
    """The LLM as the weights change it, and the soft tokens that they make for `batch`."""
    return (llm, None) if weights is None else weights.adapt(llm, batch, reading, remat)


def inputs_embeds(
    llm: LLM, soft: jax.Array | None, text: jax.Array, mask: jax.Array, prefix_length: int
) -> tuple[jax.Array, jax.Array]:
    """A prompt or text as embeddings, the soft tokens behind its first `prefix_length` tokens.

    Args:
        soft: (B, k + 1, D), or None for no soft tokens. text, mask: (B, L) int32 and bool.

    Returns:
        (B, k + 1 + L, D) and its mask (B, k + 1 + L).
    """
    embeds = llm.embed(text)
    if soft is None:
        return embeds, mask
    soft = soft.astype(embeds.dtype)
    there = jnp.ones(soft.shape[:2], bool)
    return (
        jnp.concatenate([embeds[:, :prefix_length], soft, embeds[:, prefix_length:]], axis=1),
        jnp.concatenate([mask[:, :prefix_length], there, mask[:, prefix_length:]], axis=1),
    )


def token_losses(
    weights: Weights | None,
    llm: LLM,
    batch: Batch,
    prefix_length: int,
    remat: bool = False,
    reading: Reading = PAPER,
) -> jax.Array:
    """-log p(y_t | I, P, x, y_<t) of the target's tokens, (B, T) float32, 0 at padding."""
    llm, soft = adapt(weights, llm, batch, reading, remat)
    embeds, mask = inputs_embeds(llm, soft, batch.text, batch.text_mask, prefix_length)
    hidden = llm.target_hidden(embeds, mask, batch.target, batch.target_mask, remat)
    return cross_entropy(llm, hidden, batch.target) * batch.target_mask


@functools.partial(
    jax.jit,
    static_argnames=("reading", "prefix_length", "max_new_tokens", "num_beams", "length_penalty"),
)
def answer_tokens(
    weights: Weights | None,
    llm: LLM,
    batch: Batch,
    *,
    reading: Reading,
    prefix_length: int,
    **decoding: Any,
) -> jax.Array:
    llm, soft = adapt(weights, llm, batch, reading)
    embeds, mask = inputs_embeds(llm, soft, batch.prompt, batch.prompt_mask, prefix_length)
    return generate(llm, embeds, mask, **decoding)


@functools.partial(jax.jit, static_argnames=("prefix_length", "reading"))
def gold_losses(
    weights: Weights | None, llm: LLM, batch: Batch, prefix_length: int, reading: Reading
) -> jax.Array:
    losses = token_losses(weights, llm, batch, prefix_length, reading=reading)
    return jnp.stack([jnp.sum(losses, axis=1), jnp.sum(batch.target_mask, axis=1)], axis=1)
