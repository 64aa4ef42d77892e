"""Decode from `inputs_embeds` with a KV cache: greedy and beam search.

Each is one jitted `while_loop`. The tokens are those of `transformers`' `generate` (beam search
with `early_stopping=False`).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pplug_jax.llm import LLM
from pplug_jax.llm.decoder import Context

NEVER = -1.0e9  # a score that no sequence has


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "num_beams", "length_penalty"))
def generate(
    llm: LLM,
    inputs_embeds: jax.Array,
    mask: jax.Array,
    *,
    max_new_tokens: int,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    context: Context | None = None,
) -> jax.Array:
    """Return the most likely continuation of each prompt.

    Args:
        llm: the LLM.
        inputs_embeds: (B, L, D), as `llm.embed` scales them.
        mask: (B, L) bool; padding may stand on either side.
        max_new_tokens: the length of the result.
        num_beams: 1 is greedy.
        length_penalty: a finished beam's score is its log probability / length ** length_penalty.
        context: the texts that the prompts go on from, made by a decoder-only LLM's `read`.

    Returns:
        (B, max_new_tokens) int32; after the end-of-sequence token, padding.
    """
    before = {} if context is None else {"context": context}
    hidden, cache = llm.prefill(inputs_embeds, mask, max_new_tokens, num_beams, **before)
    if num_beams == 1:
        return _greedy(llm, hidden, cache, max_new_tokens)
    return _beam(llm, hidden, cache, max_new_tokens, num_beams, length_penalty)


def _ends(llm: LLM, tokens: jax.Array) -> jax.Array:
    return jnp.isin(tokens, jnp.array(llm.config.eos_ids or (-1,)))


def _greedy(llm: LLM, hidden: jax.Array, cache: Any, T: int) -> jax.Array:
    B = hidden.shape[0]

    def choose(hidden: jax.Array, tokens: jax.Array, done: jax.Array, t: jax.Array | int) -> tuple:
        token = jnp.argmax(llm.unembed(hidden), axis=-1).astype(jnp.int32)
        token = jnp.where(done, llm.config.pad_id, token)
        return token, tokens.at[:, t].set(token), done | _ends(llm, token), t + 1

    def go_on(state):
        _, (_, _, done, t) = state
        return (t < T) & ~jnp.all(done)

    def body(state):
        cache, (token, *rest) = state
        hidden, cache = llm.step(token[:, None], cache)
        return cache, choose(hidden[:, 0], *rest)

    tokens = jnp.full((B, T), llm.config.pad_id, jnp.int32)
    first = choose(hidden, tokens, jnp.zeros(B, bool), 0)
    return jax.lax.while_loop(go_on, body, (cache, first))[1][1]


def _beam(
    llm: LLM, hidden: jax.Array, cache: Any, T: int, K: int, length_penalty: float
) -> jax.Array:
    """Search with K beams a row."""
    B = hidden.shape[0]
    # Enough candidates that K of them go on even where the best ones all end.
    candidates = K * max(2, 1 + len(llm.config.eos_ids))

    def pick(x: jax.Array, index: jax.Array) -> jax.Array:
        """Pick entries of axis 1, x (B, N, ...), index (B, K) -> (B, K, ...)."""
        return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)

    def choose(hidden: jax.Array, state: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Choose the next tokens of the beams, whose states are `hidden` (B, K, D)."""
        t = state["t"]
        logits = llm.unembed(hidden)
        V = logits.shape[-1]
        log_probs = (
            logits + (state["scores"] - jax.nn.logsumexp(logits, axis=-1))[..., None]
        ).reshape(B, K * V)
        log_probs, index = jax.lax.top_k(log_probs, candidates)
        beam, token = index // V, (index % V).astype(jnp.int32)
        sequences = pick(state["sequences"], beam).at[:, :, t].set(token)
        ends = _ends(llm, token) | (t == T - 1)

        scores, best = jax.lax.top_k(jnp.where(ends, NEVER, log_probs), K)

        # Of the candidates that end, only the K likeliest may replace a finished one.
        finished = log_probs / (t + 1.0) ** length_penalty
        ends = ends & (jnp.arange(candidates) < K) & state["open"][:, None]
        all_scores = jnp.concatenate(
            [state["done_scores"], jnp.where(ends, finished, NEVER)], axis=1
        )
        done_scores, keep = jax.lax.top_k(all_scores, K)
        done = pick(jnp.concatenate([state["done"], sequences], axis=1), keep)

        # A row is closed once its best running beam, at its present length, is no better than its
        # worst finished one.
        attainable = scores[:, 0] / (t + 1.0) ** length_penalty
        return {
            "t": t + 1,
            "token": pick(token, best),
            "parent": pick(beam, best),
            "sequences": pick(sequences, best),
            "scores": scores,
            "done": done,
            "done_scores": done_scores,
            "open": state["open"] & (attainable > done_scores[:, -1]),
        }

    def go_on(state):
        _, chosen = state
        return (chosen["t"] < T) & jnp.any(chosen["open"])

    def body(state):
        cache, chosen = state
        cache = cache._replace(seen=pick(cache.seen, chosen["parent"]))
        hidden, cache = llm.step(chosen["token"], cache)
        return cache, choose(hidden, chosen)

    empty = jnp.full((B, K, T), llm.config.pad_id, jnp.int32)
    start: dict[str, Any] = {
        "t": 0,
        "sequences": empty,
        # All beams are alike at the start: only the first may be drawn from.
        "scores": jnp.where(jnp.arange(K) == 0, 0.0, NEVER) * jnp.ones((B, 1)),
        "done": empty,
        "done_scores": jnp.full((B, K), NEVER),
        "open": jnp.ones(B, bool),
    }
    first = choose(jnp.repeat(hidden[:, None], K, axis=1), start)
    return jax.lax.while_loop(go_on, body, (cache, first))[1]["done"][:, 0]
