"""How far soft tokens grow in a training's first steps, and what that does to the loss.

    python -m benchmarks.soft_norms --config=configs/best.py:custom --config.llm.path=LLM ..

trains `pplug` of the config for `--steps` and prints for each step the loss, the LLM's own loss on
the same examples, the gradient's norm, and the mean norm of the instruction's, the persona's and
the features' tokens over that of the LLM's embeddings. `--way` tries what could bound them:

- plain: as the package trains.
- norm: every soft token is scaled to the embeddings' norm.
- fan: Adam's step of a projector's last layer is divided by how many units it sums, times 16, and
  that of its bias and of the null tokens by the root of the LLM's width.

`--rows` examples a step, of the first that the training split has; the rate is constant behind its
first step, as it almost is where a training has thousands of steps.
"""

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from ml_collections import config_flags

from pplug_jax.config import checked
from pplug_jax.data.answers import learnt
from pplug_jax.data.lamp import Subset
from pplug_jax.data.sources import read_split
from pplug_jax.feed.batches import place_batch
from pplug_jax.methods.shown import layout_of
from pplug_jax.methods.table import METHODS, configured
from pplug_jax.plugs.persona import UserEmbedder
from pplug_jax.session import Models
from pplug_jax.session.inputs import assembler, place_of, tokenize
from pplug_jax.session.weights import new_weights
from pplug_jax.train.step import loss_fn
from pplug_jax.train.watch import llm_loss

WAYS = ("plain", "norm", "fan")
CONFIG = config_flags.DEFINE_config_file("config", None, "As of pplug_jax.main.")
STEPS = flags.DEFINE_integer("steps", 14, "Steps.")
ROWS = flags.DEFINE_integer("rows", 4, "Examples a step.")
WAY = flags.DEFINE_enum("way", "plain", WAYS, "See above.")
METHOD = METHODS["pplug"]


def to_the_embeddings_norm(call: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    def scaled(plug: UserEmbedder, *args: Any, **settings: Any) -> jax.Array:
        soft = call(plug, *args, **settings)
        norms = jnp.linalg.norm(soft, axis=-1, keepdims=True)
        return soft / jnp.maximum(norms, 1e-6) * jax.lax.stop_gradient(plug.scale[...])

    return scaled


def over_the_fan(updates: UserEmbedder) -> UserEmbedder:
    def scaled(path: Any, update: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if "down_bias" in name or "null" in name:
            return update / math.sqrt(update.shape[-1])
        return update * 16 / len(update) if "down" in name else update

    return jax.tree_util.tree_map_with_path(scaled, updates)


def main(_: list[str]) -> None:
    config = CONFIG.value
    config.methods = ("pplug",)
    config.train.batch_size = ROWS.value
    config = checked(config)
    if WAY.value == "norm":
        UserEmbedder.__call__ = to_the_embeddings_norm(UserEmbedder.__call__)
    train = read_split(config, "train")
    train = Subset(train, range(min(len(train), ROWS.value * STEPS.value)))
    with tempfile.TemporaryDirectory() as workdir:
        config = learnt(config, Path(workdir), train)
        models = Models(config, Path(workdir))
        models.store.add(map(models.history_texts, train), config.encoder.batch_size)
        config = configured(config, METHOD, config.seed)
        tokenized = tokenize(models, train, layout_of(METHOD, config))
        assemble = assembler(models, METHOD, config, tokenized, ROWS.value)
        plug, place = new_weights(models, METHOD, config), place_of(models, METHOD, config)
        show(models, config, plug, assemble, place)


def show(models: Models, config: Any, plug: UserEmbedder, assemble: Any, place: Any) -> None:
    rate = config.train.learning_rate
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.train.clip_norm),
        optax.adamw(
            optax.piecewise_constant_schedule(rate / 2, {1: 2.0}),
            weight_decay=config.train.weight_decay,
        ),
        optax.stateless(
            lambda updates, _: over_the_fan(updates) if WAY.value == "fan" else updates
        ),
    )

    @jax.jit
    def step(plug: UserEmbedder, state: Any, llm: Any, batch: Any) -> tuple:
        def mean(plug: UserEmbedder) -> jax.Array:
            total, tokens = loss_fn(plug, llm, batch, place)
            return total / tokens

        loss, grads = jax.value_and_grad(mean)(plug)
        norms = jnp.linalg.norm(plug(batch.plug_inputs), axis=-1).mean(axis=0) / plug.scale[...]
        updates, state = optimizer.update(grads, state, plug)
        return optax.apply_updates(plug, updates), state, (loss, optax.global_norm(grads), norms)

    state, k = optimizer.init(plug), config.plug.num_persona_tokens
    order = np.random.default_rng(config.seed).permutation(len(assemble.tokenized))
    print(f"{config.llm.path}, {WAY.value}, {config.plug.place}, learning rate {rate}")
    print(
        f"{'step':>4}" + "".join(f"{name:>10}" for name in ("loss", "LLM", "grad", "I", "P", "F"))
    )
    for i, rows in enumerate(order[: ROWS.value * STEPS.value].reshape(-1, ROWS.value), 1):
        bucket = int(assemble.buckets.of[rows].max())
        with jax.set_mesh(models.mesh):
            batch = place_batch(assemble((i, bucket, rows)), models.mesh)
            own = llm_loss(models.llm, batch, place=place, accumulation=1)
            plug, state, (loss, grad, norms) = step(plug, state, models.llm, batch)
        means = [float(part.mean()) for part in jnp.split(norms, [1, 1 + k]) if part.size]
        figures = "".join(f"{x:10.3g}" for x in (loss, own, grad, *means))
        print(f"{i:4}{figures}", flush=True)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
