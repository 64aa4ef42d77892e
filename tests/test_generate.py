"""Decoding against transformers' `generate`, token for token."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
import transformers

from pplug_jax.llm import load_llm
from pplug_jax.llm.decoder import Decoder
from pplug_jax.llm.generate import generate
from pplug_jax.runtime.mesh import make_mesh
from tests.support.parity import needs_torch, torch
from tests.support.tiny import joined

LENGTHS = (9, 5, 1, 7, 3)  # of the prompts
T = 16  # new tokens
V = 16  # so few that beams often meet the tokens that end them
PAD = 2


class Ending(NamedTuple):
    """A model with the tokens that end its answers."""

    eos: tuple[int, ...]
    llm: Decoder
    path: Path


def prompts(side: str) -> tuple[np.ndarray, np.ndarray]:
    """Random prompts of LENGTHS, padded on `side`: tokens (B, L) int32 and mask (B, L) bool."""
    L = max(LENGTHS)
    mask = np.arange(L) < np.array(LENGTHS)[:, None]
    if side == "left":
        mask = mask[:, ::-1].copy()
    tokens = np.full(mask.shape, PAD, np.int32)
    tokens[mask] = np.random.default_rng(0).integers(3, V, mask.sum())
    return tokens, mask


def theirs(ending: Ending, embeds: np.ndarray | None = None, **settings: object) -> np.ndarray:
    """transformers' new tokens for the left-padded prompts, (B, T), padded where it stops early."""
    tokens, mask = prompts("left")
    inputs = (
        {"input_ids": torch.tensor(tokens).long()}
        if embeds is None
        else {"inputs_embeds": torch.tensor(embeds)}
    )
    model = transformers.LlamaForCausalLM.from_pretrained(ending.path).eval()
    new = model.generate(
        **inputs,
        attention_mask=torch.tensor(mask).long(),
        max_new_tokens=T,
        do_sample=False,
        early_stopping=False,
        eos_token_id=list(ending.eos) or None,
        pad_token_id=PAD,
        **settings,
    ).numpy()
    if embeds is None:
        new = new[:, tokens.shape[1] :]
    return np.pad(new, ((0, 0), (0, T - new.shape[1])), constant_values=PAD)


def lengths(tokens: np.ndarray, eos: tuple[int, ...]) -> list[int]:
    """Each row's tokens up to and including the first that ends it."""
    return [next((t + 1 for t, x in enumerate(row) if x in eos), T) for row in tokens]


@pytest.fixture(scope="module")
def path(make_llama: Callable[..., Path]) -> Path:
    return make_llama(vocab_size=V)


@pytest.fixture(scope="module")
def ending(
    request: pytest.FixtureRequest, path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Ending:
    """A model whose EOS are tokens that it likes to say, so that rows stop at different steps."""
    copy = tmp_path_factory.mktemp("ending")
    shutil.copytree(path, copy, dirs_exist_ok=True)

    def load(eos: tuple[int, ...]) -> Decoder:
        settings = {"eos_token_id": list(eos) or None, "pad_token_id": PAD}
        (copy / "generation_config.json").write_text(json.dumps(settings))
        return load_llm(copy, dtype="float32")

    endless, (tokens, mask) = load(()), prompts("left")
    said = Counter(np.ravel(generate(endless, endless.embed(tokens), mask, max_new_tokens=T)))
    first, second = (int(token) for token, _ in said.most_common(2))
    eos = {"no eos": (), "one eos": (second,), "two eos": (first, second)}[request.param]
    return Ending(eos, load(eos), copy)


two_eos = pytest.mark.parametrize("ending", ["two eos"], indirect=True)


@pytest.mark.slow
@needs_torch
@pytest.mark.parametrize(
    ("ending", "num_beams", "length_penalty"),
    [
        ("no eos", 1, 1.0),
        ("no eos", 4, 1.0),
        ("one eos", 1, 1.0),
        ("one eos", 4, 1.0),
        ("one eos", 4, 0.6),
        ("two eos", 1, 1.0),
        ("two eos", 4, 1.0),
        ("two eos", 3, -1.0),
        ("two eos", 2, 3.0),
    ],
    indirect=["ending"],
)
def test_tokens_are_those_of_transformers(
    ending: Ending, num_beams: int, length_penalty: float
) -> None:
    settings = {"num_beams": num_beams, "length_penalty": length_penalty}
    expected = theirs(ending, **settings)
    assert (len(set(lengths(expected, ending.eos))) > 1) == bool(ending.eos)
    for side in ("left", "right"):
        tokens, mask = prompts(side)
        embeds = ending.llm.embed(tokens)
        ours = generate(ending.llm, embeds, mask, max_new_tokens=T, **settings)
        assert (ours.shape, ours.dtype) == ((len(LENGTHS), T), np.int32)
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.slow
@needs_torch
@two_eos
@pytest.mark.parametrize("num_beams", [1, 4])
def test_embeddings_that_are_no_tokens(ending: Ending, num_beams: int) -> None:
    embeds = np.random.default_rng(2).normal(size=(len(LENGTHS), max(LENGTHS), 32), scale=0.3)
    embeds = embeds.astype(np.float32)
    _, mask = prompts("left")
    ours = generate(ending.llm, embeds, mask, max_new_tokens=T, num_beams=num_beams)
    np.testing.assert_array_equal(ours, theirs(ending, embeds, num_beams=num_beams))


@two_eos
@pytest.mark.parametrize("num_beams", [1, 4])
def test_padded_after_the_end(ending: Ending, num_beams: int) -> None:
    tokens, mask = prompts("right")
    ours = np.asarray(
        generate(ending.llm, ending.llm.embed(tokens), mask, max_new_tokens=T, num_beams=num_beams)
    )
    ends = lengths(ours, ending.eos)
    assert min(ends) < T
    for row, end in zip(ours, ends, strict=True):
        assert (row[end:] == PAD).all()


def full_forward(llm: Decoder, tokens: np.ndarray, mask: np.ndarray, new: np.ndarray) -> jax.Array:
    """The hidden states that predict the new tokens, (B, T, D), without a cache."""
    text, there = joined(tokens, mask, new, ones := np.ones(new.shape, bool))
    return jax.jit(Decoder.target_hidden)(llm, llm.embed(text), there, new, ones)


@two_eos
def test_greedy_is_the_argmax_of_a_full_forward(ending: Ending) -> None:
    tokens, mask = prompts("left")
    llm, embeds = ending.llm, ending.llm.embed(tokens)
    new = generate(llm, embeds, mask, max_new_tokens=T)
    best = np.asarray(llm.unembed(full_forward(llm, tokens, mask, new)).argmax(-1))
    for row, again, end in zip(np.asarray(new), best, lengths(new, ending.eos), strict=True):
        np.testing.assert_array_equal(row[:end], again[:end])


@pytest.mark.parametrize("side", ["left", "right"])
def test_cached_steps_give_the_hidden_states_of_a_full_forward(path: Path, side: str) -> None:
    llm = load_llm(path, dtype="float32")
    tokens, mask = prompts(side)
    new = np.random.default_rng(3).integers(3, V, (len(LENGTHS), 4), dtype=np.int32)
    full = full_forward(llm, tokens, mask, new)
    hidden, cache = jax.jit(Decoder.prefill, static_argnums=3)(llm, llm.embed(tokens), mask, 5)
    step = jax.jit(Decoder.step)
    for t in range(4):
        np.testing.assert_allclose(hidden, full[:, t], rtol=1e-4, atol=1e-5)
        hidden, cache = step(llm, new[:, t, None], cache)
        hidden = hidden[:, 0]
    assert cache.length == max(LENGTHS) + 4
    np.testing.assert_array_equal(cache.seen.sum(2)[:, 0], np.array(LENGTHS) + 4)


FACTORISATIONS = [(8 // (b * c), b, c) for b in (1, 2, 4, 8) for c in (1, 2, 4, 8) if b * c <= 8]


@pytest.mark.slow
@pytest.mark.parametrize("shape", FACTORISATIONS, ids=str)
@two_eos
def test_on_eight_devices(ending: Ending, shape: tuple[int, int, int]) -> None:
    eight = load_llm(ending.path, mesh=make_mesh(*shape), dtype="float32")
    tokens, mask = prompts("left")
    one, sharded = (
        generate(llm, llm.embed(tokens), mask, max_new_tokens=T, num_beams=4)
        for llm in (ending.llm, eight)
    )
    np.testing.assert_array_equal(one, sharded)
