"""What int8 and int4 kernels cost: `python -m benchmarks.quantize [--llm=DIR | --llm=random_1b]`

Prints, against the weights as they are: bytes, logit error, the loss of a short training run of a
plug, and training and decoding speed. All arithmetic is float32, so that the errors are those of
the quantisation; bytes are those of a bfloat16 model.
"""

import json
import math
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from configs import lamp5
from pplug_jax.llm import LLM, abstract_llm, llama, load_llm
from pplug_jax.llm.decoder import Decoder
from pplug_jax.llm.generate import generate
from pplug_jax.llm.shapes import PUBLISHED
from pplug_jax.run import run
from pplug_jax.session.models import ASSETS
from pplug_jax.storage import hf
from scripts.pretrain.initialise import initialise

FLAGS = flags.FLAGS
flags.DEFINE_string("llm", str(ASSETS / "tiny_llama"), "A directory, or random_1b.")
flags.DEFINE_integer("steps", 100, "Of training.")
flags.DEFINE_integer("batch", 16, "Of a batch.")
flags.DEFINE_integer("input", 160, "Tokens of an input.")
KINDS = ("", "int8", "int4")


def write_random(directory: Path) -> None:
    """Random weights in the shape of Llama 3.2 1B, with the bundled tokenizer."""
    for file in (ASSETS / "tiny_llama").glob("*token*"):
        (directory / file.name).write_bytes(file.read_bytes())
    shape = PUBLISHED["meta-llama/Llama-3.2-1B-Instruct"]
    shape.save_pretrained(directory)
    llm = initialise(Decoder(llama.config_from_hf(shape, ()), "bfloat16"), jax.random.key(0))
    hf.save_weights(llm, directory, llama.SOURCES, jnp.bfloat16)


def device_bytes(directory: Path, quantize: str) -> int:
    """Of a bfloat16 model; an accelerator packs two int4 into a byte."""
    bits = {jnp.dtype("int4"): 4}
    leaves = jax.tree.leaves(abstract_llm(directory, dtype="bfloat16", quantize=quantize or None))
    return sum(math.prod(x.shape) * bits.get(x.dtype, 8 * x.dtype.itemsize) for x in leaves) // 8


@jax.jit
def logits(llm: Decoder, tokens: jax.Array) -> jax.Array:
    return llm.logits(llm.embed(tokens), jnp.ones(tokens.shape, bool))


def decode_seconds(llm: LLM, tokens: jax.Array) -> float:
    embeds, mask = llm.embed(tokens), np.ones(tokens.shape, bool)
    seconds = []
    for _ in range(3):  # the first compiles
        start = time.perf_counter()
        jax.block_until_ready(generate(llm, embeds, mask, max_new_tokens=16, num_beams=1))
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def train(directory: Path, quantize: str) -> tuple[float, float]:
    """Mean loss of the last half, and tokens per second, of a short run on the sample."""
    config = lamp5.get_config()
    config.llm.path, config.llm.quantize = str(directory), quantize
    config.methods = ("pplug",)
    config.data.sample_train_users, config.data.sample_eval_users = FLAGS.steps * FLAGS.batch, 1
    config.data.max_input_length = FLAGS.input
    config.train.batch_size, config.train.epochs, config.train.log_every = FLAGS.batch, 1.0, 1
    with tempfile.TemporaryDirectory() as workdir:
        run(config, Path(workdir), "train")
        lines = [json.loads(x) for x in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    half = FLAGS.steps // 2
    loss, speed = (
        [line["value"] for line in lines if line["name"] == f"pplug/{name}"][half:]
        for name in ("loss", "tokens_per_second")
    )
    return statistics.mean(loss), statistics.median(speed)


def main(_: list[str]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch if FLAGS.llm == "random_1b" else FLAGS.llm)
        if FLAGS.llm == "random_1b":
            write_random(directory)
        names = f"{'kernels':10}{'MB':>10}{'ratio':>7}{'logit error':>13}{'loss':>8}"
        table, exact, first = [f"{names}{'train':>8}{'decode':>8}"], None, None
        for kind in KINDS:
            llm = load_llm(directory, dtype="float32", quantize=kind or None)
            high = min(llm.config.vocab_size, 1536)
            tokens = np.random.default_rng(0).integers(3, high, (4, 64), dtype=np.int32)
            found = np.asarray(logits(llm, tokens))
            exact = found if exact is None else exact
            error = np.linalg.norm(found - exact) / np.linalg.norm(exact - exact.mean())
            seconds = decode_seconds(llm, tokens[:, :16])
            del llm
            loss, speed = train(directory, kind)
            size = device_bytes(directory, kind)
            first = first or (size, speed, seconds)
            table.append(
                f"{kind or 'bfloat16':10}{size / 1e6:10.2f}{size / first[0]:7.2f}{error:13.2%}"
                f"{loss:8.3f}{speed / first[1]:7.2f}x{first[2] / seconds:7.2f}x"
            )
            print("\n".join(table), flush=True)  # so far: a large model takes long


if __name__ == "__main__":
    app.run(main)
