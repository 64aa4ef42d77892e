"""The loss, the optimiser, and the jit-compiled step."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from pplug_jax.feed.batches import Batch
from pplug_jax.llm import LLM
from pplug_jax.llm.prompts import Place
from pplug_jax.plugs.forward import Weights, token_losses
from pplug_jax.plugs.reading import PAPER, Reading
from pplug_jax.runtime.mesh import replicated
from pplug_jax.settings import Settings


@functools.lru_cache
def make_optimizer(
    steps: int,
    learning_rate: float,
    weight_decay: float,
    warmup: float,
    clip_norm: float,
    encoder_rate: float = 1.0,
) -> optax.GradientTransformation:
    """Make the paper's optimiser: AdamW behind global-norm clipping, linear warm-up and decay to 0.

    The result is cached, since it is a static argument of the step: equal settings shall not
    compile twice.

    Args:
        steps: the length of the training.
        learning_rate: the highest rate.
        weight_decay: of AdamW.
        warmup: the share of the steps in which the rate rises.
        clip_norm: the largest global norm of the gradient.
        encoder_rate: Enc_inp's learning rate over that of the rest; 1 is the paper.
    """
    rising = max(1, round(warmup * steps))
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(learning_rate / rising, learning_rate, rising - 1),
            optax.linear_schedule(learning_rate, 0, max(1, steps - rising)),
        ],
        [rising],
    )
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(schedule, weight_decay=weight_decay),
        optax.masked(optax.scale(encoder_rate), _part("input_encoder")),
        optax.masked(optax.set_to_zero(), _part("scale")),
    )


def optimizer_of(config: Settings, steps: int) -> optax.GradientTransformation:
    """Make the optimiser of a method's config (`table.configured`) for so many steps."""
    train = config.train
    return make_optimizer(
        steps,
        train.learning_rate,
        train.weight_decay,
        train.warmup,
        train.clip_norm,
        config.plug.encoder_rate,
    )


def _part(name: str) -> Callable[[Weights], Weights]:
    """Return a function that marks the leaves of one attribute of a plug, at any depth."""

    def marked(path: tuple, _: Any) -> bool:
        return name in jax.tree_util.keystr(path, simple=True, separator="/").split("/")

    return functools.partial(jax.tree_util.tree_map_with_path, marked)


def init_optimizer(
    optimizer: optax.GradientTransformation, weights: Weights, mesh: Mesh
) -> optax.OptState:
    """Make the first state: moments lie as the parameters do, counters on every device."""
    return jax.tree.map(
        lambda x: x if x.ndim else jax.device_put(x, replicated(mesh)), optimizer.init(weights)
    )


def abstract_optimizer(
    optimizer: optax.GradientTransformation, weights: Weights, mesh: Mesh
) -> optax.OptState:
    """Return `init_optimizer`'s state as shapes, dtypes and places; `weights` may be so too."""

    def abstract(x: jax.ShapeDtypeStruct, where: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    return optax.tree.map_params(
        optimizer,
        lambda moment, weight: abstract(moment, weight.sharding),
        jax.eval_shape(optimizer.init, weights),
        weights,
        transform_non_params=lambda counter: abstract(counter, replicated(mesh)),
    )


def loss_fn(
    weights: Weights,
    llm: LLM,
    batch: Batch,
    place: Place,
    remat: bool = False,
    reading: Reading = PAPER,
) -> tuple[jax.Array, jax.Array]:
    """Return the sum of -log p(y_t | I, P, x, y_<t) over target tokens, and their number.

    Both are () float32.
    """
    losses = token_losses(weights, llm, batch, place, remat, reading)
    return jnp.sum(losses), jnp.sum(batch.target_mask).astype(jnp.float32)


def in_parts(batch: Batch, count: int) -> Batch:
    """Return the batch as `count` parts, (count, B / count, ...)."""
    return jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)


def train_step(
    weights: Weights,
    opt_state: optax.OptState,
    llm: LLM,
    batch: Batch,
    *,
    optimizer: optax.GradientTransformation,
    place: Place,
    accumulation: int = 1,
    remat: bool = False,
    reading: Reading = PAPER,
) -> tuple[Weights, optax.OptState, dict[str, jax.Array]]:
    """Update the weights once. The LLM is a separate argument that nothing differentiates.

    With `accumulation` > 1 the batch is worked off in as many parts, with the same result.
    """

    def part_grads(total: Any, part: Batch) -> tuple[Any, None]:
        values, grads = jax.value_and_grad(loss_fn, has_aux=True)(
            weights, llm, part, place, remat, reading
        )
        return jax.tree.map(jnp.add, total, (values, grads)), None

    zeros = ((jnp.float32(0), jnp.float32(0)), jax.tree.map(jnp.zeros_like, weights))
    if accumulation == 1:
        ((loss, tokens), grads), _ = part_grads(zeros, batch)
    else:
        ((loss, tokens), grads), _ = jax.lax.scan(part_grads, zeros, in_parts(batch, accumulation))
    tokens = jnp.maximum(tokens, 1)
    grads = jax.tree.map(lambda g: g / tokens, grads)
    updates, opt_state = optimizer.update(grads, opt_state, weights)
    metrics = {"loss": loss / tokens, "grad_norm": optax.tree.norm(grads)}
    return optax.apply_updates(weights, updates), opt_state, metrics


def jit_step(weights: Weights, opt_state: optax.OptState) -> jax.stages.Wrapped:
    """Return `train_step`, compiled once a batch shape, for arrays that lie as these do.

    The updated arrays must lie where the given ones do. Otherwise the compiler picks other places
    for some, and the second step compiles again.
    """
    layout = jax.tree.map(lambda x: x.sharding, (weights, opt_state))
    return jax.jit(
        train_step,
        static_argnames=("optimizer", "place", "accumulation", "remat", "reading"),
        donate_argnames=("weights", "opt_state"),
        out_shardings=(*layout, None),
    )
