"""The cross entropy in chunks against optax', and what a compiled step holds in memory."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pplug_jax.llm import LLM, load_llm
from pplug_jax.llm.loss import CHUNK, cross_entropy
from tests.support.models import VOCABULARY

B, D = 3, 32


@pytest.fixture(scope="module")
def llm(make_llama: Callable[..., Path]) -> LLM:
    return load_llm(make_llama(hidden_size=D), dtype="float32")


def drawn(T: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(T)
    hidden = rng.normal(size=(B, T, D)).astype(np.float32)
    targets = rng.integers(0, VOCABULARY, (B, T), dtype=np.int32)
    return hidden, targets, rng.integers(0, 2, (B, T)).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("T", [1, 16, CHUNK, 48, 80, 37])
def test_losses_and_gradients_are_those_of_all_logits_at_once(llm: LLM, T: int) -> None:
    hidden, targets, weights = drawn(T)

    def at_once(llm: LLM, hidden: jax.Array, targets: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(llm.unembed(hidden), targets)

    def found(losses: Callable[..., jax.Array]) -> tuple[jax.Array, jax.Array]:
        def total(hidden: jax.Array) -> jax.Array:
            return jnp.sum(weights * losses(llm, hidden, targets))

        return jax.jit(losses)(llm, hidden, targets), jax.jit(jax.grad(total))(hidden)

    for ours, expected in zip(found(cross_entropy), found(at_once), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_no_array_has_all_logits(llm: LLM) -> None:
    hidden, targets, _ = drawn(4 * CHUNK)

    def total(hidden: jax.Array) -> jax.Array:
        return jnp.sum(cross_entropy(llm, hidden, targets))

    compiled = jax.jit(jax.value_and_grad(total)).lower(hidden).compile()
    # Chunks of the logits, their softmax and its gradient; all logits are four times that each.
    assert compiled.memory_analysis().temp_size_in_bytes < B * 4 * CHUNK * VOCABULARY * 4
