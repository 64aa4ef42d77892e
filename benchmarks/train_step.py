"""A training step, ours against the original recipe in PyTorch: `python -m benchmarks.train_step`

    python -m benchmarks.train_step --llm=t5 --batch=16 --dtype=bfloat16 --peak
    python -m benchmarks.train_step --place=behind --encoder=frozen

Random weights, the same for all, on examples as long as LaMP-5's (`benchmarks.lamp_like`), in the
batches of our plan. Ours is timed as a run does it, from the tokenised examples through buckets
and placing to the update. `original` pads to the maxima; `lean` is PyTorch with as little work as
ours, on the same batches of like lengths (`benchmarks.original`). So original to lean is what the
algorithm gains, lean to ours what the compiler does. The losses of all updates must agree.

With soft tokens behind the input ours is timed beside ours in front; their losses are those of two
methods. With a frozen encoder ours and lean are given the inputs' vectors. The original trains its
encoder all the same, so that only its first loss must agree.

Read the Llama's `original` with care: a head of 32000 words is a third of so small an LLM, and of a
large one a twentieth, so that logits at every place cost it more here.
"""

import copy
import ctypes
import gc
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from absl import app, flags

from benchmarks.lamp_like import EXAMPLES, draw_examples, fill_store, with_vectors
from benchmarks.original import SOFT, Planned, Plug, Recipe
from benchmarks.ours import Ours
from benchmarks.timing import in_turn, report
from configs import common
from pplug_jax.feed.batches import Assemble, plan_batches
from pplug_jax.llm.prompts import Behind, Front
from pplug_jax.methods.table import METHODS
from pplug_jax.plugs.reading import Reading
from pplug_jax.scoring.tables import show_table
from pplug_jax.session.inputs import assembler
from pplug_jax.session.models import ASSETS, Models
from pplug_jax.session.weights import new_weights
from pplug_jax.settings import Settings

FLAGS = flags.FLAGS
flags.DEFINE_enum("llm", "llama", ["llama", "t5"], "The frozen LLM, of some 40 million parameters.")
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "The LLM's; the plug is float32.")
flags.DEFINE_enum("place", "front", ["front", "behind"], "Where our soft tokens stand.")
flags.DEFINE_enum("encoder", "trained", ["trained", "frozen"], "Ours and lean's for the inputs.")
flags.DEFINE_integer("batch", 8, "Examples of a batch.")
flags.DEFINE_integer("steps", 12, "Batches, of which each timed call works off all.")
flags.DEFINE_bool("peak", False, "Measure each peer's memory too, in a process of its own.")
flags.DEFINE_string("only", None, "Of --peak: print this peer's memory, and nothing else.")
FLAGS.set_default("repeats", 2)

VOCABULARY = 32000
# transformers rounds a T5's loss to the LLM's dtype: of one about 10, bfloat16 keeps 0.06.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
LLAMA = transformers.LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
)
T5 = transformers.T5Config(  # type: ignore[call-arg]  # all take what their base takes
    vocab_size=VOCABULARY,
    d_model=384,
    d_kv=64,
    d_ff=1024,
    num_layers=6,
    num_heads=6,
    feed_forward_proj="gated-gelu",
    tie_word_embeddings=False,
    decoder_start_token_id=0,
)
MINI_LM = transformers.BertConfig(
    hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
)
PADDED = ("llm", "query", "history")
HEADER = (
    "peer",
    "examples/s",
    "tokens/s",
    "ours is",
    "LLM padding",
    "query",
    "history",
    "peak MB",
    "first loss",
    "difference",
)


def write_models(directory: Path) -> None:
    """A random LLM and encoder; their tokenizers are bundled ones, and tokenise nothing here."""
    torch.manual_seed(0)
    if FLAGS.llm == "llama":
        llm = transformers.LlamaForCausalLM(LLAMA)
    else:
        llm = transformers.T5ForConditionalGeneration(T5)
        # transformers 5 ties a new T5's head, but not the head that a checkpoint brings.
        llm.lm_head.weight = torch.nn.Parameter(torch.randn(VOCABULARY, T5.d_model) * 0.05)
    encoder = transformers.BertModel(MINI_LM, add_pooling_layer=False)
    for name, model, like in (("llm", llm, "tiny_llama"), ("encoder", encoder, "tiny_bert")):
        model.save_pretrained(directory / name)
        for file in (ASSETS / like).glob("*token*"):
            (directory / name / file.name).write_bytes(file.read_bytes())


def read_settings(directory: Path) -> Settings:
    """The paper's settings, and no history dropout, which the original draws beforehand."""
    config = common.task_config("LaMP_5", "embedded")
    config.llm.path, config.llm.dtype = str(directory / "llm"), FLAGS.dtype
    config.encoder.path = str(directory / "encoder")
    config.train.batch_size = FLAGS.batch
    config.plug.history_dropout = 0.0
    config.plug.encoder_rate = 1.0 if FLAGS.encoder == "trained" else 0.0
    return Settings.of(config)


def prefix_length() -> int:
    return 1 if FLAGS.llm == "llama" else 0


def placed(models: Models, place: str) -> Models:
    """The same with soft tokens elsewhere."""
    other = copy.copy(models)
    other.config = models.config.changed({"plug.place": place})
    return other


def peak_megabytes(call: Callable[[], Any]) -> float:
    """What a call holds at most beyond weights and moments: activations and gradients. Linux only.

    It is the second, when all is compiled, and what that took has been given back.
    """

    def status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field))

    call()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM is the peak from here on
    call()
    return (status("VmHWM") - before) * 1024 / 1e6


def measured_apart(name: str) -> float:
    command = [sys.executable, "-m", "benchmarks.train_step", *sys.argv[1:], f"--only={name}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def make_peers(scratch: Path) -> tuple[dict[str, Ours | Recipe], dict[str, list[Planned]]]:
    """The peers with equal weights, ours first, and each one's batches of the same examples."""
    write_models(scratch)
    config, method = read_settings(scratch), METHODS["pplug"]
    models = Models(config, scratch / "run")
    fill_store(models.store, EXAMPLES)
    examples = draw_examples(EXAMPLES)
    if FLAGS.encoder == "frozen":
        examples = with_vectors(examples, models.queries, models.encoder.model)
    data = assembler(models, method, config, examples, FLAGS.batch)
    order = np.random.default_rng(0).permutation(EXAMPLES)[: FLAGS.steps * FLAGS.batch]

    def plan(data: Assemble) -> list[Planned]:
        batches = plan_batches(order, data.buckets.of, FLAGS.batch)
        return [(step, *batch) for step, batch in enumerate(batches)]

    weights = new_weights(models, method, config)
    kind: dict[str, Any] = {
        "llama": transformers.LlamaForCausalLM,
        "t5": transformers.T5ForConditionalGeneration,
    }
    dtype = getattr(torch, FLAGS.dtype)
    llm = kind[FLAGS.llm].from_pretrained(scratch / "llm", dtype=dtype)

    def recipe(lean: bool) -> Recipe:
        bert = None
        if FLAGS.encoder == "trained" or not lean:
            path = scratch / "encoder"
            bert = transformers.BertModel.from_pretrained(path, add_pooling_layer=False)
        return Recipe(data, llm, Plug(bert, weights, lean), prefix_length(), config.train)

    # Ours is made last, for its steps take the weights away.
    recipes = {"original": recipe(lean=False), "lean": recipe(lean=True)}
    peers = {"ours": Ours(models, data, weights, Front(prefix_length()))}
    if FLAGS.place == "behind":
        # The same tokens; the last of a prompt is its suffix.
        shorter = [x._replace(prompt=x.prompt[:-1]) for x in examples]
        models = placed(models, "behind")
        data = assembler(models, method, models.config, shorter, FLAGS.batch)
        copied = jax.tree.map(jnp.copy, weights)
        peers = {"ours": Ours(models, data, copied, Behind((3,))), "ours, front": peers["ours"]}
    peers |= recipes
    return peers, {name: plan(peer.data) for name, peer in peers.items()}


def show_parts(name: str, ours: Ours, plan: list[Planned]) -> dict[str, float]:
    """Where our time goes: seconds of a step, and of a step without some of its parts."""
    calls = {
        "a step": ours.step,
        "without the input encoder": lambda x: ours.step(x, Reading(uniform=True)),
        "the loss alone": ours.loss,
        "assembling and placing alone": ours.arguments,
    }
    cases = {
        name: lambda call=call: jax.block_until_ready([call(each) for each in plan])
        for name, call in calls.items()
    }
    seconds = {name: took / len(plan) for name, took in in_turn(cases).items()}
    rows = [
        (name, f"{1e3 * took:.0f}", f"{took / seconds['a step']:.0%}")
        for name, took in seconds.items()
    ]
    show_table(f"where the time of {name} goes", ("", "ms", "share"), rows)
    return seconds


def loss_differences(losses: dict[str, list[float]]) -> dict[str, float | None]:
    """The largest to ours in front, of the updates that must agree."""
    reference = losses.get("ours, front", losses["ours"])
    differences = {name: np.abs(np.subtract(found, reference)) for name, found in losses.items()}
    if FLAGS.encoder == "frozen":
        differences["original"] = differences["original"][:1]
    if FLAGS.place == "behind":
        differences["ours"] = None
    return {name: None if x is None else float(x.max()) for name, x in differences.items()}


def main(_: list[str]) -> None:
    jax.config.update("jax_platforms", "cpu")  # as PyTorch here
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        peers, plans = make_peers(Path(scratch))
    losses: dict[str, list[float]] = {name: [] for name in peers}
    cases = {
        name: lambda peer=peer, plan=plan, found=losses[name]: found.extend(map(peer.step, plan))
        for (name, peer), plan in zip(peers.items(), plans.values(), strict=True)
    }
    if FLAGS.only:
        print(peak_megabytes(cases[FLAGS.only]))
        return
    ours = peers["ours"]
    flops, ideal = (sum(map(count, plans["ours"])) for count in (ours.flops, ours.ideal_flops))
    places = {name: sum(map(peer.places, plans[name])) for name, peer in peers.items()}
    examples = [ours.data.tokenized[i] for _, _, indices in plans["ours"] for i in indices]
    real = np.sum(
        [
            (len(x.prompt) + SOFT + len(x.target), len(x.query), len(x.history.texts))
            for x in examples
        ],
        0,
    )
    peaks = {name: measured_apart(name) if FLAGS.peak else None for name in peers}
    seconds, differences = in_turn(cases), loss_differences(losses)
    records = [
        {
            "peer": name,
            "examples_per_second": len(examples) / seconds[name],
            "tokens_per_second": real[0] / seconds[name],
            "ours_is_faster_by": seconds[name] / seconds["ours"],
            "padding": {  # a frozen encoder's query has no places
                what: 1 - tokens / width if width else None
                for what, tokens, width in zip(PADDED, real, places[name], strict=True)
            },
            "peak_megabytes": peaks[name],
            "first_loss": losses[name][0],
            "loss_difference": differences[name],
        }
        for name in peers
    ]
    rows = [
        (
            r["peer"],
            f"{r['examples_per_second']:.2f}",
            f"{r['tokens_per_second']:.0f}",
            f"{r['ours_is_faster_by']:.2f}x",
            *("" if share is None else f"{share:.0%}" for share in r["padding"].values()),
            f"{r['peak_megabytes']:.0f}" if FLAGS.peak else "",
            f"{r['first_loss']:.5f}",
            "" if r["loss_difference"] is None else f"{r['loss_difference']:.1e}",
        )
        for r in records
    ]
    records.append({"flops": flops, "ideal_flops": ideal, "ratio": flops / ideal})
    records += [
        show_parts(name, peers[name], plans[name]) for name in peers if name.startswith("ours")
    ]
    report(
        "train_step",
        f"a training step: {FLAGS.llm}, {FLAGS.dtype}, batches of {FLAGS.batch}, soft tokens "
        f"{FLAGS.place}, the input encoder {FLAGS.encoder}",
        HEADER,
        rows,
        records,
    )
    print(f"FLOPs of our step over those that it needs: {flops / ideal:.3f}")
    worst = max(x for x in differences.values() if x is not None)
    assert worst <= TOLERANCE[FLAGS.dtype], f"the losses differ by {worst}"


if __name__ == "__main__":
    app.run(main)
