"""The TPU's attention kernel, interpreted on a CPU, against XLA's attention."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from pplug_jax.llm import decoder
from pplug_jax.llm.decoder import Decoder
from pplug_jax.llm.load import FAMILIES
from pplug_jax.nn import attention, splash
from pplug_jax.plan.chips import find_slice
from pplug_jax.plan.flops import matmul_flops
from pplug_jax.runtime.mesh import make_mesh
from scripts.pretrain.initialise import initialise
from tests.support.parity import with_gradients

B, L, HEADS, D = 3, 300, 4, 16  # three blocks, the last in part
# A whole row, one with padding behind, and one with padding in front, longer than a block.
STARTS, STOPS = np.array([0, 0, 150]), np.array([L, 120, L])
THERE = (np.arange(L) >= STARTS[:, None]) & (np.arange(L) < STOPS[:, None])
WINDOW = 70
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splash, "BLOCK", 128)


def draw(seed: int, heads: int, dtype: str) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(B, L, heads, D)), dtype)


def outputs(attend: Attend, kv_heads: int, dtype: str = "float32") -> list[np.ndarray]:
    """What `attend` gives at the tokens, and the gradients of a function of it."""

    def at_tokens(*arrays: jax.Array) -> jax.Array:
        return jnp.where(THERE[..., None, None], attend(*arrays), 0)

    arrays = draw(0, HEADS, dtype), draw(1, kv_heads, dtype), draw(2, kv_heads, dtype)
    found = with_gradients(at_tokens, *arrays)
    assert {x.dtype for x in found} == {jnp.dtype(dtype)}
    return [np.float32(x) for x in found]


def kernel(window: int | None = None, slides: bool = False, **settings: float | None) -> Attend:
    mask = splash.OwnText(jnp.asarray(THERE), jnp.bool(slides), window)
    return functools.partial(splash.splash, mask=mask, interpret=True, **settings)


def reference(window: int | None = None, slides: bool = False, **settings: float | None) -> Attend:
    mask = decoder.causal(jnp.asarray(THERE))
    if slides:
        mask &= jnp.arange(L)[:, None] - jnp.arange(L) < window
    return functools.partial(attention.attend, mask=mask, **settings)


@pytest.mark.slow
@pytest.mark.parametrize(("window", "slides"), [(None, False), (WINDOW, False), (WINDOW, True)])
@pytest.mark.parametrize(
    ("kv_heads", "settings"), [(4, {}), (2, {"cap": 3.0}), (1, {"scale": 0.1})]
)
def test_against_xla(
    window: int | None, slides: bool, kv_heads: int, settings: dict[str, float]
) -> None:
    settings |= {"window": window, "slides": slides}
    found = outputs(kernel(**settings), kv_heads)
    for ours, theirs in zip(found, outputs(reference(**settings), kv_heads), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_bfloat16() -> None:
    found, expected = outputs(kernel(), 2, "bfloat16"), outputs(reference(), 2, "bfloat16")
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0.05, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [2, 1])  # one for every device, and fewer
def test_on_a_mesh(kv_heads: int) -> None:
    expected = outputs(reference(), kv_heads)
    with jax.set_mesh(make_mesh(1, 3, 2, jax.devices()[:6])):
        found = outputs(kernel(), kv_heads)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_flops_are_those_of_all_blocks() -> None:
    """On every device together."""
    arrays = draw(0, HEADS, "float32"), draw(1, 2, "float32"), draw(2, 2, "float32")
    products = 2 * 2 * B * HEADS * (3 * 128) ** 2 * D  # queries by keys, weights by values
    assert matmul_flops(jax.make_jaxpr(kernel())(*arrays)) == products
    with jax.set_mesh(make_mesh(1, 3, 2, jax.devices()[:6])):
        assert matmul_flops(jax.make_jaxpr(kernel())(*arrays)) == products


SHAPE = {
    "vocab_size": 24,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": D,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
LLMS = {
    "llama": transformers.LlamaConfig(**SHAPE),
    "gemma2": transformers.Gemma2Config(**SHAPE, sliding_window=WINDOW),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LLMS)
def test_decoders(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Logits, their gradient, a step behind the prompt, and a text that goes on from it."""
    shapes = Decoder(FAMILIES[name].config_from_hf(LLMS[name], (1,)), "float32")
    llm = initialise(shapes, jax.random.key(0))
    embeds = jnp.asarray(np.random.default_rng(0).normal(size=(B, L, 32)), "float32")
    mask, behind = jnp.asarray(THERE), jnp.ones((B, 20), jnp.int32)

    def found() -> list[jax.Array]:
        def total(llm: Decoder, embeds: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = jnp.where(THERE[..., None], llm.unembed(llm.hidden(embeds, mask)), 0)
            return jnp.sum(jnp.cos(logits)), logits

        def generated(llm: Decoder, embeds: jax.Array) -> tuple[jax.Array, jax.Array]:
            first, cache = llm.prefill(embeds, mask, max_new_tokens=2)
            return first, llm.step(behind[:, :1], cache)[0]

        def followed(llm: Decoder, tail: jax.Array) -> tuple[jax.Array, jax.Array]:
            context = llm.read(embeds, mask)
            logits = llm.unembed(llm.hidden(tail, jnp.ones((B, 7), bool), context=context))
            return jnp.sum(jnp.cos(logits)), logits

        followed_gradient = jax.value_and_grad(followed, argnums=1, has_aux=True)
        with_gradient = jax.value_and_grad(total, argnums=1, has_aux=True)
        targets = jax.jit(lambda llm, x: llm.logits(x, mask[:, :-20], behind))
        return jax.tree.leaves(
            [
                jax.jit(with_gradient)(llm, embeds),
                jax.jit(generated)(llm, embeds),
                targets(llm, embeds[:, :-20]),
                jax.jit(followed_gradient)(llm, embeds[:, 20:27]),
            ]
        )

    by_xla = found()
    monkeypatch.setattr(decoder, "pays", lambda length: length == L)  # as on a TPU
    interpreted = functools.partial(splash.splash, interpret=True)
    monkeypatch.setattr(attention, "splash", interpreted)
    for ours, theirs in zip(found(), by_xla, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)


def test_only_long_texts_on_tpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not splash.pays(10**6)  # this is a CPU
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert splash.pays(splash.FEWEST_TOKENS)
    assert not splash.pays(splash.FEWEST_TOKENS - 1)
    with jax.set_mesh(make_mesh()):
        assert not splash.pays(10**6)


@pytest.mark.parametrize("window", [None, WINDOW])
def test_compiled_for_a_tpu(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    pytest.importorskip("libtpu", reason="the TPU compiler is an extra (requirements-plan.txt)")
    monkeypatch.undo()

    def total(query: jax.Array, key: jax.Array, slides: jax.Array) -> jax.Array:
        mask = splash.OwnText(jnp.ones((4, 2048), bool), slides, window)
        return jnp.sum(attention.attend(query, key, key, mask).astype(jnp.float32))

    query, key = (jax.ShapeDtypeStruct((4, 2048, n, 64), "bfloat16") for n in (8, 4))
    with jax.set_mesh(make_mesh(2, 1, 2, find_slice("v5e:2x2").devices)):
        assert splash.pays(2048)
        slides = jax.ShapeDtypeStruct((), bool)
        program = jax.jit(jax.grad(total, argnums=(0, 1))).lower(query, key, slides).compile()
    kernels = 3 if window is None else 6  # forwards, and one for each of the two gradients
    assert program.as_text().count('custom_call_target="tpu_custom_call"') == kernels
