"""The programs of continuous batching, all of static shapes.

There are S slots. A slot has the keys and values of a prompt, in the cache's first columns, and of
the tokens that were chosen since, in the others, which form a ring of R columns. Every step writes
the same column of all slots, whenever each of them began: a column holds any position, and a slot's
mask says which columns are its own. So the step is that of `llm.generate`, and an LLM needs nothing
for it but its `prefill` and `step`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pplug_jax.llm import LLM
from pplug_jax.llm.decoder import Context, Decoder
from pplug_jax.runtime.mesh import replicated, sharding


class Slots(NamedTuple):
    """The state of all slots.

    Attributes:
        cache: the LLM's, with a `position` for every slot and column.
        token: (S,) int32, the newest tokens.
        position: (S,) float32, their places.
        drawn: (S,) int32, how many tokens were chosen before.
        temperature: (S,) float32.
        top_p: (S,) float32.
        seed: (S,) int32.
    """

    cache: Any
    token: jax.Array
    position: jax.Array
    drawn: jax.Array
    temperature: jax.Array
    top_p: jax.Array
    seed: jax.Array


def places(slots: Slots, mesh: Mesh) -> Slots:
    """Return how the arrays of `slots` lie on the mesh: split over slots, and over heads."""

    def place(x: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
        if x.ndim == 0:
            return replicated(mesh)
        if x.ndim == 5:
            return sharding(mesh, (None, "batch", None, "kv_heads", None), x.shape)
        return sharding(mesh, ("batch", *[None] * (x.ndim - 1)), x.shape)

    return jax.tree.map(place, slots)


def empty(llm: LLM, count: int, longest_prompt: int, ring: int) -> Slots:
    """Return slots that nothing is in.

    Args:
        llm: the LLM, of which shapes suffice.
        count: S.
        longest_prompt: the most rows of a prompt.
        ring: R, the most new tokens.
    """
    rows = jax.ShapeDtypeStruct((count, longest_prompt, llm.config.hidden_size), jnp.float32)
    mask = jax.ShapeDtypeStruct((count, longest_prompt), jnp.bool)
    _, cache = jax.eval_shape(lambda llm, *prompt: llm.prefill(*prompt, ring + 1), llm, rows, mask)
    cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), cache)
    columns = cache.keys.shape[2]
    whole, real = jnp.zeros(count, jnp.int32), jnp.zeros(count, jnp.float32)
    return Slots(
        cache._replace(positions=jnp.zeros((count, columns), jnp.float32)),
        token=whole,
        position=real,
        drawn=whole,
        temperature=real,
        top_p=real,
        seed=whole,
    )


def admit(
    llm: LLM,
    slots: Slots,
    rows: jax.Array,
    mask: jax.Array,
    slot: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
    seed: jax.Array,
    context: Context | None = None,
) -> tuple[Slots, jax.Array, jax.Array]:
    """Read a prompt into a slot and choose its first token.

    Args:
        llm: the LLM.
        slots: the slots.
        rows: (1, L, D), the prompt, padding behind.
        mask: (1, L) bool.
        slot: () int32, which slot; whatever was in it is forgotten.
        temperature: () float32.
        top_p: () float32.
        seed: () int32.
        context: what the prompt begins with, if that was read before; `rows` are the rest.

    Returns:
        the slots, the token, () int32, and its log probability, () float32.
    """
    if context is None:
        hidden, cache = llm.prefill(rows, mask, 1)
    else:
        assert isinstance(llm, Decoder)
        hidden, cache = llm.prefill(rows, mask, 1, context=context)
        cache = cache._replace(
            keys=jnp.concatenate([context.keys, cache.keys], axis=2),
            values=jnp.concatenate([context.values, cache.values], axis=2),
            positions=jnp.concatenate([context.positions, cache.positions], axis=1),
            seen=jnp.concatenate([context.mask[:, None], cache.seen], axis=2),
        )

    def put(whole: jax.Array, part: jax.Array) -> jax.Array:
        axis = 1 if whole.ndim == 5 else 0
        if whole.dtype == bool:  # the columns that the slot had before are not its own
            widths = np.subtract(whole.shape[1:], part.shape[1:])
            part = jnp.pad(part, [(0, 0), *((0, width) for width in widths)])
        start = [slot if i == axis else 0 for i in range(whole.ndim)]
        return jax.lax.dynamic_update_slice(whole, part.astype(whole.dtype), start)

    kept = {
        name: put(getattr(slots.cache, name), part)
        for name, part in cache._asdict().items()
        if name not in ("length", "context")
    }
    sampling = temperature[None], top_p[None], seed[None], jnp.zeros(1, jnp.int32)
    token, log_probability = choose(llm.unembed(hidden), *sampling)
    values = Slots(
        slots.cache._replace(**kept),
        token[0],
        jnp.max(jnp.where(cache.seen[:, 0], cache.positions, -1)) + 1,
        jnp.int32(1),
        temperature,
        top_p,
        seed,
    )
    updated = [array.at[slot].set(new) for array, new in zip(slots[1:], values[1:], strict=True)]
    return Slots(values.cache, *updated), token[0], log_probability[0]


def read(llm: Decoder, rows: jax.Array, mask: jax.Array) -> Context:
    """Read what prompts begin with, (1, L, D) with mask (1, L) bool, for `admit` to go on from."""
    return llm.read(rows, mask)


def step(
    llm: LLM, slots: Slots, time: jax.Array, ring: int, count: int
) -> tuple[Slots, jax.Array, jax.Array]:
    """Read the newest token of the first slots and choose the next.

    Args:
        llm: the LLM.
        slots: the slots.
        time: () int32, the number of steps so far.
        ring: R.
        count: n, how many slots; the others wait, and nothing is computed for them.

    Returns:
        the slots, the tokens, (n,) int32, and their log probabilities, (n,) float32.
    """
    if count == len(slots.token):
        return _step(llm, slots, time, ring)

    def first(x: jax.Array) -> jax.Array:
        return x[:, :count] if x.ndim == 5 else x[:count] if x.ndim else x

    def back(whole: jax.Array, part: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(whole, part, [0] * whole.ndim)

    few, token, log_probability = _step(llm, jax.tree.map(first, slots), time, ring)
    return jax.tree.map(back, slots, few), token, log_probability


def _step(llm: LLM, slots: Slots, time: jax.Array, ring: int) -> tuple[Slots, jax.Array, jax.Array]:
    cache = slots.cache
    column = cache.keys.shape[2] - ring + time % ring
    at = jax.lax.dynamic_update_slice(cache.positions, slots.position[:, None], (0, column))
    hidden, cache = llm.step(slots.token[:, None], cache._replace(positions=at, length=column))
    sampling = slots.temperature, slots.top_p, slots.seed, slots.drawn
    token, log_probability = choose(llm.unembed(hidden[:, 0]), *sampling)
    slots = slots._replace(
        cache=cache, token=token, position=slots.position + 1, drawn=slots.drawn + 1
    )
    return slots, token, log_probability


def choose(
    logits: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
    seed: jax.Array,
    drawn: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Choose each row's next token.

    A draw depends on the row's logits, seed and count alone, so on no other row.

    Args:
        logits: (S, V) float32.
        temperature: (S,) float32; 0 takes the likeliest token.
        top_p: (S,) float32.
        seed: (S,) int32.
        drawn: (S,) int32, how many tokens the row has had.

    Returns:
        the tokens, (S,) int32, and their log probabilities without temperature, (S,) float32.
    """

    def draw() -> jax.Array:
        scaled = logits / jnp.maximum(temperature, 1e-4)[:, None]
        likely = jnp.sort(scaled, axis=-1, descending=True)
        weight = jax.nn.softmax(likely, axis=-1)
        inside = jnp.cumsum(weight, axis=-1) - weight < top_p[:, None]
        least = jnp.min(jnp.where(inside, likely, jnp.inf), axis=-1, keepdims=True)
        keys = jax.vmap(lambda seed, n: jax.random.fold_in(jax.random.key(seed), n))(seed, drawn)
        return jax.vmap(jax.random.categorical)(keys, jnp.where(scaled >= least, scaled, -jnp.inf))

    greedy = jnp.argmax(logits, axis=-1)
    any_drawn = jnp.any(temperature > 0)  # sorting a vocabulary takes long
    token = jax.lax.cond(
        any_drawn, lambda: jnp.where(temperature > 0, draw(), greedy), lambda: greedy
    )
    token = token.astype(jnp.int32)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return token, chosen - jax.nn.logsumexp(logits, axis=-1)


class Programs(NamedTuple):
    """The jitted programs of an LLM on a mesh, which take and give up the slots' memory."""

    empty: Any
    read: Any
    admit: Any
    step: Any


def programs(llm: LLM, mesh: Mesh, count: int, longest_prompt: int, ring: int) -> Programs:
    """Return the programs; the shapes of `rows` choose among those of `admit`.

    Args:
        llm: the LLM, of which shapes suffice.
        mesh: the mesh that it lies on.
        count: S.
        longest_prompt: the most rows of a prompt.
        ring: R, the most new tokens.
    """
    make = functools.partial(empty, llm, count, longest_prompt, ring)
    where = places(jax.eval_shape(make), mesh)
    out = where, replicated(mesh), replicated(mesh)
    return Programs(
        jax.jit(make, out_shardings=where),
        jax.jit(read),
        jax.jit(admit, donate_argnames="slots", out_shardings=out),
        jax.jit(
            step, donate_argnames="slots", static_argnames=("ring", "count"), out_shardings=out
        ),
    )
