"""Fits a plug or a LoRA: the loss, the jit-compiled step, and the loop around them."""

import contextlib
import math
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import ml_collections
import numpy as np

from pplug_jax.errors import CheckpointError
from pplug_jax.feed.batches import (
    Plan,
    Tokenized,
    place_batch,
    plan_batches,
    training_batches,
)
from pplug_jax.methods.table import Method
from pplug_jax.plugs.forward import Weights
from pplug_jax.plugs.registry import PLUGS
from pplug_jax.runtime.ahead import compiled_ahead
from pplug_jax.runtime.console import Progress, say
from pplug_jax.session import Models
from pplug_jax.storage.checkpoint import Checkpoints
from pplug_jax.storage.scalars import Writer, read_scalars
from pplug_jax.storage.workdir import METRICS, checkpoints_path
from pplug_jax.train.step import (
    abstract_optimizer,
    init_optimizer,
    jit_step,
    loss_fn,
    make_optimizer,
)
from pplug_jax.train.stop import Stop


def fit(
    models: Models,
    method: Method,
    config: ml_collections.ConfigDict,
    examples: Sequence[Tokenized],
    directory: Path,
    validation: Sequence[Tokenized] = (),
) -> Weights:
    """Trains the weights of `method` on `examples`, going on from the newest checkpoint.

    config: `table.configured`. examples: `inputs.TrainingInputs`'. directory: of checkpoints/,
    metrics.jsonl and tensorboard/. validation: each checkpoint tells its loss on these examples,
    if any. Returns the last step's weights, which need not be the best.

    Raises:
        SystemExit: on SIGTERM or Ctrl-C, after a checkpoint was saved.
        FloatingPointError: the loss is no number any more.
        CheckpointError: the newest checkpoint is of other data.
    """
    mesh = models.mesh
    assemble = models.assemble(
        method,
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
    soft = PLUGS[method.kind].soft_tokens(config, method.reading)
    kept = Checkpoints(checkpoints_path(directory, method.name), config.train.keep)
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
                # The only place where the host waits for the device. NumPy would wrap what
                # interrupts the wait into an error of its own.
                told = jax.device_get(recent)
                values = {name: float(np.mean([m[name] for m in told])) for name in metrics}
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
    for step, speed in read_scalars(directory / METRICS, "steps_per_second")[method].items():
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
    assemble = models.assemble(method, config, examples, size)
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
