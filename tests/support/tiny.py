"""A tiny LLM, a plug and a batch of random numbers."""

import functools
from typing import Any

import jax
import numpy as np
from flax import nnx

from pplug_jax.encoder.bert import Bert, BertConfig
from pplug_jax.feed.batches import Batch
from pplug_jax.feed.features import FEATURES
from pplug_jax.llm.decoder import Decoder, DecoderConfig, Rope
from pplug_jax.plugs.persona import UserEmbedder
from pplug_jax.runtime.mesh import make_mesh
from pplug_jax.settings import PlugSettings
from scripts.pretrain.initialise import initialise

B, L, T, Q, H, E = 8, 12, 6, 6, 4, 20
ONE_DEVICE = make_mesh(1, 1, 1, jax.devices()[:1])
# A plug's settings beside the paper's, each and all.
EXTENSIONS = {"recency": True, "features": ("difference", "form")}
OPTIONS = {
    "paper": {},
    "all": EXTENSIONS,
    "recency": {"recency": True},
} | {name: {"features": (name,)} for name in FEATURES}


@functools.cache
def make_llm(layers: int = 2, hidden: int = 40, mlp: int = 72, vocab: int = 48) -> Decoder:
    config = DecoderConfig(vocab, hidden, mlp, layers, 4, 2, 8, 1e-5, Rope(1e4), True, 64, (1,), 0)
    return initialise(Decoder(config, "float32"), jax.random.key(0))


@functools.cache
def make_plug(llm_size: int, trained: bool = True, **settings: Any) -> UserEmbedder:
    config = BertConfig(30, E, 32, 1, 2, 8, 1, 1e-12)
    encoder = initialise(Bert(config, "mean", nnx.Param), jax.random.key(1)) if trained else None
    return UserEmbedder(encoder, E, llm_size, 1.0, PlugSettings(**settings), rngs=nnx.Rngs(2))


def make_batch(vocab: int = 48, rows: int = B) -> Batch:
    rng = np.random.default_rng(3)

    def lengths(width: int) -> np.ndarray:
        return np.arange(width) < rng.integers(1, width + 1, (rows, 1))

    history = rng.normal(size=(rows, H, E)).astype(np.float32)
    prompt = rng.integers(0, vocab, (rows, L), dtype=np.int32), lengths(L)
    target = rng.integers(0, vocab, (rows, T), dtype=np.int32), lengths(T)
    text, text_mask = joined(*prompt, *target)
    return Batch(
        *prompt,
        *target,
        text,
        text_mask,
        query=rng.integers(0, 30, (rows, Q), dtype=np.int32),
        query_mask=lengths(Q),
        history=history / np.linalg.norm(history, axis=-1, keepdims=True),
        history_mask=lengths(H),
        index=np.arange(rows, dtype=np.int32),
        weight=np.ones(rows, np.float32),
        features={},
    )


def joined(
    prompt: np.ndarray, prompt_mask: np.ndarray, target: np.ndarray, target_mask: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`Batch.text` and its mask: each row's own tokens, but for its target's last, side by side."""
    text = np.zeros((len(prompt), prompt.shape[1] + target.shape[1] - 1), np.int32)
    mask = np.zeros(text.shape, bool)
    for row in range(len(text)):
        ids = [*prompt[row, prompt_mask[row]], *target[row, target_mask[row]][:-1]]
        text[row, : len(ids)], mask[row, : len(ids)] = ids, True
    return text, mask
