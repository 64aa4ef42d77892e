"""Pooling histories of 10 to 100,000 items: `python -m benchmarks.pooling`

Ours sums over the items between the projector's two layers. The original applies both layers to
every item and sums then: the same persona, here in JAX and in PyTorch.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import app, flags
from flax import nnx

from benchmarks.timing import in_turn, report
from pplug_jax.plugs.persona import Projector, attention_weights, pool

FLAGS = flags.FLAGS
flags.DEFINE_list("items", ["10", "100", "1000", "10000", "100000"], "History items of the user.")
flags.DEFINE_integer("encoder_size", 768, "E, width of the items' vectors; 768 is BGE base's.")
flags.DEFINE_integer("llm_size", 2048, "D, width of the LLM; 2048 is Llama 3.2 1B's.")
FLAGS.set_default("repeats", 3)
TOLERANCE = 3e-5  # of the largest entry; 100,000 items nearly cancel, and float32 rounds each
MIB = 2**20


def ours(projector: Projector, query: jax.Array, history: jax.Array) -> jax.Array:
    """(1, E), (1, H, E) -> (D,), as `UserEmbedder` does it with the paper's settings."""
    weights = attention_weights(query, history, jnp.ones(history.shape[:2], bool), 1.0)
    return projector.second(pool(weights, projector.first(history)))[0, 0]


def original(projector: Projector, query: jax.Array, history: jax.Array) -> jax.Array:
    weights = jax.nn.softmax(history[0] @ query[0])
    return weights @ projector.second(projector.first(history[0]))[:, 0]


class TorchOriginal:
    """The same in PyTorch, with the same weights."""

    def __init__(self, projector: Projector):
        layers = (("up", "up_bias"), ("down", "down_bias"))
        self.layers = [
            [torch.from_numpy(np.array(getattr(projector, name)[...]).T) for name in pair]
            for pair in layers
        ]

    @torch.inference_mode()
    def __call__(self, query: torch.Tensor, history: torch.Tensor) -> torch.Tensor:
        first, second = self.layers
        weights = torch.softmax(history[0] @ query[0], dim=0)
        h = torch.nn.functional.gelu(torch.nn.functional.linear(history[0], *first))
        return weights @ torch.nn.functional.linear(h, *second)


def measure(projector: Projector, peer: TorchOriginal, items: int) -> dict[str, Any]:
    rng = np.random.default_rng(items)
    query, history = (
        x / np.linalg.norm(x, axis=-1, keepdims=True)
        for x in (
            rng.standard_normal((1, *shape, FLAGS.encoder_size), np.float32)
            for shape in ((), (items,))
        )
    )
    inputs = projector, jnp.asarray(query), jnp.asarray(history)
    tensors = torch.from_numpy(query), torch.from_numpy(history)
    compiled = {f.__name__: jax.jit(f).lower(*inputs).compile() for f in (ours, original)}
    made = [peer(*tensors).numpy(), *(np.asarray(f(*inputs)) for f in compiled.values())]
    difference = max(np.abs(x - made[0]).max() / np.abs(made[0]).max() for x in made[1:])
    assert difference < TOLERANCE, f"{items} items: the personas differ by {difference:.1e}"
    seconds = in_turn(
        {
            "ours": lambda: jax.block_until_ready(compiled["ours"](*inputs)),
            "original": lambda: jax.block_until_ready(compiled["original"](*inputs)),
            "torch": lambda: peer(*tensors),
        }
    )
    temporary = {name: each.memory_analysis().temp_size_in_bytes for name, each in compiled.items()}
    return {
        "items": items,
        "seconds": seconds,
        "temporary_bytes": temporary,
        "difference": float(difference),
    }


def main(_: list[str]) -> None:
    make = jax.jit(
        lambda key: Projector(FLAGS.encoder_size, FLAGS.llm_size, FLAGS.llm_size, 1, nnx.Rngs(key))
    )
    projector = make(jax.random.key(0))
    peer = TorchOriginal(projector)
    records = [measure(projector, peer, int(items)) for items in FLAGS.items]
    rows = []
    for record in records:
        seconds, temporary = record["seconds"], record["temporary_bytes"]
        rows.append(
            [
                f"{record['items']:,}",
                *(f"{1e3 * seconds[name]:.2f}" for name in ("ours", "original", "torch")),
                f"{seconds['original'] / seconds['ours']:.1f}x",
                f"{seconds['torch'] / seconds['ours']:.1f}x",
                f"{1e6 * seconds['ours'] / record['items']:.1f}",
                *(f"{temporary[name] / MIB:.1f}" for name in ("ours", "original")),
                f"{record['difference']:.0e}",
            ]
        )
    report(
        "pooling",
        f"One user's persona, E={FLAGS.encoder_size}, D={FLAGS.llm_size}",
        (
            "items",
            "ours, ms",
            "original, ms",
            "torch, ms",
            "speed",
            "to torch",
            "us/item",
            "MiB",
            "original's",
            "differ",
        ),
        rows,
        records,
    )


if __name__ == "__main__":
    app.run(main)
