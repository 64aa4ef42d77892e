"""Decoding, ours against transformers' `generate`: `python -m benchmarks.generation [--batch=1,8]`

Both continue the same embeddings, two random soft tokens in front of prompts of mixed lengths, with
the same random Llama, greedily and with 4 beams. No token ends an answer, so that both do equal
work, and their answers must be equal too, but for near ties; in bfloat16 ties are so frequent that
they are only counted. Time to the first token is that of a call for one token.
"""

import functools
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from absl import app, flags

from benchmarks.timing import in_turn, report
from pplug_jax.llm import LLM, load_llm
from pplug_jax.llm.generate import generate

FLAGS = flags.FLAGS
flags.DEFINE_list("batch", ["1", "8", "64"], "Prompts decoded together.")
flags.DEFINE_list("beams", ["1", "4"], "Beams; 1 is greedy.")
flags.DEFINE_integer("tokens", 32, "New tokens of each.")
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "The LLM's.")
FLAGS.set_default("repeats", 3)  # 64 prompts with 4 beams take long

PEERS = ("ours", "transformers")
SOFT = 2  # the instruction embedding and the persona
LENGTHS = (16, 64)  # of the prompts
HEADER = (
    "batch",
    "beams",
    "ours, tokens/s",
    "transformers",
    "ours is",
    "ours, first token ms",
    "transformers",
    "ours is",
    "equal",
)
# 28 million parameters. Weights larger than usual, so that the logits are not all alike.
CONFIG = transformers.LlamaConfig(
    vocab_size=32000,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
    initializer_range=0.05,
    eos_token_id=None,
    pad_token_id=0,
)


def draw_prompts(theirs: transformers.LlamaForCausalLM, count: int) -> dict[str, torch.Tensor]:
    """Soft tokens and prompts, padded on the left as transformers wants them."""
    rng = np.random.default_rng(count)
    lengths = SOFT + rng.integers(*LENGTHS, count, endpoint=True)
    table = theirs.get_input_embeddings().weight.float().numpy()
    embeds = table[rng.integers(3, len(table), (count, lengths.max()))]
    mask = np.arange(lengths.max()) >= lengths.max() - lengths[:, None]
    soft = rng.normal(size=(count, SOFT, table.shape[1]))
    soft *= np.linalg.norm(table, axis=1).mean() / np.linalg.norm(soft, axis=-1, keepdims=True)
    for row, length, tokens in zip(embeds, lengths, soft, strict=True):
        row[-length:][:SOFT] = tokens
    return {
        "inputs_embeds": torch.from_numpy(embeds).to(theirs.dtype),
        "attention_mask": torch.from_numpy(mask).long(),
    }


def cell(record: dict[str, Any], name: str, form: str) -> tuple[str, str, str]:
    """Our figure, theirs, and their ratio, above 1 where ours is faster."""
    values = [record[f"{peer}_{name}"] for peer in PEERS]
    return *(format(value, form) for value in values), f"{record[f'{name}_ratio']:.2f}x"


def compare(
    llm: LLM, theirs: transformers.LlamaForCausalLM, count: int, beams: int
) -> dict[str, Any]:
    """One line of the table."""
    inputs = draw_prompts(theirs, count)
    embeds = jnp.asarray(inputs["inputs_embeds"].float().numpy(), FLAGS.dtype)
    mask = jnp.asarray(inputs["attention_mask"].numpy(), bool)

    def by_ours(new: int) -> np.ndarray:
        return np.asarray(generate(llm, embeds, mask, max_new_tokens=new, num_beams=beams))

    def by_theirs(new: int) -> np.ndarray:
        settings = {"num_beams": beams, "do_sample": False, "early_stopping": False}
        return theirs.generate(**inputs, max_new_tokens=new, **settings).numpy()

    calls, answers = dict(zip(PEERS, (by_ours, by_theirs), strict=True)), {}

    def answer(peer: str) -> None:
        answers[peer] = calls[peer](FLAGS.tokens)

    seconds = in_turn({peer: functools.partial(answer, peer) for peer in PEERS})
    first = in_turn({peer: functools.partial(calls[peer], 1) for peer in PEERS})
    speed = {peer: count * FLAGS.tokens / seconds[peer] for peer in PEERS}
    ours, other = (answers[peer] for peer in PEERS)
    assert ours.shape == other.shape == (count, FLAGS.tokens), other.shape
    return {
        "batch": count,
        "beams": beams,
        **{f"{peer}_tokens_per_second": speed[peer] for peer in PEERS},
        "tokens_per_second_ratio": speed["ours"] / speed["transformers"],
        **{f"{peer}_first_token_ms": 1e3 * first[peer] for peer in PEERS},
        "first_token_ms_ratio": first["transformers"] / first["ours"],
        "equal": float((ours == other).all(axis=1).mean()),
    }


def main(_: list[str]) -> None:
    jax.config.update("jax_platforms", "cpu")  # as PyTorch here
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        transformers.LlamaForCausalLM(CONFIG).save_pretrained(directory)
        dtype = getattr(torch, FLAGS.dtype)
        theirs = transformers.LlamaForCausalLM.from_pretrained(directory, dtype=dtype).eval()
        llm = load_llm(directory, dtype=FLAGS.dtype)
    theirs.generation_config.eos_token_id = None  # else it would stand in for none
    assert not llm.config.eos_ids
    with torch.inference_mode():
        records = [
            compare(llm, theirs, int(count), int(beams))
            for count in FLAGS.batch
            for beams in FLAGS.beams
        ]
    rows = [
        (
            str(record["batch"]),
            str(record["beams"]),
            *cell(record, "tokens_per_second", ".0f"),
            *cell(record, "first_token_ms", ".1f"),
            f"{record['equal']:.0%}",
        )
        for record in records
    ]
    title = f"{FLAGS.tokens} new tokens, {FLAGS.dtype}"
    report("generation", title, HEADER, rows, records)
    if FLAGS.dtype == "float32":  # in bfloat16 answers part at the first near tie
        assert min(record["equal"] for record in records) >= 0.9, "the answers differ"


if __name__ == "__main__":
    app.run(main)
