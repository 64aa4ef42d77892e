"""Low-rank updates: against the merged kernels, and each row's own."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx

from pplug_jax.llm import LLM, load_llm
from pplug_jax.llm.generate import generate
from pplug_jax.nn.linear import Adapted
from pplug_jax.plugs.lora import Lora
from pplug_jax.settings import LoraSettings
from tests.support.parity import assert_close

pytestmark = pytest.mark.slow

TOKENS, TARGETS = (
    np.random.default_rng(0).integers(3, 320, (3, L), dtype=np.int32) for L in (11, 6)
)
MASK = np.arange(11) < np.array([[11], [7], [1]])


@pytest.fixture(scope="module", params=["llama", "t5"])
def path(
    request: pytest.FixtureRequest, make_llama: Callable[..., Path], make_t5: Callable[..., Path]
) -> Path:
    return {"llama": make_llama, "t5": make_t5}[request.param](vocab_size=320)


@jax.jit
def logits_of(llm: LLM, tokens: jax.Array, mask: jax.Array, targets: jax.Array) -> jax.Array:
    return llm.logits(llm.embed(tokens), mask, targets)


def logits(llm: LLM, rows: slice = slice(None)) -> jax.Array:
    return logits_of(llm, TOKENS[rows], MASK[rows], TARGETS[rows])


def trained(llm: LLM, users: int | None = None, seed: int = 1) -> Lora:
    """An update that does something: its B is not 0 any more."""
    lora = Lora(llm, LoraSettings(rank=2, alpha=3.0), users, rngs=nnx.Rngs(0))
    keys = iter(jax.random.split(jax.random.key(seed), 100))
    lora.up = jax.tree.map(lambda x: 0.1 * jax.random.normal(next(keys), x.shape), lora.up)
    return lora


def merged(llm: LLM) -> LLM:
    """The LLM with every update added to its kernel."""

    def plain(kernel):
        if isinstance(kernel, qwix.QArray):
            return qwix.dequantize(kernel)
        return (
            plain(kernel.base) + kernel.down @ kernel.up if isinstance(kernel, Adapted) else kernel
        )

    graph, state = nnx.split(llm)
    flat = [(name, v.replace(plain(v.get_value()))) for name, v in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def test_a_new_one_changes_nothing(path: Path) -> None:
    llm = load_llm(path, dtype="float32")
    lora = Lora(llm, LoraSettings(rank=2, alpha=4.0), rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(logits(lora.on(llm)), logits(llm))


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_logits_and_gradients_are_those_of_the_merged_kernels(
    path: Path, quantize: str | None
) -> None:
    llm = load_llm(path, dtype="float32", quantize=quantize)
    lora, slope = trained(llm), jax.random.normal(jax.random.key(2), logits(llm).shape)
    assert_close(logits(lora.on(llm)), np.asarray(logits(merged(lora.on(llm)))), 1e-5)
    ours, theirs = (
        jax.grad(lambda lora, llm, form=form: jnp.sum(logits(form(lora.on(llm))) * slope))(
            lora, llm
        )
        for form in (lambda llm: llm, merged)
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.abs(b).max() > 0
        assert_close(a, np.asarray(b), 1e-4)


def test_one_update_stands_on_another(path: Path) -> None:
    llm = load_llm(path, dtype="float32")
    first, second = trained(llm), trained(llm, seed=2)
    both = second.on(first.on(llm))
    assert_close(logits(both), np.asarray(logits(merged(both))), 1e-5)
    assert np.abs(np.asarray(logits(both) - logits(first.on(llm)))).max() > 1e-2


def only(lora: Lora, user: int, llm: LLM) -> Lora:
    """The update of one user alone."""
    one = Lora(llm, LoraSettings(rank=2, alpha=3.0), rngs=nnx.Rngs(0))
    one.down = jax.tree.map(lambda x: x[:, user], lora.down)
    one.up = jax.tree.map(lambda x: x[:, user], lora.up)
    return one


@pytest.mark.parametrize("num_beams", [1, 2])
def test_every_row_has_its_own(path: Path, num_beams: int) -> None:
    llm = load_llm(path, dtype="float32")
    users = trained(llm, users=3)
    everyone = logits(users.on(llm))
    answers = generate(
        users.on(llm), llm.embed(TOKENS), MASK, max_new_tokens=5, num_beams=num_beams
    )
    for user in range(3):
        row, mine = slice(user, user + 1), only(users, user, llm).on(llm)
        assert_close(everyone[row], np.asarray(logits(mine, row)), 1e-5)
        answer = generate(
            mine, llm.embed(TOKENS[row]), MASK[row], max_new_tokens=5, num_beams=num_beams
        )
        np.testing.assert_array_equal(answers[row], answer)


def test_a_row_s_loss_moves_its_own_update_alone(path: Path) -> None:
    llm = load_llm(path, dtype="float32")
    gradient = jax.grad(lambda lora: jnp.sum(logits(lora.on(llm))[1] ** 2))(trained(llm, users=3))
    for x in jax.tree.leaves(gradient):
        assert (np.abs(x).max(axis=(0, 2, 3)) > 0).tolist() == [False, True, False]
