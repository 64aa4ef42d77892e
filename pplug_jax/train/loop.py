"""The loop that fits a plug or a LoRA: resume, step, log, validate, save."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from signal import Signals

import jax
import numpy as np

from pplug_jax.errors import CheckpointError
from pplug_jax.feed.batches import Batch, Plan, Tokenized, place_batch, training_batches
from pplug_jax.llm.prompts import Behind
from pplug_jax.methods.table import Method
from pplug_jax.plugs.forward import Weights, read_prompts
from pplug_jax.plugs.registry import PLUGS
from pplug_jax.runtime.ahead import compiled_ahead
from pplug_jax.runtime.console import Progress, say
from pplug_jax.session import Models
from pplug_jax.session.inputs import assembler, place_of
from pplug_jax.session.weights import abstract_weights, new_weights
from pplug_jax.settings import Settings
from pplug_jax.storage.checkpoint import Checkpoints
from pplug_jax.storage.scalars import Writer
from pplug_jax.storage.workdir import checkpoints_path
from pplug_jax.train.meter import Meter
from pplug_jax.train.step import abstract_optimizer, init_optimizer, jit_step, optimizer_of
from pplug_jax.train.stop import Stop
from pplug_jax.train.validate import validation_loss
from pplug_jax.train.watch import USELESS, Start, llm_loss

INFO = "loss {loss:.3f}, {steps_per_second:.1f} steps/s, {tokens_per_second:.0f} tokens/s"


class Trainer:
    """The training of a method's weights.

    Args:
        models: the run's models.
        method: the method.
        config: the method's config (`table.configured`).
        tokenized: the training examples (`inputs.TrainingInputs`).
        directory: receives checkpoints/, metrics.jsonl and tensorboard/.
        validation: each checkpoint records the loss on these examples, if any.
    """

    def __init__(
        self,
        models: Models,
        method: Method,
        config: Settings,
        tokenized: Sequence[Tokenized],
        directory: Path,
        validation: Sequence[Tokenized] = (),
    ):
        self.models, self.method, self.config = models, method, config
        self.directory, self.validation = directory, validation
        train = config.train
        self.assemble = assembler(
            models,
            method,
            config,
            tokenized,
            train.batch_size,
            seed=config.seed,
            history_dropout=config.plug.history_dropout,
        )
        self.plan = Plan(self.assemble.buckets.of, train.batch_size, train.epochs, config.seed)
        self.buckets = [self.plan[i][1] for i in range(len(self.plan))]
        self.soft_tokens = PLUGS[method.kind].soft_tokens(config, method.reading)
        self.place = place_of(models, method, config)
        self.optimizer = optimizer_of(config, len(self.plan))
        shapes = abstract_weights(models, method, config)
        self.trained = shapes, abstract_optimizer(self.optimizer, shapes, models.mesh)
        self.jitted = jit_step(*self.trained)

    def fit(self) -> Weights:
        """Train from the newest checkpoint on.

        Returns:
            the last step's weights, which need not be the best.

        Raises:
            SystemExit: SIGTERM or Ctrl-C came; a checkpoint was saved.
            FloatingPointError: the loss left, and `config.train.on_divergence` says to stop, or
                there is no good checkpoint to go back to.
            CheckpointError: the newest checkpoint is of other data.
        """
        path = checkpoints_path(self.directory, self.method.name)
        with contextlib.closing(Checkpoints(path, self.config.train.keep)) as self.checkpoints:
            self._resume()
            if self.step == len(self.plan):
                say(f"training {self.method.name}: all {self.step} steps were done")
                return self.weights
            self.keeps_prompts = self._keep_prompts()
            programs: list[Callable] = [*[read_prompts] * self.keeps_prompts, self.jitted]
            buckets = dict.fromkeys(self.buckets[self.step :])
            coming = [(program, bucket) for bucket in buckets for program in programs]
            with compiled_ahead(self._lower, coming) as self.compiled:
                self._begin()
                return self._train()

    def _resume(self) -> None:
        """Restore the newest checkpoint, if there is one."""
        latest, steps = self.checkpoints.latest_for_all(), len(self.plan)
        if latest is None:
            self.step = 0
            return
        if latest > steps:
            raise CheckpointError(
                f"{self.checkpoints.directory}: the checkpoint is of step {latest}, but this run "
                f"has {steps}; the data have changed since: give another --workdir"
            )
        self.weights, self.opt_state, self.step = self.checkpoints.restore(*self.trained)

    def _keep_prompts(self) -> bool:
        """Return whether the prompts' keys and values are kept; a batch in parts is to be small."""
        if not isinstance(self.place, Behind) or self.config.train.accumulation > 1:
            return False
        examples = (*self.assemble.tokenized, *self.validation)
        return self.models.prompts.keep(example.prompt for example in examples)

    def _lower(self, program: tuple[Callable, int]) -> jax.stages.Lowered:
        """Lower a function, the step or `read_prompts`, for a bucket's shape."""
        function, bucket = program
        llm, mesh = self.models.abstract_llm, self.models.mesh
        with jax.set_mesh(mesh):
            batch = place_batch(self.assemble((0, bucket, np.zeros(0, int))), mesh)
            if function is read_prompts:
                return read_prompts.lower(llm, batch.text, batch.text_mask)
            if self.keeps_prompts:
                batch = self.models.prompts.abstract(batch)
            return self.jitted.lower(
                *self.trained,
                llm,
                batch,
                optimizer=self.optimizer,
                place=self.place,
                accumulation=self.config.train.accumulation,
                remat=self.config.train.remat,
                reading=self.method.reading,
            )

    def _begin(self) -> None:
        """Do what needs no compiler: load the LLM, and make the weights if none were restored."""
        self.llm = self.models.llm
        if self.step == 0:
            self.weights = new_weights(self.models, self.method, self.config)
            self.opt_state = init_optimizer(self.optimizer, self.weights, self.models.mesh)
        self.start = Start.read(self.directory, self.method.name)

    def _train(self) -> Weights:
        """Make the steps that are left."""
        train, name, steps = self.config.train, self.method.name, len(self.plan)
        info = ""
        with (
            contextlib.closing(Writer(self.directory, name, self.step)) as self.writer,
            Stop() as stop,
            Progress(f"training {name}", steps, "steps", self.step) as progress,
        ):
            self.meter = Meter()
            for batch in training_batches(self.plan, self.assemble, self.step):
                metrics = self._update(batch)
                saving = self.step % train.checkpoint_every == 0 or self.step == steps
                if saving or self.step % train.log_every == 0:
                    means, loss = self.meter.read(), float(metrics["loss"])
                    if problem := self._problem(means["loss"], loss):
                        return self._go_back(problem)
                    self.writer.write(self.step, **means)
                    info = INFO.format(**means)
                progress.advance(1, info)
                signal = stop.asked(self.step) if self.step < steps else None
                if signal or saving:
                    self._save(validated=signal is None)
                if signal:
                    self._end(signal)
            self.checkpoints.wait()
            if means["loss"] > self.start.llm_loss:
                self._compare_with_llm(loss)
        return self.weights

    def _update(self, batch: Batch) -> dict[str, jax.Array]:
        """Make a step with this process' rows of its batch, and return its metrics."""
        tokens = batch.prompt_mask.sum() + batch.target_mask.sum()
        tokens += self.soft_tokens * batch.weight.sum()
        bucket, models = self.buckets[self.step], self.models
        self.update = self.compiled((self.jitted, bucket))
        self.batch = place_batch(batch, models.mesh)
        if self.keeps_prompts:
            read = self.compiled((read_prompts, bucket))
            self.batch = models.prompts.read(self.llm, self.batch, read)
        first = self.step == 0
        if first:
            with self.meter.paused():
                llm_alone = self._llm_loss()
        self.weights, self.opt_state, metrics = self.update(
            self.weights, self.opt_state, self.llm, self.batch
        )
        self.step += 1
        if first:
            self.start = Start(float(metrics["loss"]), llm_alone)
            self.writer.write(1, start_loss=self.start.loss, start_llm_loss=self.start.llm_loss)
        # Of several processes each sees its own rows alone.
        whole = self.config.train.batch_size // len(batch.weight)
        self.meter.add(metrics, int(tokens) * whole)
        return metrics

    def _llm_loss(self) -> float:
        """Return the LLM's own loss on the step's batch."""
        with jax.set_mesh(self.models.mesh):
            parts = self.config.train.accumulation
            return float(llm_loss(self.llm, self.batch, place=self.place, accumulation=parts))

    def _problem(self, mean: float, loss: float) -> str:
        """Return what is wrong with the mean loss and the step's, in words; empty if nothing is."""
        if not self.start.suspect(mean):
            return ""
        return self.start.problem(loss, self._llm_loss())

    def _go_back(self, problem: str) -> Weights:
        """Return the newest checkpoint's weights whose loss has not left, if the config says so.

        Newer ones are deleted: a step's loss is that before its update, so that a checkpoint may
        hold what only the next step shows.
        """
        problem = f"{self.method.name} diverges: at step {self.step} {problem}"
        advice = "lower config.train.learning_rate"
        if self.config.train.on_divergence == "stop":
            raise FloatingPointError(f"{problem}; {advice}")
        self.checkpoints.wait()
        while self.checkpoints.latest_for_all() is not None:
            weights, opt_state, step = self.checkpoints.restore(*self.trained)
            metrics = self.update(weights, opt_state, self.llm, self.batch)[2]
            if not self.start.problem(float(metrics["loss"]), self._llm_loss()):
                say(f"warning: {problem}; {advice}. The training ends with step {step}")
                return self.checkpoints.restore(*self.trained)[0]
            self.checkpoints.delete(step)
        raise FloatingPointError(f"{problem}, before any good checkpoint; {advice}")

    def _save(self, validated: bool) -> None:
        """Begin to write a checkpoint, with the loss on held-out examples if it is `validated`."""
        loss = None
        if self.validation and validated:
            settings = self.models, self.method, self.config
            with self.meter.paused():
                loss = validation_loss(*settings, self.weights, self.validation, self.keeps_prompts)
            self.writer.write(self.step, validation_loss=loss)
        self.checkpoints.save(self.step, self.weights, self.opt_state, loss)
        self.writer.flush()

    def _end(self, signal: Signals) -> None:
        self.checkpoints.wait()
        say(
            f"{signal.name}: saved step {self.step} of {len(self.plan)}; "
            "run the same command again to go on from there"
        )
        raise SystemExit(128 + signal)

    def _compare_with_llm(self, loss: float) -> None:
        """Warn if the last batch's loss is above the LLM's own."""
        llm_alone = self._llm_loss()
        if loss > llm_alone + USELESS:
            say(
                f"warning: {self.method.name} ends with a loss of {loss:.3f} on its last batch, "
                f"where the LLM alone has {llm_alone:.3f}: nothing of use was learnt; try other "
                "learning rates (config.tune.learning_rates)"
            )
