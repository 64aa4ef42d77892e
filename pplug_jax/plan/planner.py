"""Print the tables of `--mode=plan`: a slice in full, the smallest that fit, the best mesh."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import ml_collections
from jax.sharding import Mesh

from pplug_jax.config import check_config, checked
from pplug_jax.errors import ConfigError
from pplug_jax.plan.chips import CHIPS, Slice, find_slice
from pplug_jax.plan.hlo import COLLECTIVES
from pplug_jax.plan.programs import Programs
from pplug_jax.plan.roofline import GIB, Cost, Memory, compile_program
from pplug_jax.plan.training import TrainPlan, axes, fitting, hours, mesh_name, plan_training
from pplug_jax.plugs.base import parameter_count
from pplug_jax.runtime.console import say
from pplug_jax.runtime.mesh import make_mesh
from pplug_jax.scoring.tables import show_table
from pplug_jax.settings import Settings


class _Program(NamedTuple):
    """A column of the full plan.

    Attributes:
        tokens: tokens of a step, padding included.
        memory: as `TrainPlan.memory`.
        cost: as `TrainPlan.cost`.
        useful: as `TrainPlan.useful`.
    """

    tokens: int
    memory: Memory
    cost: Cost
    useful: float


def show_plan(config: Settings, where: Slice) -> None:
    """Compile all programs for the config's mesh, and print what each needs."""
    programs = Programs(config, make_mesh(**vars(config.mesh), devices=where.devices))
    _describe(programs, where)
    training = plan_training(programs, where)
    if not training.cost:
        say(f"another mesh to try: {_flags(axes(roomy_mesh(config, where)), 'mesh')}")
    held = programs.held(training=False)
    if held > where.chip.hbm_gib * GIB:
        return
    lengths, rows = programs.lengths, config.eval.batch_size
    row, columns = programs.row_tokens, dict[str, _Program]()
    if training.cost:
        tokens = config.train.batch_size * row
        columns["training"] = _Program(tokens, training.memory, training.cost, training.useful)

    def add(name: str, tokens: int, traced: jax.stages.Traced) -> None:
        say(f"compiling {name} ...")
        compiled = compile_program(traced, held)
        if compiled.memory.fits:
            cost = compiled.cost()
            columns[name] = _Program(tokens, compiled.memory, cost, cost.flops)
        else:
            say(f"{name} {fitting(compiled.memory, where)}")

    add("gold losses", rows * row, programs.losses())
    say("compiling answers ...")
    answer = compile_program(programs.answer(), held)
    if answer.memory.fits:
        prefill = answer.cost(while_trips=0)
        decoding = answer.cost(while_trips=1) - prefill
        prompt = lengths.soft + lengths.prompt
        columns["prefill"] = _Program(rows * prompt, answer.memory, prefill, prefill.flops)
        # A step makes one token of each row: of its beams, one is kept.
        columns["decoding"] = _Program(rows, answer.memory, decoding, decoding.flops)
    else:
        say(f"answers {fitting(answer.memory, where)}")
    add("serving: a prompt", programs.longest_prompt, programs.admit())
    add("serving: a step", rows, programs.step())
    if columns:
        _show_programs(columns, where)
    if training.cost:
        say(hours(config, training.cost.seconds(where)))
    if "serving: a prompt" in columns and "serving: a step" in columns:
        reading, step = (
            columns[f"serving: a {part}"].cost.seconds(where) for part in ("prompt", "step")
        )
        rate = 1 / (reading + lengths.new * step / rows)
        say(
            f"the server answers at most {rate:.3g} people a second, if each gets {lengths.new} "
            f"tokens and {rows} are answered at a time"
        )


def _flags(fields: dict[str, int], part: str) -> str:
    return " ".join(f"--config.{part}.{field}={value}" for field, value in fields.items())


def _describe(programs: Programs, where: Slice) -> None:
    config, lengths = programs.config, programs.lengths
    say(
        f"{config.llm.path}, {parameter_count(programs.models.abstract_llm):,} parameters, "
        f"{config.llm.quantize or config.llm.dtype}; training {programs.method.name}, "
        f"{programs.weights.trained(programs.method.reading):,} parameters"
    )
    say(
        f"{where.name}: {len(where.devices)} x {where.chip.hbm_gib} GiB, mesh "
        f"{mesh_name(programs.mesh)}; the chip's peak figures: {where.chip.source}"
    )
    say(
        f"{config.train.batch_size} rows to train on and {config.eval.batch_size} to evaluate, of "
        f"{lengths.prompt} prompt, {lengths.soft} soft, {lengths.target} target and "
        f"{lengths.query} query tokens and {config.data.max_history} items, the longest there can "
        "be"
    )


def _show_programs(columns: dict[str, _Program], where: Slice) -> None:
    peak_flops = len(where.devices) * where.chip.flops
    cells: dict[str, Callable[[_Program], str]] = {
        "tokens": lambda p: f"{p.tokens:,}",
        "HBM of a chip: arguments, GiB": lambda p: f"{p.memory.arguments / GIB:.2f}",
        "temporaries, GiB": lambda p: f"{p.memory.temporaries / GIB:.2f}",
        f"peak, of {where.chip.hbm_gib} GiB": lambda p: f"{p.memory.peak / GIB:.2f}",
        "FLOPs of all chips, 1e12": lambda p: f"{p.cost.flops / 1e12:.3g}",
        "HBM bytes of a chip, 1e9": lambda p: f"{p.cost.moved.hbm / 1e9:.3g}",
        "ICI bytes of a chip, 1e9": lambda p: f"{p.cost.moved.received / 1e9:.3g}",
        "compute, ms": lambda p: f"{1e3 * p.cost.bound(where)['compute']:.3g}",
        "HBM, ms": lambda p: f"{1e3 * p.cost.bound(where)['HBM']:.3g}",
        "ICI, ms": lambda p: f"{1e3 * p.cost.bound(where)['ICI']:.3g}",
        "bound by": lambda p: p.cost.bound_by(where),
        "shortest step, ms": lambda p: f"{1e3 * p.cost.seconds(where):.3g}",
        "most tokens/s": lambda p: f"{p.tokens / p.cost.seconds(where):,.0f}",
        "highest MFU": lambda p: f"{p.useful / (peak_flops * p.cost.seconds(where)):.1%}",
    }
    rows = [[title, *map(cell, columns.values())] for title, cell in cells.items()]
    show_table("One step of each program", ["", *columns], rows)
    rows = []
    for kind in COLLECTIVES:
        moved = (program.cost.moved.collectives[kind] for program in columns.values())
        rows.append([kind, *(f"{n:.0f}, {size / 1e6:,.1f} MB" if n else "" for n, size in moved)])
    show_table("Collectives of a step, and bytes that a chip receives", ["", *columns], rows)


def roomy_mesh(config: Settings, where: Slice) -> Mesh:
    """Return the mesh with the fewest chips a copy whose arrays leave half of the HBM to
    activations.

    Tensor parallelism only takes the chips that the batch has no rows for.
    """
    chips = len(where.devices)
    parts = math.gcd(
        chips, config.train.batch_size // config.train.accumulation, config.eval.batch_size
    )
    tensor = chips // parts
    for fsdp in (2**i for i in range(parts.bit_length())):
        mesh = make_mesh(-1, fsdp, tensor, where.devices)
        if Programs(config, mesh).held(training=True) < where.chip.hbm_gib * GIB / 2:
            break
    return mesh


def show_slices(config: Settings) -> None:
    """Compile the training step for ever larger slices of each kind of chip, until it fits."""
    rows = []
    for kind, chip in CHIPS.items():
        for shape in chip.slices:
            where = find_slice(f"{kind}:{shape}")
            train_plan = plan_training(Programs(config, roomy_mesh(config, where)), where)
            rows.append(_row(where, train_plan))
            if train_plan.memory.fits:
                rows[-1][0] += " *"
                break
    show_table("* the smallest slice of its kind that training fits", _HEADER, rows)


_HEADER = ["slice", "mesh", "batch", "GiB a chip", "of", "bound by", "ms", "examples/s", "MFU"]


def _row(where: Slice, plan: TrainPlan) -> list[str]:
    parts = f" in {plan.accumulation}" if plan.accumulation > 1 else ""
    row = [
        where.name,
        mesh_name(plan.mesh),
        f"{plan.batch_size}{parts}",
        f"{plan.memory.peak / GIB:.2f}",
        str(where.chip.hbm_gib),
    ]
    if plan.cost is None:
        return [*row, "does not fit", "", "", ""]
    seconds = plan.cost.seconds(where)
    return [
        *row,
        plan.cost.bound_by(where),
        f"{1e3 * seconds:.3g}",
        f"{plan.batch_size / seconds:.3g}",
        f"{plan.mfu(where):.1%}",
    ]


def meshes(chips: int) -> Iterator[tuple[int, int, int]]:
    """Yield all (data, fsdp, tensor) of so many chips, in powers of 2."""
    powers = [2**i for i in range(chips.bit_length())]
    for fsdp, tensor in itertools.product(powers, powers):
        if chips % (fsdp * tensor) == 0:
            yield chips // (fsdp * tensor), fsdp, tensor


def suggest(config: Settings, where: Slice) -> None:
    """Compile the training step for all meshes of a slice, and print the fastest that fit.

    Each mesh is tried with the config's batch and twice that, in ever more parts until it fits.
    """
    plans: list[TrainPlan] = []
    for shape in meshes(len(where.devices)):
        for batch_size in (config.train.batch_size, 2 * config.train.batch_size):
            accumulation = config.train.accumulation
            while tried := _try(config, where, shape, batch_size, accumulation):
                plans.append(tried)
                if tried.memory.fits or not tried.memory.temporaries:
                    break
                accumulation *= 2
            if accumulation > config.train.accumulation:
                break  # more rows would only be more parts
    plans.sort(key=lambda option: option.seconds(where) / option.batch_size)
    rows = [_row(where, option) for option in plans]
    show_table(f"{where.name}, the shortest time an example first", _HEADER, rows)
    if plans and plans[0].cost:
        batch = {"batch_size": plans[0].batch_size, "accumulation": plans[0].accumulation}
        say(f"{_flags(axes(plans[0].mesh), 'mesh')} {_flags(batch, 'train')}")


def _try(
    config: Settings,
    where: Slice,
    shape: tuple[int, int, int],
    batch_size: int,
    accumulation: int,
) -> TrainPlan | None:
    """Plan training with these settings; return None if they leave some chip without a row."""
    config = config.changed({"train.batch_size": batch_size, "train.accumulation": accumulation})
    try:
        check_config(config)
        programs = Programs(config, make_mesh(*shape, where.devices))
    except ConfigError:
        return None
    return plan_training(programs, where)


def plan(given: ml_collections.ConfigDict, topology: str, search: bool) -> None:
    """Print what the config's run needs of a slice, or of all.

    Args:
        given: the config.
        topology: a slice such as `v5e:4x4`, or `all`.
        search: try other meshes and batches instead of the config's.

    Raises:
        InputError: a setting that cannot work, an unknown topology, or no TPU compiler.
    """
    # A TPU that is there is left alone, and nothing is cached that only a TPU could read again.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    config = checked(given)
    if config.mesh.slices != 1:
        raise ConfigError(
            "config.mesh.slices: one slice is planned; of several, each is like one with its share "
            "of config.train.batch_size: set that, and config.mesh.slices=1"
        )
    if topology == "all":
        show_slices(config)
    elif search:
        suggest(config, find_slice(topology))
    else:
        show_plan(config, find_slice(topology))
