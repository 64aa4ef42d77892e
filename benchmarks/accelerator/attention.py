"""Part 5: attention of a text to itself, ours by XLA against cuDNN's.

`ours` is what every model of ours calls, with its mask (B, L, L) of what each token sees. `cudnn`
is `jax.nn.dot_product_attention` with the same mask; `cudnn lengths` is told the rows' lengths, the
diagonal and the window instead, which needs padding behind, as training has it. JAX hands cuDNN no
soft cap: those shapes show what ours takes for it.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.accelerator.record import Contest, Record
from benchmarks.accelerator.roofline import predicted
from pplug_jax.llm.decoder import causal, positions
from pplug_jax.nn.attention import attend

CALLS = 8  # of a timed one, so that the host's part is hidden


class Heads(NamedTuple):
    """An LLM's attention. window: of its sliding layers. cap: of its scores."""

    llm: str
    query: int
    key: int
    size: int
    window: int | None = None
    cap: float | None = None


class Case(NamedTuple):
    """lengths: in the order of their worth. tokens: of all rows together."""

    heads: tuple[Heads, ...]
    lengths: tuple[int, ...]
    tokens: int
    repeats: int
    needs: float


REAL = Case(
    (
        Heads("Llama 3.2 1B", 32, 8, 64),
        Heads("Gemma 3 1B", 4, 1, 256, window=512),
        Heads("Gemma 2 9B", 16, 8, 256, window=4096, cap=50.0),
        Heads("Qwen 3 8B", 32, 8, 128),
    ),
    (512, 2048, 256, 8192, 1024, 4096),
    16384,
    5,
    8,
)
TINY = Case(
    (Heads("tiny", 4, 2, 16, window=8), Heads("tiny cap", 4, 2, 16, cap=5.0)), (32,), 64, 1, 0
)


def measure(record: Record, case: Case, heads: Heads, length: int) -> None:
    rows = max(1, case.tokens // length)
    keys = jax.random.split(jax.random.key(length), 3)
    counts = (heads.query, heads.key, heads.key)
    arrays = tuple(
        jax.random.normal(key, (rows, length, count, heads.size), jnp.bfloat16)
        for key, count in zip(keys, counts, strict=True)
    )
    # Texts of a half to the whole length, padding behind.
    lengths = jnp.asarray(np.linspace(length // 2, length, rows).astype(np.int32))
    there = jnp.arange(length) < lengths[:, None]
    mask = causal(there)
    if heads.window is not None:
        at = positions(there)
        mask = mask & (at[:, :, None] - at[:, None] < heads.window)
    peers: dict[str, Callable[..., jax.Array]] = {
        "ours": lambda q, k, v: attend(q, k, v, mask, None, heads.cap)
    }
    if heads.cap is None:
        dot = jax.nn.dot_product_attention
        window = None if heads.window is None else (heads.window - 1, 0)
        peers |= {
            "cudnn lengths": functools.partial(
                dot,
                is_causal=True,
                query_seq_lengths=lengths,
                key_value_seq_lengths=lengths,
                local_window_size=window,
                implementation="cudnn",
            ),
            "cudnn": functools.partial(dot, mask=mask[:, None], implementation="cudnn"),
        }

    def loss(attention: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
        h = jnp.where(there[..., None, None], attention(*arrays).astype(jnp.float32), 0)
        return jnp.sum(h * jnp.cos(h))

    for way in ("forwards", "both ways"):
        name = f"{heads.llm}, {length} tokens, {way}"
        about = {
            "heads": heads._asdict(),
            "rows": rows,
            "length": length,
            "way": way,
            "calls": CALLS,
        }
        contest = Contest(record, name, case.repeats, **about)
        results: dict[str, list[np.ndarray]] = {}

        def make(peer: str, way: str = way, name: str = name) -> Callable[[], list[jax.Array]]:
            call = peers[peer]
            if way == "both ways":
                call = jax.grad(functools.partial(loss, call), argnums=(0, 1, 2))
            traced = jax.jit(call).trace(*arrays)
            compiled = traced.lower().compile()
            record.note(f"{name}: {peer}", **predicted(traced, compiled))

            def attention() -> list[jax.Array]:
                for _ in range(CALLS):
                    made = compiled(*arrays)
                return jax.block_until_ready(jax.tree.leaves(made))

            return attention

        for peer in peers:
            made = contest.join(peer, functools.partial(make, peer), case.needs)
            if made is None:
                continue
            results[peer] = [np.asarray(jnp.where(there[..., None, None], x, 0)) for x in made]
            pairs = zip(results[peer], next(iter(results.values())), strict=True)
            errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs]
            record.note(f"{name}: {peer}", relative_difference=float(max(errors)))


def run(record: Record, rehearse: bool) -> None:
    case = TINY if rehearse else REAL
    for length in case.lengths:
        for heads in case.heads:
            measure(record, case, heads, length)
