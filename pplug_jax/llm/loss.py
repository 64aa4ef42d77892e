"""The cross entropy of an answer's tokens, without the logits of all of them at once.

A large vocabulary makes the logits the largest array of a training step: 64 answers of 128 tokens
are 8.6 GB in float32 for Gemma 3. Here a chunk of tokens yields its losses and their gradient, and
then its logits are freed. Since nothing trains the LLM, and a token's loss depends on that token's
hidden state alone, the gradient can be computed beside the loss, and nothing is computed twice.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from pplug_jax.llm import LLM

CHUNK = 32  # tokens of each row at once


@jax.custom_vjp
def cross_entropy(llm: LLM, hidden: jax.Array, targets: jax.Array) -> jax.Array:
    """Return -log p(target) of every token, (B, T) float32.

    Args:
        llm: the LLM, which gets no gradient.
        hidden: (B, T, D), the states that predict the targets; they alone get a gradient.
        targets: (B, T) int32.
    """
    return _in_chunks(lambda h, y: _losses(llm, h, y), hidden, targets)


def _losses(llm: LLM, hidden: jax.Array, targets: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(llm.unembed(hidden), targets)


def _in_chunks(f: Callable[..., Any], *arrays: jax.Array) -> Any:
    """Call `f` of arrays (B, T, ...) for some tokens of all rows at a time."""
    B, T = arrays[0].shape[:2]
    count = next(n for n in range(1, T + 1) if T % n == 0 and T // n <= CHUNK)
    if count == 1:
        return f(*arrays)
    chunks = tuple(x.reshape(B, count, -1, *x.shape[2:]).swapaxes(0, 1) for x in arrays)
    results = jax.lax.map(lambda chunk: f(*chunk), chunks)
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(B, T, *x.shape[3:]), results)


def _forward(llm: LLM, hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    def both(hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        losses, pull_back = jax.vjp(lambda h: _losses(llm, h, targets), hidden)
        return losses, pull_back(jnp.ones_like(losses))[0]

    return _in_chunks(both, hidden, targets)


def _backward(gradient: jax.Array, g: jax.Array) -> tuple[None, jax.Array, None]:
    return None, gradient * g[..., None].astype(gradient.dtype), None


cross_entropy.defvjp(_forward, _backward)
