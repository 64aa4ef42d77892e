"""The user embedder against a plain PyTorch statement of the paper's equations; corner cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pplug_jax.embedder import Reading, UserEmbedder, attention_weights
from pplug_jax.encoder.bert import Bert, BertConfig
from pplug_jax.tools.initialise import initialise

E, D, B, H, Q = 16, 24, 3, 6, 5
SCALE = 7.5


def make_plug(**settings) -> UserEmbedder:
    config = BertConfig(40, E, 32, 2, 2, 8, 1, 1e-12)
    encoder = initialise(Bert(config, "cls", nnx.Param), jax.random.key(1))
    return UserEmbedder(encoder, D, SCALE, **settings, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def plug() -> UserEmbedder:
    return make_plug(num_persona_tokens=2, temperature=0.3)


@pytest.fixture
def inputs() -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    history = rng.normal(size=(B, H, E)).astype(np.float32)
    history /= np.linalg.norm(history, axis=-1, keepdims=True)
    mask = np.arange(H) < np.array([[H], [3], [1]])
    query = rng.integers(1, 40, (B, Q), dtype=np.int32)
    return query, np.ones((B, Q), bool), history, mask


call = jax.jit(lambda plug, *inputs: plug(*inputs))


def test_equals_the_equations_in_pytorch(
    plug: UserEmbedder, inputs: tuple[np.ndarray, ...]
) -> None:
    torch = pytest.importorskip("torch")
    soft = np.asarray(call(plug, *inputs))
    q = torch.tensor(np.asarray(plug.input_encoder(*inputs[:2])))

    def tensor(variable: nnx.Param) -> "torch.Tensor":
        return torch.tensor(np.asarray(variable[...]))

    def project(projector, x: "torch.Tensor") -> "torch.Tensor":
        hidden = torch.nn.functional.gelu(x @ tensor(projector.up) + tensor(projector.up_bias))
        out = hidden @ tensor(projector.down) + tensor(projector.down_bias)
        return out.unflatten(-1, (-1, D))

    for row in range(B):
        items = torch.tensor(inputs[2][row][inputs[3][row]])
        weights = torch.softmax(items @ q[row] / 0.3, dim=0)
        # The paper's order: every item is projected, then the projections are summed.
        persona = torch.einsum("i,ikd->kd", weights, project(plug.projector, items))
        instruction = project(plug.instruction_projector, tensor(plug.instruction))
        expected = SCALE * torch.cat([instruction, persona])
        np.testing.assert_allclose(soft[row], expected.numpy(), atol=2e-5)


def test_a_masked_item_changes_nothing_to_the_last_bit(
    plug: UserEmbedder, inputs: tuple[np.ndarray, ...]
) -> None:
    query, query_mask, history, mask = inputs
    garbage = np.where(mask[..., None], history, np.nan)
    np.testing.assert_array_equal(
        call(plug, query, query_mask, history, mask), call(plug, query, query_mask, garbage, mask)
    )
    wider = np.pad(history, ((0, 0), (0, 10), (0, 0)), constant_values=1e30)
    wider_mask = np.pad(mask, ((0, 0), (0, 10)))
    np.testing.assert_allclose(
        call(plug, query, query_mask, wider, wider_mask), call(plug, *inputs), rtol=1e-5, atol=1e-5
    )


def test_the_order_of_the_items_does_not_matter(
    plug: UserEmbedder, inputs: tuple[np.ndarray, ...]
) -> None:
    query, query_mask, history, mask = inputs
    np.testing.assert_allclose(
        call(plug, query, query_mask, history[:, ::-1], mask[:, ::-1]),
        call(plug, *inputs),
        atol=1e-5,
    )


def test_an_empty_history_gives_the_null_persona_and_finite_gradients(
    plug: UserEmbedder, inputs: tuple[np.ndarray, ...]
) -> None:
    query, query_mask, history, _ = inputs
    empty = np.zeros((B, H), bool)
    soft = call(plug, query, query_mask, np.full_like(history, np.nan), empty)
    np.testing.assert_allclose(soft[0, 1:], SCALE * plug.null_persona[...], rtol=1e-6)
    grads = jax.jit(jax.grad(lambda plug: jnp.sum(plug(query, query_mask, history, empty) ** 2)))(
        plug
    )
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert np.abs(grads.null_persona[...]).max() > 0
    assert np.abs(grads.projector.up[...]).max() == 0


def test_uniform_is_the_mean_and_ignores_the_input(
    plug: UserEmbedder, inputs: tuple[np.ndarray, ...]
) -> None:
    uniform = jax.jit(lambda plug, *inputs: plug.attention(*inputs, reading=Reading(uniform=True)))
    weights = np.asarray(uniform(plug, *inputs))
    np.testing.assert_allclose(weights.sum(1), 1)
    assert set(weights[1]) == {np.float32(0), np.float32(1 / 3)}


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


def test_without_instruction_the_persona_stands_alone(
    plug: UserEmbedder, inputs: tuple[np.ndarray, ...]
) -> None:
    bare = jax.jit(lambda plug, *inputs: plug(*inputs, reading=Reading(instruction=False)))
    np.testing.assert_allclose(bare(plug, *inputs), call(plug, *inputs)[:, 1:], rtol=1e-6)


def test_the_temperature_sharpens() -> None:
    query = jnp.eye(4)[:1]
    history = jnp.eye(4)[None]
    mask = jnp.ones((1, 4), bool)
    paper = attention_weights(query, history, mask, 1.0)
    np.testing.assert_allclose(paper, jax.nn.softmax(jnp.array([[1.0, 0, 0, 0]])), rtol=1e-6)
    assert attention_weights(query, history, mask, 0.05)[0, 0] > 0.999
    assert np.isfinite(attention_weights(query, history, mask, 1e-6)).all()


def test_a_learned_temperature_gets_a_gradient(inputs: tuple[np.ndarray, ...]) -> None:
    plug = make_plug(temperature=0.5, learned_temperature=True)
    grads = jax.jit(jax.grad(lambda plug: jnp.sum(plug(*inputs)[:, 1:] ** 2)))(plug)
    assert np.abs(grads.log_temperature[...]) > 0
    np.testing.assert_allclose(
        call(plug, *inputs), call(make_plug(temperature=0.5), *inputs), rtol=1e-5
    )


def test_soft_tokens_start_at_the_scale_of_the_llms_embeddings() -> None:
    config = BertConfig(40, 64, 64, 1, 2, 8, 1, 1e-12)
    encoder = initialise(Bert(config, "cls", nnx.Param), jax.random.key(1))
    plug = UserEmbedder(encoder, 256, SCALE, num_persona_tokens=3, rngs=nnx.Rngs(0))
    one = np.zeros((1, 1, 64), np.float32)
    one[0, 0, 5] = 1
    query = np.ones((1, 4), np.int32), np.ones((1, 4), bool)
    soft = call(plug, *query, one, np.ones((1, 1), bool))
    assert soft.shape == (1, 4, 256)
    np.testing.assert_allclose(np.linalg.norm(soft[0], axis=-1), SCALE, rtol=0.25)


def test_bfloat16_computes_near_float32_and_keeps_float32_parameters(
    inputs: tuple[np.ndarray, ...],
) -> None:
    half, full = make_plug(dtype="bfloat16"), make_plug()
    assert {x.dtype for x in jax.tree.leaves(half)} == {jnp.dtype("float32")}
    soft = call(half, *inputs)
    assert soft.dtype == jnp.bfloat16
    np.testing.assert_allclose(soft.astype(jnp.float32), call(full, *inputs), atol=0.15)
