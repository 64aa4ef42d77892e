"""Fits a plug or a LoRA: the loss, the jit-compiled step, and the loop around them."""

import contextlib
import functools
import math
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh

from pplug_jax.ahead import compiled_ahead
from pplug_jax.checkpoint import CheckpointError, Checkpoints
from pplug_jax.data.batches import (
    Batch,
    Plan,
    Tokenized,
    place_batch,
    plan_batches,
    training_batches,
)
from pplug_jax.distributed import is_preempted
from pplug_jax.embedder import PAPER, Reading, soft_tokens
from pplug_jax.llm import LLM
from pplug_jax.mesh import replicated
from pplug_jax.methods import Method, Weights, token_losses
from pplug_jax.models import Models
from pplug_jax.progress import Progress, say
from pplug_jax.writer import Writer, read_scalars


@functools.lru_cache
def make_optimizer(
    steps: int,
    learning_rate: float,
    weight_decay: float,
    warmup: float,
    clip_norm: float,
    encoder_rate: float = 1.0,
) -> optax.GradientTransformation:
    """AdamW behind global-norm clipping, with linear warm-up and linear decay to 0, as the paper.

    encoder_rate: Enc_inp's learning rate over that of the rest; 1 is the paper.

    Cached, since it is a static argument of the step: equal settings shall not compile twice.
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


def _part(name: str) -> Callable[[Weights], Weights]:
    """Tells which leaves are those of the weights' attribute."""
    return functools.partial(
        jax.tree_util.tree_map_with_path,
        lambda path, _: jax.tree_util.keystr(path[:1], simple=True) == name,
    )


def init_optimizer(
    optimizer: optax.GradientTransformation, weights: Weights, mesh: Mesh
) -> optax.OptState:
    """The first state: moments lie as the parameters do, counters on every device."""
    return jax.tree.map(
        lambda x: x if x.ndim else jax.device_put(x, replicated(mesh)), optimizer.init(weights)
    )


def abstract_optimizer(
    optimizer: optax.GradientTransformation, weights: Weights, mesh: Mesh
) -> optax.OptState:
    """What `init_optimizer` gives, as shapes, dtypes and places; so may the weights be."""

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
    prefix_length: int = 0,
    remat: bool = False,
    reading: Reading = PAPER,
) -> tuple[jax.Array, jax.Array]:
    """The sum over target tokens of -log p(y_t | I, P, x, y_<t), and their number; () float32."""
    losses = token_losses(weights, llm, batch, prefix_length, remat, reading)
    return jnp.sum(losses), jnp.sum(batch.target_mask).astype(jnp.float32)


def train_step(
    weights: Weights,
    opt_state: optax.OptState,
    llm: LLM,
    batch: Batch,
    *,
    optimizer: optax.GradientTransformation,
    prefix_length: int,
    accumulation: int = 1,
    remat: bool = False,
    reading: Reading = PAPER,
) -> tuple[Weights, optax.OptState, dict[str, jax.Array]]:
    """One update of the weights. The LLM is an argument of its own that nothing differentiates.

    With `accumulation` > 1 the batch is worked off in as many parts, with the same result.
    """

    def part_grads(total: Any, part: Batch) -> tuple[Any, None]:
        values, grads = jax.value_and_grad(loss_fn, has_aux=True)(
            weights, llm, part, prefix_length, remat, reading
        )
        return jax.tree.map(jnp.add, total, (values, grads)), None

    zeros = ((jnp.float32(0), jnp.float32(0)), jax.tree.map(jnp.zeros_like, weights))
    if accumulation == 1:
        ((loss, tokens), grads), _ = part_grads(zeros, batch)
    else:
        parts = jax.tree.map(
            lambda x: x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1), batch
        )
        ((loss, tokens), grads), _ = jax.lax.scan(part_grads, zeros, parts)
    tokens = jnp.maximum(tokens, 1)
    grads = jax.tree.map(lambda g: g / tokens, grads)
    updates, opt_state = optimizer.update(grads, opt_state, weights)
    metrics = {"loss": loss / tokens, "grad_norm": optax.tree.norm(grads)}
    return optax.apply_updates(weights, updates), opt_state, metrics


def jit_step(weights: Weights, opt_state: optax.OptState) -> Callable[..., Any]:
    """`train_step`, to be compiled once a batch shape, for arrays that lie as these do.

    The updated arrays are told to lie where the given ones do. Left to itself the compiler picks
    other places for some, and the second step would compile again.
    """
    layout = jax.tree.map(lambda x: x.sharding, (weights, opt_state))
    return jax.jit(
        train_step,
        static_argnames=("optimizer", "prefix_length", "accumulation", "remat", "reading"),
        donate_argnames=("weights", "opt_state"),
        out_shardings=(*layout, None),
    )


class Stop:
    """Notes SIGTERM and Ctrl-C while the loop runs, so that it can save before it ends.

    Of several processes all stop where one gets SIGTERM, which JAX notes; Ctrl-C ends them at once.
    """

    def __enter__(self) -> Self:
        self.signal: signal.Signals | None = None
        noted = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
        self.before = {s: signal.signal(s, self._note) for s in noted}
        return self

    def asked(self, step: int) -> bool:
        """Whether to stop after `step`; to be asked at every step."""
        if is_preempted(step):
            self.signal = signal.SIGTERM
        return self.signal is not None

    def _note(self, number: int, frame: object) -> None:
        if self.signal is not None:  # a second Ctrl-C: at once
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)

    def __exit__(self, *exception: object) -> None:
        for s, handler in self.before.items():
            signal.signal(s, handler)


def fit(
    models: Models,
    method: Method,
    config: ml_collections.ConfigDict,
    examples: Sequence[Tokenized],
    directory: Path,
    validation: Sequence[Tokenized] = (),
) -> Weights:
    """Trains the weights of `method` on `examples`, going on from the newest checkpoint.

    config: `methods.configured`. examples: `inputs.TrainingInputs`'. directory: of checkpoints/,
    metrics.jsonl and tensorboard/. validation: each checkpoint tells its loss on these examples,
    if any. Returns the last step's weights, which need not be the best.

    Raises:
        SystemExit: on SIGTERM or Ctrl-C, after a checkpoint was saved.
        FloatingPointError: the loss is no number any more.
        CheckpointError: the newest checkpoint is of other data.
    """
    mesh = models.mesh
    assemble = models.assemble(
        config,
        examples,
        config.train.batch_size,
        seed=config.seed,
        history_dropout=config.plug.history_dropout,
        persona_dropout=config.plug.persona_dropout,
    )
    plan = Plan(assemble.buckets.of, config.train.batch_size, config.train.epochs, config.seed)
    optimizer = make_optimizer(
        len(plan),
        config.train.learning_rate,
        config.train.weight_decay,
        config.train.warmup,
        config.train.clip_norm,
        config.plug.encoder_rate,
    )
    shapes = models.abstract_weights(method, config)
    trained = shapes, abstract_optimizer(optimizer, shapes, mesh)
    jitted = jit_step(*trained)

    def lower(bucket: int) -> jax.stages.Lowered:
        empty = assemble((0, bucket, np.zeros(0, int)))
        with jax.set_mesh(mesh):
            return jitted.lower(
                *trained,
                models.abstract_llm,
                place_batch(empty, mesh),
                optimizer=optimizer,
                prefix_length=models.tokenizer.prefix_length,
                accumulation=config.train.accumulation,
                remat=config.train.remat,
                reading=method.reading,
            )

    buckets = [plan[i][1] for i in range(len(plan))]
    soft = soft_tokens(config.plug, method.reading) if method.plug else 0
    kept = Checkpoints(directory / "checkpoints" / method.name, config.train.keep)
    with contextlib.closing(kept) as checkpoints, contextlib.ExitStack() as stack:
        latest = checkpoints.latest_for_all()
        if latest is None:
            weights, step = None, 0
        elif latest <= len(plan):
            weights, opt_state, step = checkpoints.restore(*trained)
        else:
            raise CheckpointError(
                f"{directory}: the checkpoint is of step {latest}, but this run "
                f"has {len(plan)}; the data have changed since: give another --workdir"
            )
        if step == len(plan):
            say(f"training {method.name}: all {step} steps were done")
            return weights
        compiled = stack.enter_context(compiled_ahead(lower, dict.fromkeys(buckets[step:])))
        # Meanwhile, what no compiler needs.
        llm = models.llm
        if weights is None:
            weights = models.new_weights(method, config)
            opt_state = init_optimizer(optimizer, weights, mesh)
        data = training_batches(plan, assemble, step)
        writer = stack.enter_context(contextlib.closing(Writer(directory, method.name, step)))
        stop = stack.enter_context(Stop())
        progress = stack.enter_context(
            Progress(f"training {method.name}", len(plan), "steps", step)
        )
        since, tokens, recent, info = time.monotonic(), 0, [], ""
        while step < len(plan):
            batch = next(data)
            own = batch.prompt_mask.sum() + batch.target_mask.sum() + soft * batch.weight.sum()
            # Of several processes each sees its own rows alone.
            tokens += int(own) * config.train.batch_size // len(batch.weight)
            update = compiled(buckets[step])
            weights, opt_state, metrics = update(weights, opt_state, llm, place_batch(batch, mesh))
            step += 1
            recent.append(metrics)
            if step % config.train.log_every == 0 or step == len(plan):
                # The only place where the host waits for the device.
                values = {name: float(np.mean([m[name] for m in recent])) for name in metrics}
                if not math.isfinite(values["loss"]):
                    raise FloatingPointError(
                        f"the loss is {values['loss']} at step {step}; lower "
                        "config.train.learning_rate "
                        f"(the last checkpoint is step {checkpoints.latest})"
                    )
                seconds = time.monotonic() - since
                values["steps_per_second"] = len(recent) / seconds
                values["tokens_per_second"] = tokens / seconds
                writer.write(step, **values)
                info = (
                    "loss {loss:.3f}, {steps_per_second:.1f} steps/s, "
                    "{tokens_per_second:.0f} tokens/s"
                ).format(**values)
                since, tokens, recent = time.monotonic(), 0, []
            progress.advance(1, info)
            stopped = stop.asked(step) and step < len(plan)
            if stopped or step % config.train.checkpoint_every == 0 or step == len(plan):
                loss = None
                if validation and not stopped:
                    before = time.monotonic()
                    loss = validation_loss(models, method, config, weights, validation)
                    writer.write(step, validation_loss=loss)
                    since += time.monotonic() - before
                checkpoints.save(step, weights, opt_state, loss)
                writer.flush()
            if stopped:
                checkpoints.wait()
                say(
                    f"{stop.signal.name}: saved step {step} of {len(plan)}; "
                    "run the same command again to go on from there"
                )
                raise SystemExit(128 + stop.signal)
        checkpoints.wait()
    return weights


def training_seconds(directory: Path, method: str) -> float:
    """How long `fit` has worked on the method's steps, those of all starts together."""
    seconds, before = 0.0, 0
    for step, speed in read_scalars(directory / "metrics.jsonl", "steps_per_second")[
        method
    ].items():
        seconds += (step - before) / speed
        before = step
    return seconds


def validation_loss(
    models: Models,
    method: Method,
    config: ml_collections.ConfigDict,
    weights: Weights,
    examples: Sequence[Tokenized],
) -> float:
    """The mean loss per target token, without dropout."""
    size = config.train.batch_size
    assemble = models.assemble(config, examples, size)
    loss = jax.jit(loss_fn, static_argnames=("prefix_length", "reading"))
    total = np.zeros(2)
    for bucket, indices in plan_batches(np.arange(len(examples)), assemble.buckets.of, size):
        with jax.set_mesh(models.mesh):
            batch = place_batch(assemble((0, bucket, indices)), models.mesh)
            found = loss(
                weights,
                models.llm,
                batch,
                prefix_length=models.tokenizer.prefix_length,
                reading=method.reading,
            )
        total += np.array(found)
    return float(total[0] / total[1])
