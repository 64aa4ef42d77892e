"""Tiny LLMs that answer people, and people who ask them."""

import functools
import threading
from typing import Any

import jax
import numpy as np
import transformers

from pplug_jax.llm import LLM
from pplug_jax.llm.generate import generate
from pplug_jax.llm.load import FAMILIES
from pplug_jax.serve.engine import Engine, Finished, Sampling, Token
from pplug_jax.serve.engine.jax_engine import JaxEngine
from scripts.pretrain.initialise import initialise
from tests.support.families import ALTERNATING, GEMMA3_ROPES, SHAPE
from tests.support.models import T5
from tests.support.tiny import ONE_DEVICE

LONGEST, T, SLOTS = 20, 9, 8
LLAMA = "llama"
CASES: dict[str, tuple[type[transformers.PreTrainedConfig], dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, SHAPE),
    "gemma2": (transformers.Gemma2Config, SHAPE | {"sliding_window": 5}),
    "gemma3_text": (
        transformers.Gemma3TextConfig,
        SHAPE | {"sliding_window": 5, "layer_types": ALTERNATING, "rope_parameters": GEMMA3_ROPES},
    ),
    "qwen3": (transformers.Qwen3Config, SHAPE),
    "t5": (transformers.T5Config, T5),
}


@functools.cache
def llm_of(family: str) -> LLM:
    kind, shape = CASES[family]
    made = FAMILIES[family]
    module = made.module(made.config_from_hf(kind(**shape), (1,)), "float32")
    # Larger than usual, so that answers differ.
    return jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, initialise(module, jax.random.key(0)))


@functools.cache
def engine_of(family: str) -> JaxEngine:
    """One for all tests: what an earlier one left in it must not matter."""
    limits = {"longest_prompt": LONGEST, "max_new_tokens": T, "slots": SLOTS}
    return JaxEngine(llm_of(family), ONE_DEVICE, **limits, waiting=99)


def prompt(llm: LLM, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    size = llm.config.hidden_size
    return rng.normal(size=(rng.integers(1, LONGEST + 1), size)).astype(np.float32)


@functools.cache
def alone(family: str, seed: int) -> list[int]:
    return answer_of(family, prompt(llm_of(family), seed))


def answer_of(family: str, rows: np.ndarray) -> list[int]:
    """The answer of `generate`, up to the token that ends it."""
    llm = llm_of(family)
    padded = np.zeros((1, LONGEST, rows.shape[1]), np.float32)
    padded[0, : len(rows)] = rows
    mask = (np.arange(LONGEST) < len(rows))[None]
    (tokens,) = np.asarray(generate(llm, padded, mask, max_new_tokens=T))
    ends = np.flatnonzero(np.isin(tokens, llm.config.eos_ids))
    return tokens[: ends[0] if len(ends) else T].tolist()


class Reader:
    """Somebody who asks, and perhaps leaves early."""

    def __init__(
        self, engine: Engine, rows: np.ndarray, leaves_after: int = T + 1, **sampling: Any
    ):
        self.tokens: list[int] = []
        self.log_probabilities: list[float] = []
        self.reason = ""
        self.done = threading.Event()
        self.leaves_after = leaves_after
        chosen = Sampling(**{"max_tokens": T} | sampling)
        self.request = engine.submit(rows, chosen, self.read)
        if not leaves_after:
            self.request.cancel()

    def read(self, event: Token | Finished) -> None:
        assert not self.done.is_set()
        if isinstance(event, Finished):
            self.reason = event.reason
            self.done.set()
            return
        self.tokens.append(event.id)
        self.log_probabilities.append(event.log_probability)
        if len(self.tokens) == self.leaves_after:
            self.request.cancel()

    def wait(self) -> "Reader":
        assert self.done.wait(60)
        return self
