"""Fits a plug: the loss, the jit-compiled step, and the loop around them."""

import functools
import math
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from pplug_jax.checkpoint import CheckpointError, Checkpoints
from pplug_jax.data.batches import (
    Assemble,
    Batch,
    Buckets,
    Plan,
    Tokenized,
    place_batch,
    training_batches,
)
from pplug_jax.embedder import PAPER, Reading, UserEmbedder
from pplug_jax.llm import LLM
from pplug_jax.mesh import replicated
from pplug_jax.methods import Method, histories, inputs_embeds
from pplug_jax.models import Models
from pplug_jax.progress import Progress, say
from pplug_jax.writer import Writer


@functools.lru_cache
def make_optimizer(
    steps: int, learning_rate: float, weight_decay: float, warmup: float, clip_norm: float
) -> optax.GradientTransformation:
    """AdamW behind global-norm clipping, with linear warm-up and linear decay to 0, as the paper.

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
        optax.clip_by_global_norm(clip_norm), optax.adamw(schedule, weight_decay=weight_decay)
    )


def init_optimizer(
    optimizer: optax.GradientTransformation, plug: UserEmbedder, mesh: Mesh
) -> optax.OptState:
    """The first state: moments lie as the plug's parameters do, counters on every device."""
    return jax.tree.map(
        lambda x: x if x.ndim else jax.device_put(x, replicated(mesh)), optimizer.init(plug)
    )


def loss_fn(
    plug: UserEmbedder,
    llm: LLM,
    batch: Batch,
    prefix_length: int = 0,
    remat: bool = False,
    reading: Reading = PAPER,
) -> tuple[jax.Array, jax.Array]:
    """The sum over target tokens of -log p(y_t | I, P, x, y_<t), and their number; () float32."""
    history = batch.query, batch.query_mask, batch.history, batch.history_mask
    soft = plug(*history, reading=reading, remat=remat)
    embeds, mask = inputs_embeds(llm, soft, batch.prompt, batch.prompt_mask, prefix_length)
    logits = llm.unembed(llm.target_hidden(embeds, mask, batch.target, batch.target_mask, remat))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.target)
    return jnp.sum(losses * batch.target_mask), jnp.sum(batch.target_mask).astype(jnp.float32)


def train_step(
    plug: UserEmbedder,
    opt_state: optax.OptState,
    llm: LLM,
    batch: Batch,
    *,
    optimizer: optax.GradientTransformation,
    prefix_length: int,
    accumulation: int = 1,
    remat: bool = False,
    reading: Reading = PAPER,
) -> tuple[UserEmbedder, optax.OptState, dict[str, jax.Array]]:
    """One update of the plug. The LLM is an argument of its own that nothing differentiates.

    With `accumulation` > 1 the batch is worked off in as many parts, with the same result.
    """

    def part_grads(total: Any, part: Batch) -> tuple[Any, None]:
        values, grads = jax.value_and_grad(loss_fn, has_aux=True)(
            plug, llm, part, prefix_length, remat, reading
        )
        return jax.tree.map(jnp.add, total, (values, grads)), None

    zeros = ((jnp.float32(0), jnp.float32(0)), jax.tree.map(jnp.zeros_like, plug))
    if accumulation == 1:
        ((loss, tokens), grads), _ = part_grads(zeros, batch)
    else:
        parts = jax.tree.map(
            lambda x: x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1), batch
        )
        ((loss, tokens), grads), _ = jax.lax.scan(part_grads, zeros, parts)
    tokens = jnp.maximum(tokens, 1)
    grads = jax.tree.map(lambda g: g / tokens, grads)
    updates, opt_state = optimizer.update(grads, opt_state, plug)
    metrics = {"loss": loss / tokens, "grad_norm": optax.tree.norm(grads)}
    return optax.apply_updates(plug, updates), opt_state, metrics


def jit_step(plug: UserEmbedder, opt_state: optax.OptState) -> Callable[..., Any]:
    """`train_step`, to be compiled once a batch shape, for arrays that lie as these do.

    The updated arrays are told to lie where the given ones do. Left to itself the compiler picks
    other places for some, and the second step would compile again.
    """
    layout = jax.tree.map(lambda x: x.sharding, (plug, opt_state))
    return jax.jit(
        train_step,
        static_argnames=("optimizer", "prefix_length", "accumulation", "remat", "reading"),
        donate_argnames=("plug", "opt_state"),
        out_shardings=(*layout, None),
    )


class Stop:
    """Notes SIGTERM and Ctrl-C while the loop runs, so that it can save before it ends."""

    def __enter__(self) -> Self:
        self.signal: signal.Signals | None = None
        self.before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, number: int, frame: object) -> None:
        if self.signal is not None:  # a second Ctrl-C: at once
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)

    def __exit__(self, *exception: object) -> None:
        for s, handler in self.before.items():
            signal.signal(s, handler)


def fit(models: Models, examples: Sequence[Tokenized], method: Method) -> UserEmbedder:
    """Trains the plug of `method` on `examples`, going on from the newest checkpoint.

    Raises:
        SystemExit: on SIGTERM or Ctrl-C, after a checkpoint was saved.
        FloatingPointError: the loss is no number any more.
        CheckpointError: the newest checkpoint is of other data.
    """
    config, llm, mesh = models.config, models.llm, models.mesh
    rows = histories(method, [example.rows for example in examples], config.seed)
    tokenized = [e._replace(rows=r) for e, r in zip(examples, rows, strict=True)]
    buckets = Buckets(tokenized, config.data.buckets, models.encoder.model.config.max_length)
    plan = Plan(buckets.of, config.train.batch_size, config.train.epochs, config.seed)
    assemble = Assemble(
        tokenized,
        buckets,
        models.store,
        config.train.batch_size,
        seed=config.seed,
        history_dropout=config.plug.history_dropout,
        persona_dropout=config.plug.persona_dropout,
    )
    data = training_batches(plan, assemble)
    plug = models.new_plug()
    optimizer = make_optimizer(
        len(plan),
        config.train.learning_rate,
        config.train.weight_decay,
        config.train.warmup,
        config.train.clip_norm,
    )
    opt_state = init_optimizer(optimizer, plug, mesh)
    update = jit_step(plug, opt_state)
    step = 0
    checkpoints = Checkpoints(models.workdir / "checkpoints" / method.name, config.train.keep)
    if checkpoints.latest is not None:
        if checkpoints.latest > len(plan):
            raise CheckpointError(
                f"{models.workdir}: the checkpoint is of step {checkpoints.latest}, but this run "
                f"has {len(plan)}; the data have changed since: give another --workdir"
            )
        plug, opt_state, step = checkpoints.restore(plug, opt_state, data)
    writer = Writer(models.workdir, method.name, step)
    soft_tokens = method.reading.instruction + config.plug.num_persona_tokens
    try:
        with (
            Stop() as stop,
            Progress(f"training {method.name}", len(plan), "steps", step) as progress,
        ):
            since, tokens, recent, info = time.monotonic(), 0, [], ""
            while step < len(plan):
                batch = next(data)
                tokens += int(
                    batch.prompt_mask.sum()
                    + batch.target_mask.sum()
                    + soft_tokens * batch.weight.sum()
                )
                with jax.set_mesh(mesh):
                    plug, opt_state, metrics = update(
                        plug,
                        opt_state,
                        llm,
                        place_batch(batch, mesh),
                        optimizer=optimizer,
                        prefix_length=models.tokenizer.prefix_length,
                        accumulation=config.train.accumulation,
                        remat=config.train.remat,
                        reading=method.reading,
                    )
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
                stopped = stop.signal is not None and step < len(plan)
                if stopped or step % config.train.checkpoint_every == 0 or step == len(plan):
                    checkpoints.save(step, plug, opt_state, data)
                if stopped:
                    checkpoints.wait()
                    say(
                        f"{stop.signal.name}: saved step {step} of {len(plan)}; "
                        "run the same command again to go on from there"
                    )
                    raise SystemExit(128 + stop.signal)
            checkpoints.wait()
    finally:
        writer.close()
        checkpoints.close()
    return plug
