"""Run the frozen LLM on a batch with trained weights: losses and answers."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pplug_jax.feed.batches import Batch
from pplug_jax.llm import LLM
from pplug_jax.llm.decoder import Context, Decoder, KeysValues
from pplug_jax.llm.generate import generate
from pplug_jax.llm.loss import cross_entropy
from pplug_jax.llm.prompts import Front, Place
from pplug_jax.plugs.base import Plug
from pplug_jax.plugs.reading import PAPER, Reading

Weights = Plug  # what is trained


def adapt(
    weights: Weights | None, llm: LLM, batch: Batch, reading: Reading = PAPER, remat: bool = False
) -> tuple[LLM, jax.Array | None]:
    """Return the LLM as the weights change it, and the soft tokens that they make of `batch`.

    A prompt in front of soft tokens is read by the LLM as it is (`inputs_embeds`).
    """
    return (llm, None) if weights is None else weights.adapt(llm, batch, reading, remat)


def inputs_embeds(
    llm: LLM,
    soft: jax.Array | None,
    text: jax.Array,
    mask: jax.Array,
    place: Place,
    target: jax.Array | None = None,
    target_mask: jax.Array | None = None,
    was_read: KeysValues | None = None,
) -> tuple[jax.Array, jax.Array, Context | None]:
    """Return a prompt's embeddings with the soft tokens in their place, and the target behind them.

    Args:
        llm: the unchanged LLM, which embeds the texts and reads what stands in front of the soft
            tokens behind.
        soft: (B, k + 1, D), or None for no soft tokens.
        text: (B, L) int32. For soft tokens in front, the text of a decoder-only LLM may include the
            target. For soft tokens behind, the text ends where they begin, and one row may serve
            several consecutive rows of `soft`.
        mask: the text's mask, bool.
        place: where the soft tokens stand.
        target: (B, T) int32, for soft tokens behind.
        target_mask: (B, T) bool.
        was_read: what `read_prompts` returned for `text`, if it was read before.

    Returns:
        embeddings (B, S, D), their mask (B, S), and what they go on from, if anything.
    """
    embeds = llm.embed(text)
    if soft is None:
        return embeds, mask, None
    soft = soft.astype(embeds.dtype)
    soft_mask = jnp.ones(soft.shape[:2], bool)
    if isinstance(place, Front):
        n = place.prefix_length
        return (
            jnp.concatenate([embeds[:, :n], soft, embeds[:, n:]], axis=1),
            jnp.concatenate([mask[:, :n], soft_mask, mask[:, n:]], axis=1),
            None,
        )
    assert isinstance(llm, Decoder)  # `Models` refuses others
    # Nothing here depends on the plug. So JAX differentiates none of it, and keeps keys and values
    # alone.
    context = llm.read(embeds, mask) if was_read is None else was_read.context(mask)
    suffix = jnp.array(place.suffix, jnp.int32)
    tokens = jnp.broadcast_to(suffix, (len(soft), len(suffix)))
    mask = jnp.pad(soft_mask, ((0, 0), (0, len(suffix))), constant_values=True)
    if target is not None and target_mask is not None:  # nothing is predicted from its last token
        tokens = jnp.concatenate([tokens, target[:, :-1]], axis=1)
        mask = jnp.concatenate([mask, target_mask[:, 1:]], axis=1)
    return jnp.concatenate([soft, llm.embed(tokens)], axis=1), mask, context


def token_losses(
    weights: Weights | None,
    llm: LLM,
    batch: Batch,
    place: Place,
    remat: bool = False,
    reading: Reading = PAPER,
) -> jax.Array:
    """Return -log p(y_t | I, P, x, y_<t) of the target's tokens, (B, T) float32, 0 at padding."""
    changed, soft = adapt(weights, llm, batch, reading, remat)
    target = batch.target, batch.target_mask
    embeds, mask, context = inputs_embeds(
        llm, soft, batch.text, batch.text_mask, place, *target, batch.was_read
    )
    hidden = changed.target_hidden(embeds, mask, *target, remat, context)
    return cross_entropy(llm, hidden, batch.target) * batch.target_mask


def continuation(
    llm: LLM,
    changed: LLM,
    soft: jax.Array | None,
    prompt: jax.Array,
    mask: jax.Array,
    place: Place,
    **decoding: Any,
) -> jax.Array:
    """Generate what follows a prompt with these soft tokens, (B, max_new_tokens) int32.

    Args:
        llm: the unchanged LLM, as in `inputs_embeds`.
        changed: the LLM as the plug changes it, which answers.
        soft: as in `inputs_embeds`.
        prompt: the `text` of `inputs_embeds`.
        mask: the prompt's mask, bool.
        place: where the soft tokens stand.
        **decoding: settings of `generate`.
    """
    embeds, embeds_mask, context = inputs_embeds(llm, soft, prompt, mask, place)
    return generate(changed, embeds, embeds_mask, **decoding, context=context)


@jax.jit
def read_prompts(llm: Decoder, text: jax.Array, mask: jax.Array) -> KeysValues:
    """Read prompts in front of soft tokens, (B, L) int32 with mask (B, L) bool, for all users."""
    return KeysValues.of(llm.read(llm.embed(text), mask))


@functools.partial(
    jax.jit,
    static_argnames=("reading", "place", "max_new_tokens", "num_beams", "length_penalty"),
)
def answer_tokens(
    weights: Weights | None,
    llm: LLM,
    batch: Batch,
    *,
    reading: Reading,
    place: Place,
    **decoding: Any,
) -> jax.Array:
    """Generate the answers' tokens, (B, max_new_tokens) int32."""
    changed, soft = adapt(weights, llm, batch, reading)
    prompt = batch.prompt, batch.prompt_mask
    return continuation(llm, changed, soft, *prompt, place, **decoding)


@functools.partial(jax.jit, static_argnames=("place", "reading"))
def gold_losses(
    weights: Weights | None, llm: LLM, batch: Batch, place: Place, reading: Reading
) -> jax.Array:
    """Return each gold's summed loss and number of tokens, (B, 2) float32."""
    losses = token_losses(weights, llm, batch, place, reading=reading)
    return jnp.stack([jnp.sum(losses, axis=1), jnp.sum(batch.target_mask, axis=1)], axis=1)
