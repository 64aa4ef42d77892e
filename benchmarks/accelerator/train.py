"""Part 1: a training step's MFU and memory, against the original recipe in PyTorch.

Real shapes with random weights, the same for all, on a batch with LaMP-5's lengths. All update on
arrays that lie on the card already. `eager` and `compiled` are the original recipe, which pads to
its maxima; `lean` does as little work as ours (`benchmarks.original`). All losses must agree.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks.accelerator.record import Contest, Record
from benchmarks.accelerator.roofline import predicted
from benchmarks.accelerator.shapes import (
    DEVICE,
    RandomModels,
    free,
    random_weights,
    torch_encoder,
    torch_llm,
    torch_peak,
)
from benchmarks.lamp_like import EXAMPLES, draw_examples
from benchmarks.original import SOFT, Planned, Plug, Recipe
from benchmarks.ours import Ours
from benchmarks.timing import medians
from pplug_jax.feed.batches import Plan
from pplug_jax.llm.prompts import Front
from pplug_jax.methods.table import METHODS
from pplug_jax.plan.flops import matmul_flops
from pplug_jax.session.inputs import assembler

STEPS = 4  # updates of a timed call, of which the host waits for the last
REPEATS = 3  # of which the median is taken; a rehearsal takes one

# Where the soft tokens stand -> the fields of the config that say so.
PLACES: dict[str, dict[str, Any]] = {"front": {}}


class Case(NamedTuple):
    """rows: of the batch that all peers take. most_rows: of the one that ours takes alone.

    remat: the latter's. needs: seconds that a peer takes at most, all compiling included.
    """

    llm: str
    encoder: str
    dtype: str
    rows: int
    most_rows: int
    remat: bool
    needs: float


BGE = "BAAI/bge-base-en-v1.5"
REAL = (
    Case("meta-llama/Llama-3.2-1B-Instruct", BGE, "bfloat16", 16, 64, False, 25),
    Case("google/gemma-3-1b-it", BGE, "bfloat16", 16, 64, False, 25),
    # The original keeps some 6 MB a token: more rows do not fit beside ours.
    Case("Qwen/Qwen3-8B", BGE, "bfloat16", 8, 32, True, 40),
)
TINY = (
    Case("tiny-llama", "tiny-bert", "float32", 4, 8, True, 0),
    Case("tiny-gemma3", "tiny-bert", "float32", 4, 8, False, 0),
)


class Work:
    """A batch of so many rows, the one whose padded texts are nearest to the mean of all.

    Only one, for each width has to compile. tokens: of its texts and answers, without padding.
    """

    def __init__(self, models: RandomModels, rows: int):
        vocabulary = min(models.llm_shape.vocab_size, models.encoder_shape.vocab_size)
        examples = draw_examples(EXAMPLES, vocabulary)
        self.rows, self.data = (
            rows,
            assembler(models, METHODS["pplug"], models.config, examples, rows),
        )
        plan = Plan(self.data.buckets.of, rows, 1.0, 0)
        buckets = [plan[step][1] for step in range(len(plan))]
        widths = np.array([self.data.buckets.shapes[bucket].text for bucket in buckets])
        self.planned: Planned = plan[int(np.abs(widths - widths.mean()).argmin())]
        own = [examples[i] for i in self.planned[2]]
        self.tokens = sum(len(x.prompt) + SOFT + len(x.target) for x in own)


class Step:
    """Our update, compiled for one batch."""

    def __init__(self, models: RandomModels, work: Work, remat: bool = False):
        weights = random_weights(models)
        self.ours = Ours(models, work.data, weights, place=Front(1))
        with jax.set_mesh(models.mesh):
            *_, self.batch = arguments = self.ours.arguments(work.planned)
            trace = functools.partial(self.ours.update.trace, *arguments, **self.ours.static)
            traced = trace(remat=remat)
            self.compiled = traced.lower().compile()
            # What is computed twice to save memory is no model FLOP.
            useful = trace(remat=False) if remat else traced
        self.figures = predicted(traced, self.compiled)
        self.figures["model_flops"] = matmul_flops(useful.jaxpr)
        self.figures["places"] = int(self.ours.places(work.planned)[0])

    def __call__(self) -> list[float]:
        """The losses of STEPS updates."""
        losses, ours = [], self.ours
        for _ in range(STEPS):
            ours.weights, ours.state, metrics = self.compiled(
                ours.weights, ours.state, ours.models.llm, self.batch
            )
            losses.append(metrics["loss"])
        return [float(loss) for loss in losses]


def recipe_call(recipe: Recipe, work: Work) -> Callable[[], list[float]]:
    """The same of a recipe."""
    inputs = recipe.inputs(work.planned[2])

    def call() -> list[float]:
        losses = [recipe.update(inputs) for _ in range(STEPS)]
        return [loss.item() for loss in losses]

    return call


def compiled(recipe: Recipe) -> Recipe:
    """The recipe with its loss, and so its gradient, compiled."""
    backend = "inductor" if DEVICE == "cuda" else "eager"  # inductor needs a C++ compiler on CPUs
    recipe.loss = torch.compile(recipe.loss, backend=backend)
    return recipe


def race(contest: Contest, models: RandomModels, work: Work, needs: float, rivals: bool) -> None:
    """Ours at one batch, and its `rivals`, none of which may differ in its losses."""
    record, losses = contest.record, {}

    def join(peer: str, make: Callable[[], Callable[[], list[float]]]) -> None:
        torch_peak()
        found, name = contest.join(peer, make, needs), f"{contest.name}: {peer}"
        if found is not None:
            losses[peer] = found
            first = next(iter(losses.values()))
            difference = float(np.abs(np.subtract(found, first)).max())
            record.note(name, losses=found, loss_difference=difference)
        if peer != "ours":
            record.note(name, memory_bytes=torch_peak())
        free()

    def ours() -> Step:
        step = Step(models, work)
        record.note(f"{contest.name}: ours", **step.figures)
        return step

    join("ours", ours)
    if not rivals:
        return
    llm = record.attempt(f"{contest.name}: eager", lambda: torch_llm(models), needs)
    if llm is None:
        return
    weights = random_weights(models)

    def recipe(lean: bool) -> Recipe:
        plug = Plug(torch_encoder(models, weights.input_encoder), weights, lean).to(DEVICE)
        return Recipe(work.data, llm, plug, 1, models.config.train)

    join("eager", lambda: recipe_call(recipe(lean=False), work))
    join("lean", lambda: recipe_call(recipe(lean=True), work))
    join("compiled", lambda: recipe_call(compiled(recipe(lean=False)), work))


def alone(record: Record, name: str, models: RandomModels, work: Work, remat: bool) -> None:
    """Ours at a batch that fills the card."""
    step = Step(models, work, remat)
    record.note(name, remat=remat, **step.figures)
    step()
    record.note(name, seconds=medians({"ours": step}, REPEATS)["ours"])


def measure(record: Record, case: Case, place: str) -> None:
    name = f"{case.llm}, {place}"
    settings = PLACES[place]
    models = record.attempt(
        name, lambda: RandomModels(case.llm, case.encoder, case.dtype, settings), case.needs
    )
    if models is None:
        return

    def common(work: Work) -> dict[str, Any]:
        about = {"llm": case.llm, "place": place, "dtype": case.dtype, "steps": STEPS}
        return about | {"rows": work.rows, "tokens": work.tokens}

    work = Work(models, case.rows)
    contest = Contest(record, f"{name}, {work.rows} rows", REPEATS, **common(work))
    # The original knows one place only.
    race(contest, models, work, case.needs, rivals=place == "front")
    contest.calls.clear()
    free()
    torch._dynamo.reset()
    work = Work(models, case.most_rows)
    name = f"{name}, {work.rows} rows: ours"
    record.note(name, peer="ours", **common(work))
    record.attempt(name, lambda: alone(record, name, models, work, case.remat), case.needs)


def ceilings(record: Record) -> None:
    """What the card does of the two things that bound a program."""
    side, size = (8192, 2**30) if DEVICE == "cuda" else (256, 2**20)
    matrix = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
    long = jnp.ones(size // 2, jnp.bfloat16)
    product, copy = jax.jit(jnp.dot), jax.jit(jnp.negative)
    cases = {
        "product": lambda: product(matrix, matrix).block_until_ready(),
        "copy": lambda: copy(long).block_until_ready(),
    }
    for call in cases.values():
        call()
    seconds = medians(cases, 10)
    record.note(
        "ceilings",
        flops_per_second=2 * side**3 / seconds["product"],
        bytes_per_second=2 * size / seconds["copy"],
    )


def run(record: Record, rehearse: bool) -> None:
    record.attempt("ceilings", lambda: ceilings(record))
    for place in PLACES:
        for case in TINY if rehearse else REAL:
            measure(record, case, place)
            free()
