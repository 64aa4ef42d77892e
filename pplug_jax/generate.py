"""Decoding from `inputs_embeds` with a KV cache: greedy and beam search.

Each is one jitted `while_loop`. Token for token what `transformers`' `generate` gives (beam search
with `early_stopping=False`).
"""

import functools

import jax
import jax.numpy as jnp

from pplug_jax.llm import LLM

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
) -> jax.Array:
    """The most likely continuation of each prompt.

    Args:
        inputs_embeds: (B, L, D), as `llm.embed` scales them.
        mask: (B, L) bool; padding may stand on either side.
        num_beams: 1 is greedy.
        length_penalty: a finished beam's score is its log probability / length ** length_penalty.

    Returns:
        (B, max_new_tokens) int32; after the end-of-sequence token, padding.
    """
    hidden, cache = llm.prefill(inputs_embeds, mask, max_new_tokens)
    if num_beams == 1:
        return _greedy(llm, hidden, cache, max_new_tokens)
    return _beam(llm, hidden, cache, max_new_tokens, num_beams, length_penalty)


def _ends(llm: LLM, tokens: jax.Array) -> jax.Array:
    return jnp.isin(tokens, jnp.array(llm.config.eos_ids or (-1,)))


def _greedy(llm: LLM, hidden: jax.Array, cache, T: int) -> jax.Array:
    B = hidden.shape[0]

    def go_on(state):
        _, _, _, done, t = state
        return (t < T) & ~jnp.all(done)

    def body(state):
        hidden, cache, tokens, done, t = state
        token = jnp.where(
            done, llm.config.pad_id, jnp.argmax(llm.unembed(hidden), axis=-1).astype(jnp.int32)
        )
        tokens = tokens.at[:, t].set(token)
        done |= _ends(llm, token)
        hidden, cache = llm.step(token, cache)
        return hidden, cache, tokens, done, t + 1

    tokens = jnp.full((B, T), llm.config.pad_id, jnp.int32)
    return jax.lax.while_loop(go_on, body, (hidden, cache, tokens, jnp.zeros(B, bool), 0))[2]


def _beam(llm: LLM, hidden: jax.Array, cache, T: int, K: int, length_penalty: float) -> jax.Array:
    """Beam search over K beams a row; the rows' beams lie next to each other, (B * K, ...)."""
    B, V = hidden.shape[0], llm.config.vocab_size
    # Enough candidates that K of them go on even where the best ones all end.
    candidates = K * max(2, 1 + len(llm.config.eos_ids))

    def pick(x: jax.Array, index: jax.Array) -> jax.Array:
        """x (B, N, ...), index (B, K) -> (B, K, ...)."""
        return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)

    def go_on(state):
        t, open_rows = state["t"], state["open"]
        return (t < T) & jnp.any(open_rows)

    def body(state):
        t = state["t"]
        log_probs = (
            jax.nn.log_softmax(llm.unembed(state["hidden"])).reshape(B, K, V)
            + state["scores"][..., None]
        )
        log_probs, index = jax.lax.top_k(log_probs.reshape(B, K * V), candidates)
        beam, token = index // V, (index % V).astype(jnp.int32)
        sequences = pick(state["sequences"], beam).at[:, :, t].set(token)
        ends = _ends(llm, token) | (t == T - 1)

        scores, best = jax.lax.top_k(jnp.where(ends, NEVER, log_probs), K)
        rows = (pick(beam, best) + jnp.arange(B)[:, None] * K).reshape(-1)

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
        still_open = state["open"] & (attainable > done_scores[:, -1])

        hidden, cache = llm.step(pick(token, best).reshape(-1), state["cache"].take(rows))
        return {
            "t": t + 1,
            "hidden": hidden,
            "cache": cache,
            "sequences": pick(sequences, best),
            "scores": scores,
            "done": done,
            "done_scores": done_scores,
            "open": still_open,
        }

    rows = jnp.repeat(jnp.arange(B), K)
    empty = jnp.full((B, K, T), llm.config.pad_id, jnp.int32)
    start = {
        "t": 0,
        "hidden": hidden[rows],
        "cache": cache.take(rows),
        "sequences": empty,
        # All beams are alike at the start: only the first may be drawn from.
        "scores": jnp.where(jnp.arange(K) == 0, 0.0, NEVER) * jnp.ones((B, 1)),
        "done": empty,
        "done_scores": jnp.full((B, K), NEVER),
        "open": jnp.ones(B, bool),
    }
    return jax.lax.while_loop(go_on, body, start)["done"][:, 0]
