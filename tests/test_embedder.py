"""The user embedder against a plain PyTorch statement of the paper's equations; corner cases."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pplug_jax.data.form import SIZE
from pplug_jax.encoder.bert import Bert, BertConfig
from pplug_jax.feed.batches import PlugInputs
from pplug_jax.plugs.persona import FIRST_RECENCY, Projector, UserEmbedder, attention_weights
from pplug_jax.plugs.reading import PAPER, Reading
from pplug_jax.settings import PlugSettings
from scripts.pretrain.initialise import initialise
from tests.support.parity import needs_torch
from tests.support.tiny import EXTENSIONS, OPTIONS

if TYPE_CHECKING:
    import torch

E, D, B, H, Q = 16, 24, 3, 6, 5
SCALE = 7.5
READINGS = [PAPER, Reading(uniform=True), Reading(top=2), Reading(instruction=False)]


def make_plug(**settings: Any) -> UserEmbedder:
    config = BertConfig(40, E, 32, 2, 2, 8, 1, 1e-12)
    encoder = initialise(Bert(config, "cls", nnx.Param), jax.random.key(1))
    return UserEmbedder(encoder, E, D, SCALE, PlugSettings(**settings), rngs=nnx.Rngs(0))


def trained(plug: UserEmbedder) -> UserEmbedder:
    """As if: no map is the identity any more, and no bias 0."""
    rng = np.random.default_rng(1)
    graph, params, rest = nnx.split(plug, nnx.Param, ...)
    noise = jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape), params)
    params = jax.tree.map(lambda x, y: np.float32(np.asarray(x) + y), params, noise)
    return nnx.merge(graph, params, rest)


@pytest.fixture(scope="module", params=OPTIONS.values(), ids=OPTIONS)
def plug(request: pytest.FixtureRequest) -> UserEmbedder:
    return trained(make_plug(num_persona_tokens=2, temperature=0.3, **request.param))


def with_items(inputs: PlugInputs, change: Callable[[np.ndarray], np.ndarray]) -> PlugInputs:
    """Apply `change` to every array of items."""
    return PlugInputs(*inputs[:2], *jax.tree.map(change, inputs[2:]))


@pytest.fixture
def inputs() -> PlugInputs:
    rng = np.random.default_rng(0)
    history, difference = rng.normal(size=(2, B, H, E)).astype(np.float32)
    history /= np.linalg.norm(history, axis=-1, keepdims=True)
    mask = np.arange(H) < np.array([[H], [3], [1]])
    age = np.array([[50, 20, 4, 2, 1, 0], [2, 1, 0, 0, 0, 0], [0] * 6], np.float32)
    query = rng.integers(1, 40, (B, Q), dtype=np.int32)
    form = rng.normal(size=(B, H, SIZE)).astype(np.float32)
    features = {"age": age[..., None], "difference": difference, "form": form}
    return PlugInputs(query, np.ones((B, Q), bool), history, mask, features)


@functools.partial(jax.jit, static_argnames="reading")
def call(plug: UserEmbedder, inputs: PlugInputs, reading: Reading = PAPER) -> jax.Array:
    return plug(inputs, reading=reading)


@functools.partial(jax.jit, static_argnames="reading")
def attention(plug: UserEmbedder, inputs: PlugInputs, reading: Reading = PAPER) -> jax.Array:
    return plug.attention(inputs, reading=reading)


@jax.jit
def gradients(plug: UserEmbedder, inputs: PlugInputs) -> UserEmbedder:
    return jax.grad(lambda plug: jnp.sum(plug(inputs) ** 2))(plug)


@pytest.mark.slow
@needs_torch
@pytest.mark.parametrize("reading", READINGS)
def test_equals_the_equations_in_pytorch(
    plug: UserEmbedder, inputs: PlugInputs, reading: Reading
) -> None:
    torch = pytest.importorskip("torch")
    soft = np.asarray(call(plug, inputs, reading=reading))
    attended = np.asarray(attention(plug, inputs, reading=reading))
    vectors = torch.tensor(np.asarray(plug.input_encoder(*inputs[:2])))

    def tensor(variable: nnx.Param) -> "torch.Tensor":
        return torch.tensor(np.asarray(variable[...]))

    def weigh(q: "torch.Tensor", items: "torch.Tensor", ages: "torch.Tensor") -> "torch.Tensor":
        scores = items @ q / 0.3
        if plug.recency_rate is not None:
            rate = torch.nn.functional.softplus(tensor(plug.recency_rate))
            scores = scores - rate * torch.log(1 + ages)
        if reading.top:
            kept = scores.argsort(descending=True).argsort() < reading.top
            scores = torch.where(kept, scores, -torch.inf)
        return torch.softmax(scores * 0 if reading.uniform else scores, dim=0)

    def project(
        projector: Projector, items: "torch.Tensor", weights: "torch.Tensor"
    ) -> "torch.Tensor":
        # The paper's order: every item is projected, then the projections are summed.
        units = torch.nn.functional.gelu(items @ tensor(projector.up) + tensor(projector.up_bias))
        projected = units @ tensor(projector.down) + tensor(projector.down_bias)
        return (weights @ projected).unflatten(0, (-1, D))

    for row, there in enumerate(inputs.history_mask):
        items = torch.tensor(inputs.history[row][there])
        told = {name: torch.tensor(x[row][there]) for name, x in inputs.features.items()}
        weights = weigh(vectors[row], items, told["age"][:, 0])
        np.testing.assert_allclose(attended[row][there], weights, atol=1e-5)
        assert not attended[row][~there].any()
        expected = [project(plug.projector, items, weights)]
        for name in plug.features:
            expected.append(project(getattr(plug, f"{name}_projector"), told[name], weights))
        if reading.instruction:
            one = tensor(plug.instruction)[None], torch.ones(1)
            expected.insert(0, project(plug.instruction_projector, *one))
        np.testing.assert_allclose(soft[row], SCALE * torch.cat(expected), rtol=1e-4, atol=1e-4)


def test_the_order_of_the_items_does_not_matter(plug: UserEmbedder, inputs: PlugInputs) -> None:
    backwards = call(plug, with_items(inputs, lambda x: x[:, ::-1]))
    np.testing.assert_allclose(backwards, call(plug, inputs), rtol=1e-5, atol=1e-5)


def test_an_empty_history_gives_the_null_persona_and_finite_gradients(
    plug: UserEmbedder, inputs: PlugInputs
) -> None:
    empty = with_items(
        inputs, lambda x: np.zeros_like(x) if x.dtype == bool else np.full_like(x, np.nan)
    )
    names = ["persona", *plug.features]
    expected = np.concatenate([getattr(plug, f"null_{name}")[...] for name in names])
    np.testing.assert_allclose(call(plug, empty)[0, 1:], SCALE * expected, rtol=1e-6)
    grads = gradients(plug, empty)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert np.abs(grads.null_persona[...]).max() > 0
    assert np.abs(grads.projector.up[...]).max() == 0
    for name in plug.features:
        assert np.abs(getattr(grads, f"null_{name}")[...]).max() > 0


def test_every_parameter_gets_a_gradient(plug: UserEmbedder, inputs: PlugInputs) -> None:
    some = inputs._replace(history_mask=inputs.history_mask & [[True], [True], [False]])
    grads = nnx.state(gradients(plug, some), nnx.Param)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        # Every layer; keys' biases of the encoder shift all scores alike.
        parts = grad if grad.ndim == 3 else grad[None]
        assert "key_bias" in name or all(np.abs(part).max() > 1e-4 for part in parts), name


def test_uniform_is_the_mean_and_ignores_the_input(plug: UserEmbedder, inputs: PlugInputs) -> None:
    weights = np.asarray(attention(plug, inputs, reading=Reading(uniform=True)))
    np.testing.assert_allclose(weights.sum(1), 1)
    assert set(weights[1]) == {np.float32(0), np.float32(1 / 3)}


def test_without_instruction_the_others_stand_alone(plug: UserEmbedder, inputs: PlugInputs) -> None:
    bare = call(plug, inputs, reading=Reading(instruction=False))
    np.testing.assert_allclose(bare, call(plug, inputs)[:, 1:], rtol=1e-6)


def test_an_untrained_extension_is_nearly_the_paper(inputs: PlugInputs) -> None:
    paper, extended = make_plug(), make_plug(**EXTENSIONS)
    more = jax.tree_util.tree_leaves_with_path(extended)
    for path, leaf in jax.tree_util.tree_leaves_with_path(paper):
        np.testing.assert_array_equal(leaf, dict(more)[path])
    np.testing.assert_allclose(
        call(extended, inputs)[:, :2],
        call(paper, inputs._replace(features={})),
        atol=2 * SCALE * FIRST_RECENCY,
    )


def test_recency_is_a_power_law_of_age(inputs: PlugInputs) -> None:
    plain, recent = trained(make_plug()), trained(make_plug(recency=True))
    recent.input_encoder, rate = plain.input_encoder, jax.nn.softplus(recent.recency_rate[...])
    expected = attention(plain, inputs) * (1.0 + inputs.features["age"][..., 0]) ** -rate
    expected /= expected.sum(1, keepdims=True)
    np.testing.assert_allclose(attention(recent, inputs), expected, rtol=1e-4)
    undated = inputs._replace(features={"age": np.zeros((B, H, 1), np.float32)})
    np.testing.assert_array_equal(attention(recent, undated), attention(plain, inputs))


def test_selection_keeps_the_nearest_items_in_their_proportions() -> None:
    query = jnp.eye(4)[:1]
    cosines = jnp.array([0.1, 0.9, 0.5, 0.7, 0.95])
    history = jnp.stack([cosines, jnp.sqrt(1 - cosines**2), 0 * cosines, 0 * cosines], 1)[None]
    mask = jnp.array([[True, True, True, True, False]])
    every = attention_weights(query, history, mask, 1.0)
    kept = attention_weights(query, history, mask, 1.0, 2)
    expected = np.array([0, every[0, 1], 0, every[0, 3], 0])
    np.testing.assert_allclose(kept[0], expected / expected.sum(), rtol=1e-6)
    np.testing.assert_array_equal(attention_weights(query, history, mask, 1.0, 4), every)
    np.testing.assert_array_equal(attention_weights(query, history, mask, 1.0, 9), every)
    assert not attention_weights(query, history, mask & False, 1.0, 2).any()


def test_the_temperature_sharpens() -> None:
    query = jnp.eye(4)[:1]
    history = jnp.eye(4)[None]
    mask = jnp.ones((1, 4), bool)
    paper = attention_weights(query, history, mask, 1.0)
    np.testing.assert_allclose(paper, jax.nn.softmax(jnp.array([[1.0, 0, 0, 0]])), rtol=1e-6)
    assert attention_weights(query, history, mask, 0.05)[0, 0] > 0.999
    assert np.isfinite(attention_weights(query, history, mask, 1e-6)).all()


def test_a_learned_temperature_gets_a_gradient(inputs: PlugInputs) -> None:
    plug = make_plug(temperature=0.5, learned_temperature=True)
    assert np.abs(gradients(plug, inputs).log_temperature[...]) > 0
    np.testing.assert_allclose(
        call(plug, inputs), call(make_plug(temperature=0.5), inputs), rtol=1e-5
    )


@pytest.mark.slow
def test_soft_tokens_start_at_the_scale_of_the_llms_embeddings() -> None:
    config = BertConfig(40, 64, 64, 1, 2, 8, 1, 1e-12)
    encoder = initialise(Bert(config, "cls", nnx.Param), jax.random.key(1))
    settings = PlugSettings(num_persona_tokens=3, features=("difference",))
    plug = UserEmbedder(encoder, encoder.config.hidden_size, 256, SCALE, settings, rngs=nnx.Rngs(0))
    one = np.zeros((1, 1, 64), np.float32)
    one[0, 0, 5] = 1
    query = np.ones((1, 4), np.int32), np.ones((1, 4), bool)
    soft = call(plug, PlugInputs(*query, one, np.ones((1, 1), bool), {"difference": one}))
    assert soft.shape == (1, 7, 256)
    np.testing.assert_allclose(np.linalg.norm(soft[0], axis=-1), SCALE, rtol=0.25)


@pytest.mark.slow
@pytest.mark.parametrize("option", ["paper", "all"])
def test_bfloat16_computes_near_float32_and_keeps_float32_parameters(
    inputs: PlugInputs, option: str
) -> None:
    half, full = (make_plug(dtype=t, **OPTIONS[option]) for t in ("bfloat16", "float32"))
    assert {x.dtype for x in jax.tree.leaves(half)} == {jnp.dtype("float32")}
    soft = call(half, inputs)
    assert soft.dtype == jnp.bfloat16
    np.testing.assert_allclose(soft.astype(jnp.float32), call(full, inputs), atol=0.15)
