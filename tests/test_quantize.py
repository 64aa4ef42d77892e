"""Integer kernels: their bytes, their error, and that everything still runs through them."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import qwix
from flax import nnx

from pplug_jax.data import sample
from pplug_jax.errors import InputError
from pplug_jax.llm import LLM, load_llm
from pplug_jax.llm.generate import generate
from pplug_jax.llm.quantize import GROUP, quantize
from pplug_jax.plugs.base import parameter_count
from pplug_jax.runtime.mesh import make_mesh
from pplug_jax.session.models import ASSETS
from pplug_jax.storage import hf
from tests.support.parity import assert_close

pytestmark = pytest.mark.slow

ERRORS = {"int8": 0.01, "int4": 0.15}  # of a random kernel, root mean square


@pytest.fixture(scope="module", params=["llama", "t5"])
def path(
    request: pytest.FixtureRequest, make_llama: Callable[..., Path], make_t5: Callable[..., Path]
) -> Path:
    make = {"llama": make_llama, "t5": make_t5}[request.param]
    return make(vocab_size=320)


def batch() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    tokens, targets = (random.integers(3, 320, (3, L), dtype=np.int32) for L in (11, 6))
    return tokens, np.arange(11) < np.array([[11], [7], [1]]), targets


def expanded(weight: nnx.Variable) -> jax.Array:
    value = weight.get_value()
    return qwix.dequantize(value) if isinstance(value, qwix.QArray) else value


def logits(llm: LLM, embeds: jax.Array) -> jax.Array:
    _, mask, targets = batch()
    return jax.jit(lambda llm, embeds: llm.logits(embeds, mask, targets))(llm, embeds)


def relative(ours: jax.Array, theirs: jax.Array) -> float:
    return float(jnp.linalg.norm(ours - theirs) / jnp.linalg.norm(theirs))


@pytest.mark.parametrize("kind", ERRORS)
def test_logits_and_gradient_are_those_of_the_expanded_kernels(path: Path, kind: str) -> None:
    stored = load_llm(path, dtype="float32", quantize=kind)
    graph, state = nnx.split(stored)
    plain = [(name, weight.replace(expanded(weight))) for name, weight in nnx.to_flat_state(state)]
    plain = nnx.merge(graph, nnx.from_flat_state(plain))
    embeds = stored.embed(batch()[0])
    assert_close(logits(stored, embeds), np.asarray(logits(plain, embeds)), 1e-5)
    slope = jax.random.normal(jax.random.key(0), logits(plain, embeds).shape)
    gradient = jax.grad(lambda embeds, llm: jnp.sum(logits(llm, embeds) * slope))
    assert_close(gradient(embeds, stored), np.asarray(gradient(embeds, plain)), 1e-5)


@pytest.mark.parametrize(("kind", "tolerance"), [("int8", 0.01), ("int4", 0.2)])
def test_a_trained_models_loss_stays_near(kind: str, tolerance: float) -> None:
    path = ASSETS / "tiny_llama"
    tokenizer = hf.load_tokenizer(path, 1536)
    texts = [f"{user.input}\n{user.target}" for user in sample.users(0, "dev", 16)]
    tokens = np.array([[0, *tokenizer.encode(text)[-30:]] for text in texts], np.int32)

    @jax.jit
    def loss(llm: LLM) -> jax.Array:
        found = llm.logits(llm.embed(tokens[:, :-1]), np.ones(tokens[:, 1:].shape, bool))
        return optax.softmax_cross_entropy_with_integer_labels(found, tokens[:, 1:]).mean()

    exact, rough = (float(loss(load_llm(path, dtype="float32", quantize=q))) for q in (None, kind))
    assert 0 < abs(rough / exact - 1) < tolerance, (rough, exact)


@pytest.mark.parametrize("kind", ERRORS)
def test_only_kernels_are_quantised(path: Path, kind: str) -> None:
    exact, rough = (load_llm(path, quantize=q) for q in (None, kind))
    assert parameter_count(exact) == parameter_count(rough)
    whole, stored = (nnx.to_flat_state(nnx.state(llm)) for llm in (exact, rough))
    for (name, before), (_, after) in zip(whole, stored, strict=True):
        before, after = before.get_value(), after.get_value()
        if before.ndim == 3:
            assert after.qvalue.dtype == jnp.dtype(kind) and after.dtype == jnp.bfloat16
            assert 0 < relative(expanded(nnx.Variable(after)), before) < ERRORS[kind], name
        else:
            np.testing.assert_array_equal(before, after)


def test_scales_are_per_channel_or_group() -> None:
    kernels = jax.random.normal(jax.random.key(0), (2, 3 * GROUP, 5))
    assert quantize(kernels, "int8").scale.shape == (2, 1, 5)
    assert quantize(kernels, "int4").scale.shape == (2, 3, 5)
    assert quantize(kernels[:, :96], "int4").scale.shape == (2, 3, 5)  # gcd(96, 128) = 32


def test_generates(path: Path) -> None:
    llm = load_llm(path, dtype="float32", quantize="int8")
    tokens, mask, _ = batch()
    embeds = llm.embed(tokens)
    for num_beams in (1, 3):
        answer = generate(llm, embeds, mask, max_new_tokens=5, num_beams=num_beams)
        assert answer.shape == (3, 5)


@pytest.mark.parametrize("kind", ERRORS)
def test_sharded_over_eight_devices(path: Path, kind: str) -> None:
    one = load_llm(path, dtype="float32", quantize=kind)
    eight = load_llm(path, mesh=make_mesh(2, 2, 2), dtype="float32", quantize=kind)
    tokens = batch()[0]
    assert_close(logits(eight, eight.embed(tokens)), np.asarray(logits(one, one.embed(tokens))))
    layers = eight.encoder.attention if hasattr(eight, "encoder") else eight.layers
    stored = layers.query.get_value().qvalue
    assert stored.addressable_shards[0].data.size * 4 == stored.size  # over fsdp and tensor


def test_an_unknown_kind_is_named(path: Path) -> None:
    with pytest.raises(InputError, match="quantize='int3' is unknown; known: int8, int4"):
        load_llm(path, quantize="int3")
