"""What training on a mesh needs: the plan that all tables are made of."""

import math
import time
from typing import NamedTuple

from jax.sharding import Mesh

from pplug_jax.data.sources import data_directory, read_split
from pplug_jax.errors import InputError
from pplug_jax.plan.chips import Slice
from pplug_jax.plan.flops import matmul_flops
from pplug_jax.plan.programs import Programs
from pplug_jax.plan.roofline import GIB, Cost, Memory, compile_program
from pplug_jax.runtime.console import say
from pplug_jax.settings import Settings

# LaMP's training examples, by the task and whether the split is by time (docs/data.md).
EXAMPLES = {
    ("LaMP_1", True): 6542,
    ("LaMP_2", True): 5073,
    ("LaMP_3", True): 20000,
    ("LaMP_4", True): 12500,
    ("LaMP_5", True): 14682,
    ("LaMP_6", True): 4821,
    ("LaMP_7", True): 13437,
    ("LaMP_1", False): 9682,
    ("LaMP_2", False): 3820,
    ("LaMP_3", False): 20000,
    ("LaMP_4", False): 12527,
    ("LaMP_5", False): 9682,
    ("LaMP_6", False): 4840,
    ("LaMP_7", False): 10437,
}


class TrainPlan(NamedTuple):
    """What training on a mesh needs.

    Attributes:
        batch_size: rows a step.
        accumulation: parts of a batch.
        mesh: the mesh.
        memory: bytes of a chip.
        cost: FLOPs and traffic; None if it does not fit.
        useful: FLOPs of a step without what `train.remat` computes twice to save memory.
    """

    batch_size: int
    accumulation: int
    mesh: Mesh
    memory: Memory
    cost: Cost | None
    useful: float

    def seconds(self, where: Slice) -> float:
        """Return the shortest time of a step, endless if it does not fit."""
        return self.cost.seconds(where) if self.cost else math.inf

    def mfu(self, where: Slice) -> float:
        """Return the largest share of the chips' peak that useful work can reach."""
        peak = len(where.devices) * where.chip.flops
        return self.useful / (peak * self.seconds(where))


def axes(mesh: Mesh) -> dict[str, int]:
    """Return the fields of config.mesh that lay out one slice."""
    return {axis: mesh.shape[axis] for axis in ("data", "fsdp", "tensor")}


def mesh_name(mesh: Mesh) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in axes(mesh).items())


def plan_training(programs: Programs, where: Slice) -> TrainPlan:
    """Compile the training step, unless its arrays alone are too large."""
    settings = programs.config.train.batch_size, programs.config.train.accumulation, programs.mesh
    say(
        f"compiling the training step for {where.name}, {mesh_name(programs.mesh)}, {settings[0]} "
        f"rows in {settings[1]} parts ..."
    )
    start = time.monotonic()
    held, limit = programs.held(training=True), where.chip.hbm_gib * GIB
    if held > limit:
        say(f"  its weights and moments alone need {held / GIB:.1f} GiB a chip")
        return TrainPlan(*settings, Memory(held, 0, limit), None, 0.0)
    compiled = compile_program(programs.train(), held)
    say(f"  {fitting(compiled.memory, where)} ({time.monotonic() - start:.0f} s)")
    cost = compiled.cost() if compiled.memory.fits else None
    useful = matmul_flops(programs.train(remat=False).jaxpr)
    return TrainPlan(*settings, compiled.memory, cost, useful)


def fitting(memory: Memory, where: Slice) -> str:
    if memory.limit is None:
        return f"fits: needs {memory.peak / GIB:.2f} of {where.chip.hbm_gib} GiB"
    return f"does not fit: needs {memory.peak / GIB:.2f} of {memory.limit / GIB:.2f} GiB"


def training_examples(config: Settings) -> int | None:
    """Return the number of examples: of the data if at hand, else as published, if at all."""
    if data_directory(config) is None:
        return config.data.sample_train_users
    try:
        return len(read_split(config, "train", lambda error: None))
    except InputError:
        if config.data.path:
            raise
        return EXAMPLES.get((config.task, config.data.time_based))


def hours(config: Settings, seconds: float) -> str:
    """Say how long training takes with steps of `seconds`."""
    examples = training_examples(config)
    if examples is None:
        return (
            f"hours: unknown, as nobody said how many training examples {config.task} has; name "
            "them with --config.data.path=DIR"
        )
    size, epochs = config.train.batch_size, config.train.epochs
    steps = max(1, round(-(-examples // size) * epochs))  # as feed.batches.Plan
    return (
        f"{config.train.epochs:g} epochs of {examples:,} examples are {steps:,} steps: at least "
        f"{steps * seconds / 3600:.2f} hours"
    )
