"""The loop that fits a plug or a LoRA: resume, step, log, validate, save."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from pplug_jax.errors import CheckpointError
from pplug_jax.feed.batches import (
    Assemble,
    Batch,
    Plan,
    Tokenized,
    place_batch,
    plan_batches,
    training_batches,
)
from pplug_jax.llm import LLM
from pplug_jax.methods.table import Method
from pplug_jax.plugs.forward import Weights
from pplug_jax.plugs.registry import PLUGS
from pplug_jax.runtime.ahead import compiled_ahead
from pplug_jax.runtime.console import Progress, say
from pplug_jax.session import Models
from pplug_jax.session.inputs import assembler, place_of
from pplug_jax.session.weights import abstract_weights, new_weights
from pplug_jax.settings import Settings
from pplug_jax.storage.checkpoint import Checkpoints
from pplug_jax.storage.scalars import Writer, read_scalars
from pplug_jax.storage.workdir import METRICS, checkpoints_path
from pplug_jax.train.step import (
    abstract_optimizer,
    init_optimizer,
    jit_step,
    loss_fn,
    optimizer_of,
)
from pplug_jax.train.stop import Stop
from pplug_jax.train.watch import USELESS, Start, llm_loss


def fit(
    models: Models,
    method: Method,
    config: Settings,
    tokenized: Sequence[Tokenized],
    directory: Path,
    validation: Sequence[Tokenized] = (),
) -> Weights:
    """Train the weights of `method`, from the newest checkpoint on.

    Args:
        models: the run's models.
        method: the method.
        config: the method's config (`table.configured`).
        tokenized: the training examples (`inputs.TrainingInputs`).
        directory: receives checkpoints/, metrics.jsonl and tensorboard/.
        validation: each checkpoint records the loss on these examples, if any.

    Returns:
        the last step's weights, which need not be the best.

    Raises:
        SystemExit: SIGTERM or Ctrl-C came; a checkpoint was saved.
        FloatingPointError: the loss left, and `config.train.on_divergence` says to stop, or there
            is no good checkpoint to go back to.
        CheckpointError: the newest checkpoint is of other data.
    """
    assemble = assembler(
        models,
        method,
        config,
        tokenized,
        config.train.batch_size,
        seed=config.seed,
        history_dropout=config.plug.history_dropout,
        persona_dropout=config.plug.persona_dropout,
    )
    plan = Plan(assemble.buckets.of, config.train.batch_size, config.train.epochs, config.seed)
    optimizer = optimizer_of(config, len(plan))
    shapes = abstract_weights(models, method, config)
    trained = shapes, abstract_optimizer(optimizer, shapes, models.mesh)
    lower = _lowering(models, method, config, assemble, optimizer, trained)
    buckets = [plan[i][1] for i in range(len(plan))]
    soft = PLUGS[method.kind].soft_tokens(config, method.reading)
    kept = Checkpoints(checkpoints_path(directory, method.name), config.train.keep)
    with contextlib.closing(kept) as checkpoints, contextlib.ExitStack() as stack:
        weights, opt_state, step = _resumed(checkpoints, trained, len(plan))
        if step == len(plan):
            say(f"training {method.name}: all {step} steps were done")
            return weights
        compiled = stack.enter_context(compiled_ahead(lower, dict.fromkeys(buckets[step:])))
        # Meanwhile, what no compiler needs.
        llm = models.llm
        if weights is None:
            weights = new_weights(models, method, config)
            opt_state = init_optimizer(optimizer, weights, models.mesh)
        data = training_batches(plan, assemble, step)
        start = Start.read(directory, method.name)
        writer = stack.enter_context(contextlib.closing(Writer(directory, method.name, step)))
        stop = stack.enter_context(Stop())
        progress = stack.enter_context(
            Progress(f"training {method.name}", len(plan), "steps", step)
        )
        own = functools.partial(_own_loss, models, method, config)
        meter, info = Meter(), ""
        while step < len(plan):
            batch = next(data)
            tokens = batch.prompt_mask.sum() + batch.target_mask.sum() + soft * batch.weight.sum()
            update = compiled(buckets[step])
            placed = place_batch(batch, models.mesh)
            if step == 0:
                with meter.paused():
                    own_loss = own(placed)
            weights, opt_state, metrics = update(weights, opt_state, llm, placed)
            if step == 0:
                start = Start(float(metrics["loss"]), own_loss)
                writer.write(1, start_loss=start.loss, start_llm_loss=start.llm_loss)
            step += 1
            # Of several processes each sees its own rows alone.
            meter.add(metrics, int(tokens) * config.train.batch_size // len(batch.weight))
            saving = step % config.train.checkpoint_every == 0 or step == len(plan)
            if saving or step % config.train.log_every == 0:
                values = meter.read()
                loss = float(metrics["loss"])
                if start.suspect(values["loss"]) and (problem := start.problem(loss, own(placed))):
                    problem = f"{method.name} diverges: at step {step} {problem}"
                    advice = "lower config.train.learning_rate"
                    if config.train.on_divergence == "stop":
                        raise FloatingPointError(f"{problem}; {advice}")
                    last = _last_good(checkpoints, trained, start, own, update, llm, placed)
                    if last is None:
                        raise FloatingPointError(f"{problem}, before any good checkpoint; {advice}")
                    say(f"warning: {problem}; {advice}. The training ends with step {last}")
                    return checkpoints.restore(*trained)[0]
                writer.write(step, **values)
                info = (
                    "loss {loss:.3f}, {steps_per_second:.1f} steps/s, "
                    "{tokens_per_second:.0f} tokens/s"
                ).format(**values)
            progress.advance(1, info)
            stopped = stop.asked(step) and step < len(plan)
            if stopped or saving:
                validated = None
                if validation and not stopped:
                    with meter.paused():
                        validated = validation_loss(models, method, config, weights, validation)
                    writer.write(step, validation_loss=validated)
                checkpoints.save(step, weights, opt_state, validated)
                writer.flush()
            if stopped:
                checkpoints.wait()
                say(
                    f"{stop.signal.name}: saved step {step} of {len(plan)}; "
                    "run the same command again to go on from there"
                )
                raise SystemExit(128 + stop.signal)
        checkpoints.wait()
        if values["loss"] > start.llm_loss and loss > (llm_alone := own(placed)) + USELESS:
            say(
                f"warning: {method.name} ends with a loss of {loss:.3f} on its last batch, where "
                f"the LLM alone has {llm_alone:.3f}: nothing of use was learnt; try other learning "
                "rates (config.tune.learning_rates)"
            )
    return weights


def _own_loss(models: Models, method: Method, config: Settings, batch: Batch) -> float:
    """Return the LLM's own loss on one of the method's training batches."""
    with jax.set_mesh(models.mesh):
        place, parts = place_of(models, method, config), config.train.accumulation
        return float(llm_loss(models.llm, batch, place=place, accumulation=parts))


def _lowering(
    models: Models,
    method: Method,
    config: Settings,
    assemble: Assemble,
    optimizer: optax.GradientTransformation,
    trained: tuple[Weights, Any],
) -> Callable[[int], jax.stages.Lowered]:
    """Return a function that lowers the update for a bucket.

    Args:
        models: the run's models.
        method: the method.
        config: the method's config.
        assemble: makes batches of the bucket's shape.
        optimizer: of the update.
        trained: the abstract weights and optimiser state.
    """
    jitted = jit_step(*trained)

    def lower(bucket: int) -> jax.stages.Lowered:
        empty = assemble((0, bucket, np.zeros(0, int)))
        with jax.set_mesh(models.mesh):
            return jitted.lower(
                *trained,
                models.abstract_llm,
                place_batch(empty, models.mesh),
                optimizer=optimizer,
                place=place_of(models, method, config),
                accumulation=config.train.accumulation,
                remat=config.train.remat,
                reading=method.reading,
            )

    return lower


def _resumed(
    checkpoints: Checkpoints, trained: tuple[Weights, Any], steps: int
) -> tuple[Weights | None, Any, int]:
    """Return the newest checkpoint's weights, optimiser state and step, or (None, None, 0).

    Raises:
        CheckpointError: the checkpoint is of more than `steps` steps, so of other data.
    """
    latest = checkpoints.latest_for_all()
    if latest is None:
        return None, None, 0
    if latest > steps:
        raise CheckpointError(
            f"{checkpoints.directory}: the checkpoint is of step {latest}, but this run "
            f"has {steps}; the data have changed since: give another --workdir"
        )
    return checkpoints.restore(*trained)


def _last_good(
    checkpoints: Checkpoints,
    trained: tuple[Weights, Any],
    start: Start,
    own: Callable[[Batch], float],
    update: Callable[..., tuple[Weights, Any, dict[str, jax.Array]]],
    llm: LLM,
    batch: Batch,
) -> int | None:
    """Return the step of the newest checkpoint whose loss has not left, or None.

    Newer ones are deleted: a step's loss is that before its update, so that a checkpoint may hold
    what only the next step shows.

    Args:
        checkpoints: of the training that diverged.
        trained: the abstract weights and optimiser state.
        start: where the training began.
        own: returns the LLM's own loss on a batch.
        update: makes a step.
        llm: the LLM.
        batch: the batch to judge by.
    """
    checkpoints.wait()
    while checkpoints.latest_for_all() is not None:
        weights, opt_state, step = checkpoints.restore(*trained)
        metrics = update(weights, opt_state, llm, batch)[2]
        if not start.problem(float(metrics["loss"]), own(batch)):
            return step
        checkpoints.delete(step)
    return None


class Meter:
    """The mean metrics of the steps since the last reading, and their speed."""

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self.since, self.tokens = time.monotonic(), 0
        self.metrics: list[dict[str, jax.Array]] = []

    def add(self, metrics: dict[str, jax.Array], tokens: int) -> None:
        """Note a step, without waiting for the device."""
        self.metrics.append(metrics)
        self.tokens += tokens

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time that the context takes."""
        before = time.monotonic()
        yield
        self.since += time.monotonic() - before

    def read(self) -> dict[str, float]:
        """Return each metric's mean, `steps_per_second` and `tokens_per_second`, and start anew.

        Only here does the host wait for the device.
        """
        # NumPy would wrap what interrupts the wait into an error of its own.
        metrics = jax.device_get(self.metrics)
        values = {name: float(np.mean([step[name] for step in metrics])) for name in metrics[0]}
        seconds = time.monotonic() - self.since
        values["steps_per_second"] = len(metrics) / seconds
        values["tokens_per_second"] = self.tokens / seconds
        self._restart()
        return values


def training_seconds(directory: Path, method: str) -> float:
    """Return the seconds that `fit` took for the method's steps, over all starts."""
    seconds, before = 0.0, 0
    for step, speed in read_scalars(directory / METRICS, "steps_per_second")[method].items():
        seconds += (step - before) / speed
        before = step
    return seconds


def validation_loss(
    models: Models,
    method: Method,
    config: Settings,
    weights: Weights,
    tokenized: Sequence[Tokenized],
) -> float:
    """Return the mean loss per target token, without dropout."""
    size = config.train.batch_size
    assemble = assembler(models, method, config, tokenized, size)
    loss = jax.jit(loss_fn, static_argnames=("place", "reading"))
    total = np.zeros(2)
    for bucket, indices in plan_batches(np.arange(len(tokenized)), assemble.buckets.of, size):
        with jax.set_mesh(models.mesh):
            batch = place_batch(assemble((0, bucket, indices)), models.mesh)
            sums = loss(
                weights,
                models.llm,
                batch,
                place=place_of(models, method, config),
                reading=method.reading,
            )
        total += np.array(sums)
    return float(total[0] / total[1])
