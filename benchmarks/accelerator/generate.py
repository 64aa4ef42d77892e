"""Part 2: decoding, against transformers' `generate`, with its default cache and a static one.

A real shape with random weights, the same for all, that continues the same embeddings: two soft
tokens in front of prompts with LaMP-5's lengths. No token ends an answer. `static` is compiled by
transformers itself where it does so, which is greedily and on a GPU. In bfloat16 answers part at
near ties, so that equal ones are only counted; a rehearsal is in float32, where they must be equal.
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
from benchmarks.accelerator.shapes import DEVICE, RandomModels, free, torch_llm
from benchmarks.lamp_like import draw_examples
from benchmarks.original import SOFT
from pplug_jax.llm.generate import generate


class Case(NamedTuple):
    """batches: (prompts, beams) in the order of their worth. needs: seconds of a peer at most."""

    llm: str
    encoder: str
    dtype: str
    new_tokens: int
    batches: tuple[tuple[int, int], ...]
    repeats: int
    needs: float


BATCHES = ((8, 1), (8, 4), (1, 1), (64, 1), (1, 4), (64, 4))
REAL = tuple(
    Case(llm, "BAAI/bge-base-en-v1.5", "bfloat16", 32, BATCHES, 3, 20)
    for llm in ("meta-llama/Llama-3.2-1B-Instruct", "google/gemma-3-1b-it")
)
TINY = (Case("tiny-llama", "tiny-bert", "float32", 4, ((2, 1), (2, 4)), 1, 0),)


def draw_prompts(models: RandomModels, count: int) -> tuple[jax.Array, jax.Array]:
    """Embeddings (B, L, D) and their mask (B, L), padded on the left as transformers wants them."""
    examples = draw_examples(count, models.llm_shape.vocab_size)
    lengths = np.array([SOFT + len(example.prompt) for example in examples])
    longest = lengths.max()
    tokens = np.zeros((count, longest), np.int32)
    for row, example in zip(tokens, examples, strict=True):
        row[longest - len(example.prompt) :] = example.prompt
    places = np.arange(longest) - (longest - lengths[:, None])

    @jax.jit
    def embed(llm: Any) -> jax.Array:
        embeds = llm.embed(tokens)
        noise = jax.random.normal(jax.random.key(1), embeds.shape, jnp.float32)
        soft = llm.embedding_norm() * noise / jnp.linalg.norm(noise, axis=-1, keepdims=True)
        return jnp.where((places < SOFT)[..., None], soft.astype(embeds.dtype), embeds)

    return embed(models.llm), jax.device_put(places >= 0)


def answers(
    record: Record, case: Case, models: RandomModels, llm: Any, batch: tuple[int, int]
) -> None:
    """One batch by all peers."""
    count, beams = batch
    embeds, mask = draw_prompts(models, count)
    settings = {"max_new_tokens": case.new_tokens, "num_beams": beams}
    name = f"{case.llm}, {count} prompts, {beams} beams"
    about = {"llm": case.llm, "dtype": case.dtype, "prompts": count, "beams": beams}
    contest = Contest(record, name, case.repeats, **about, new_tokens=case.new_tokens)

    def ours() -> Callable[[], np.ndarray]:
        traced = generate.trace(models.llm, embeds, mask, **settings)
        compiled = traced.lower().compile()
        figures = predicted(traced, compiled, while_trips=case.new_tokens - 1)
        record.note(f"{name}: ours", **figures)
        return lambda: np.asarray(compiled(models.llm, embeds, mask))

    def theirs(**cache: str) -> Callable[[], np.ndarray]:
        inputs = {
            "inputs_embeds": torch.from_dlpack(embeds),
            "attention_mask": torch.tensor(np.asarray(mask), device=DEVICE).long(),
        }
        chosen = settings | {"do_sample": False, "early_stopping": False} | cache

        def call() -> np.ndarray:
            with torch.inference_mode():
                return llm.generate(**inputs, **chosen).cpu().numpy()

        return call

    found = {"ours": contest.join("ours", ours, case.needs)}
    if llm is not None:
        found["transformers"] = contest.join("transformers", theirs, case.needs)
        static = lambda: theirs(cache_implementation="static")
        found["static"] = contest.join("static", static, case.needs)
    for peer, tokens in found.items():
        if tokens is not None and found["ours"] is not None:
            equal = float((tokens == found["ours"]).all(axis=1).mean())
            record.note(f"{name}: {peer}", equal=equal)


def run(record: Record, rehearse: bool) -> None:
    for case in TINY if rehearse else REAL:
        models = record.attempt(
            case.llm,
            lambda case=case: RandomModels(case.llm, case.encoder, case.dtype, {}),
            case.needs,
        )
        if models is None:
            continue
        llm = record.attempt(f"{case.llm}: torch", functools.partial(torch_llm, models))
        for batch in case.batches:
            answers(record, case, models, llm, batch)
            torch._dynamo.reset()  # else the next number of rows is compiled for any number
            free()
        del models, llm
        free()
