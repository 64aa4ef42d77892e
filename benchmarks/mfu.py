"""The share of the accelerator's peak that a training step uses: `python -m benchmarks.mfu`

The step is that of `--mode=train`, for a plug in front of an LLM and an encoder (BGE base) of
published shapes with random weights; every row is as long as its arrays. FLOPs are those of the
matrix products, as `--mode=plan` counts them, without what is computed twice to save memory.
"""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import app, flags

from benchmarks.cards import find_card
from benchmarks.fill import fill
from benchmarks.timing import in_turn, report
from configs import lamp5
from pplug_jax.llm.shapes import PUBLISHED
from pplug_jax.plan.flops import matmul_flops
from pplug_jax.plan.programs import Programs
from pplug_jax.runtime.mesh import make_mesh
from pplug_jax.settings import Settings
from pplug_jax.train.step import init_optimizer, make_optimizer

FLAGS = flags.FLAGS
flags.DEFINE_string("llm", "meta-llama/Llama-3.2-1B-Instruct", "A name of pplug_jax.llm.shapes.")
flags.DEFINE_integer("layers", 0, "Of the LLM; 0: all of them, on a CPU one.")
flags.DEFINE_integer("batch", 0, "Rows of a step; 0: 32, on a CPU 2.")
flags.DEFINE_integer("input", 0, "Tokens of an input; 0: 512, on a CPU 64.")
flags.DEFINE_integer("target", 64, "Tokens of an answer.")
flags.DEFINE_integer("history", 512, "Items of a history.")
flags.DEFINE_bool("remat", True, "As the presets: recompute activations in the backward pass.")
flags.DEFINE_float("peak_tflops", None, "The device's peak in bfloat16; by default as published.")

SIDE = 2048  # of the matrices that a CPU's peak is measured with


def write_shape(directory: Path, layers: int) -> None:
    """The config.json of `--llm`, with so many layers; 0 is all."""
    shape = type(PUBLISHED[FLAGS.llm]).from_dict(PUBLISHED[FLAGS.llm].to_dict())
    if layers:
        shape.num_hidden_layers = layers
        if getattr(shape, "layer_types", None):
            shape.layer_types = shape.layer_types[:layers]
    shape.save_pretrained(directory)


def make_programs(directory: Path, on_cpu: bool) -> Programs:
    config = lamp5.get_config("llama3_1b")  # as any preset but for its LLM
    config.llm.path, config.llm.chat = str(directory), False
    config.methods = ("pplug",)
    length = FLAGS.input or (64 if on_cpu else 512)
    config.data.max_input_length = config.encoder.max_length = length
    config.data.max_target_length, config.data.max_history = FLAGS.target, FLAGS.history
    config.train.batch_size = config.eval.batch_size = FLAGS.batch or (2 if on_cpu else 32)
    config.train.remat = FLAGS.remat
    return Programs(Settings.of(config), make_mesh())


def known_peak() -> float | None:
    """FLOP/s of one device, as given or published."""
    if FLAGS.peak_tflops:
        return FLAGS.peak_tflops * 1e12
    card = find_card(jax.devices()[0].device_kind)
    return card.flops if card else None


def main(_: list[str]) -> None:
    on_cpu = jax.default_backend() == "cpu"
    peak = known_peak()
    if peak is None and not on_cpu:
        kind = jax.devices()[0].device_kind
        raise SystemExit(f"error: the peak of {kind!r} is unknown here: give --peak_tflops")
    layers = FLAGS.layers or int(on_cpu)
    with tempfile.TemporaryDirectory() as scratch:
        write_shape(Path(scratch), layers)
        programs = make_programs(Path(scratch), on_cpu)
    flops = matmul_flops(programs.train(remat=False).jaxpr)
    step = programs.train().lower().compile()
    train = programs.settings.train
    rows = train.batch_size
    weights, llm, batch = (
        fill(x) for x in (programs.weights, programs.models.abstract_llm, programs.batch(rows))
    )
    optimizer = make_optimizer(
        1, train.learning_rate, train.weight_decay, train.warmup, train.clip_norm
    )
    state = weights, init_optimizer(optimizer, weights, programs.mesh)

    def update() -> None:
        nonlocal state
        *state, metrics = step(*state, llm, batch)
        jax.block_until_ready((state, metrics))

    cases = {"step": update}
    if peak is None:
        side = jnp.ones((SIDE, SIDE), llm.embedding.dtype)
        product = jax.jit(jnp.dot)
        cases["product"] = lambda: jax.block_until_ready(product(side, side))
    seconds = in_turn(cases)
    peak = peak * jax.device_count() if peak else 2 * SIDE**3 / seconds["product"]
    tokens = rows * programs.row_tokens
    record = {
        "llm": FLAGS.llm,
        "layers": layers,
        "rows": rows,
        "lengths": programs.lengths._asdict(),
        "history": batch.history.shape[1],
        "step_seconds": seconds["step"],
        "step_flops": flops,
        "tokens_per_second": tokens / seconds["step"],
        "flops_per_second": flops / seconds["step"],
        "peak_flops": peak,
        "peak_measured": "product" in cases,
        "mfu": flops / seconds["step"] / peak,
    }
    about = (
        f"measured, a product of {SIDE} x {SIDE} matrices" if "product" in cases else "published"
    )
    report(
        "mfu",
        f"Training step, {FLAGS.llm}",
        ("", "figure"),
        [
            ["layers", f"{layers or 'all'}"],
            ["rows", f"{rows}"],
            ["tokens of a row, the query's", f"{programs.row_tokens}, {programs.lengths.query}"],
            ["items of a history", f"{record['history']}"],
            ["step, ms", f"{1e3 * seconds['step']:.1f}"],
            ["tokens/s", f"{record['tokens_per_second']:,.0f}"],
            ["TFLOP of a step", f"{flops / 1e12:.3f}"],
            ["TFLOP/s", f"{record['flops_per_second'] / 1e12:.3f}"],
            [f"peak TFLOP/s ({about})", f"{peak / 1e12:.3f}"],
            ["MFU", f"{record['mfu']:.1%}"],
        ],
        [record],
    )


if __name__ == "__main__":
    app.run(main)
