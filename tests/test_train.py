"""The training step: its loss, what it differentiates, its cost; every mesh gives the same."""

import functools
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from pplug_jax.feed.batches import Batch, place_batch
from pplug_jax.llm import load_llm
from pplug_jax.llm.decoder import Decoder
from pplug_jax.llm.prompts import Front
from pplug_jax.nn.variables import Frozen
from pplug_jax.plugs.forward import inputs_embeds
from pplug_jax.plugs.lora import Lora
from pplug_jax.plugs.persona import UserEmbedder
from pplug_jax.plugs.reading import PAPER
from pplug_jax.runtime.mesh import make_mesh, place
from pplug_jax.settings import LoraSettings
from pplug_jax.train.meter import Meter
from pplug_jax.train.step import init_optimizer, jit_step, loss_fn, make_optimizer
from tests.support.parity import needs_torch
from tests.support.tiny import ONE_DEVICE, B, E, L, Q, T, make_batch, make_llm, make_plug

OPTIMIZER = make_optimizer(10, 1e-2, 1e-4, 0.1, 1.0)


def step(
    plug: UserEmbedder, llm: Decoder, batch: Batch, mesh: Mesh = ONE_DEVICE, **settings: Any
) -> tuple[UserEmbedder, dict]:
    """One update of a copy of `plug`, whose buffers the step would take."""
    plug = place(jax.tree.map(jnp.copy, plug), mesh)
    settings = {"optimizer": OPTIMIZER, "place": Front(1)} | settings
    opt_state = init_optimizer(settings["optimizer"], plug, mesh)
    with jax.set_mesh(mesh):
        plug, _, metrics = jit_step(plug, opt_state)(plug, opt_state, llm, batch, **settings)
    return plug, metrics


@pytest.mark.slow
@needs_torch
def test_the_loss_is_that_of_transformers(tiny_llama: Path) -> None:
    """Soft tokens via `inputs_embeds`, cross entropy over the target tokens, plainly in PyTorch."""
    torch = pytest.importorskip("torch")
    import transformers

    llm = load_llm(tiny_llama, dtype="float32")
    plug, batch = make_plug(llm.config.hidden_size), make_batch(llm.config.vocab_size)
    total, tokens = jax.jit(loss_fn, static_argnums=3)(plug, llm, batch, Front(1))

    model = transformers.LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    soft = torch.tensor(np.asarray(plug(batch.plug_inputs)))
    losses = []
    for row in range(B):
        prompt = torch.tensor(batch.prompt[row][batch.prompt_mask[row]]).long()
        target = torch.tensor(batch.target[row][batch.target_mask[row]]).long()
        table = model.get_input_embeddings()
        embeds = torch.cat([table(prompt[:1]), soft[row], table(prompt[1:]), table(target)])[None]
        labels = torch.full(embeds.shape[:2], -100)
        labels[0, -len(target) :] = target
        with torch.no_grad():
            losses.append(model(inputs_embeds=embeds, labels=labels).loss * len(target))
    assert tokens == batch.target_mask.sum()
    np.testing.assert_allclose(total, sum(losses), rtol=1e-5)


@pytest.mark.slow
def test_only_the_plug_is_trained() -> None:
    llm, batch = make_llm(), make_batch()
    before = [np.asarray(x).copy() for x in jax.tree.leaves(llm)]
    plug = make_plug(llm.config.hidden_size)
    after, _ = step(plug, llm, batch)
    for a, b in zip(before, jax.tree.leaves(llm), strict=True):
        np.testing.assert_array_equal(a, b)
    variables = jax.tree.leaves(nnx.state(llm), is_leaf=lambda x: isinstance(x, nnx.Variable))
    assert all(type(variable) is Frozen for variable in variables)
    assert not jax.tree.leaves(nnx.state(llm, nnx.Param))
    changed = jax.tree.map(lambda a, b: jnp.any(a != b), plug, after)
    assert not changed.scale[...]
    unused = {"null_persona"}  # no row of this batch has an empty history
    params = nnx.state(changed, nnx.Param)
    for path, was_changed in jax.tree_util.tree_leaves_with_path(params):
        # Keys' biases shift all scores alike, and weight decay moves no zero.
        name = jax.tree_util.keystr(path)
        assert was_changed or "key_bias" in name or any(u in name for u in unused), name


@pytest.mark.slow
def test_a_step_costs_4_flops_a_parameter_and_token() -> None:
    """Forward 2, backward through the activations 2; the LLM's weight gradients would make it 6."""
    llm = make_llm(layers=1, hidden=128, mlp=512, vocab=64)
    plug, batch = make_plug(128), make_batch(64)
    parameters = sum(x.size for x in jax.tree.leaves(llm))
    tokens = B * (L + 2 + T - 1)

    def flops(argnums: int | tuple[int, ...]) -> float:
        gradient = jax.jit(jax.grad(lambda p, m, b: loss_fn(p, m, b, Front(1))[0], argnums))
        return gradient.lower(plug, llm, batch).compile().cost_analysis()["flops"]

    assert flops(0) < 4.4 * parameters * tokens
    assert flops((0, 1)) > 5 * parameters * tokens  # so the count above would have seen them


def dot_shapes(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.outvars[0].aval.shape
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from dot_shapes(inner)


@pytest.mark.parametrize("remat", [False, True])
def test_no_matrix_product_makes_a_weight_gradient_of_the_llm(remat: bool) -> None:
    llm, batch = make_llm(), make_batch()
    shapes = {x.shape[-2:] for x in jax.tree.leaves(llm) if x.ndim > 1}
    shapes |= {shape[::-1] for shape in shapes}
    jaxpr = jax.make_jaxpr(
        lambda plug, llm: jax.grad(lambda p: loss_fn(p, llm, batch, Front(1), remat)[0])(plug)
    )(make_plug(40), llm)
    found = set(dot_shapes(jaxpr.jaxpr))
    assert len(found) > 10
    assert not found & shapes


def test_logits_are_computed_at_target_positions_only() -> None:
    llm, batch = make_llm(vocab=192), make_batch()
    jaxpr = jax.make_jaxpr(lambda plug: loss_fn(plug, llm, batch, Front(1)))(make_plug(40))
    assert {shape for shape in dot_shapes(jaxpr.jaxpr) if 192 in shape} == {(B, T, 192)}


@pytest.mark.slow
def test_accumulation_and_remat_change_nothing() -> None:
    llm, batch = make_llm(), make_batch()
    plug = make_plug(llm.config.hidden_size)
    _, metrics = step(plug, llm, batch)
    for settings in ({"accumulation": 4}, {"remat": True}):
        _, other_metrics = step(plug, llm, batch, **settings)
        np.testing.assert_allclose(other_metrics["loss"], metrics["loss"], rtol=1e-5)
        np.testing.assert_allclose(other_metrics["grad_norm"], metrics["grad_norm"], rtol=1e-4)
    assert math.isfinite(metrics["loss"])


def encoded(batch: Batch) -> Batch:
    """The batch with vectors as its queries, for a plug that does not train Enc_inp."""
    vectors = np.random.default_rng(4).normal(size=(len(batch.query), E)).astype(np.float32)
    return batch._replace(query=vectors, query_mask=np.ones((len(vectors), 1), bool))


@pytest.mark.slow
def test_a_frozen_encoder_does_not_count_as_trained() -> None:
    plug, batch = make_plug(40, trained=False), encoded(make_batch())
    batch.history_mask[0] = False  # the null persona
    gradient = jax.jit(jax.grad(loss_fn, has_aux=True), static_argnums=3)
    grads, _ = gradient(plug, make_llm(), batch, Front(1))
    moved = sum(g.size for g in jax.tree.leaves(grads) if jnp.any(g))
    assert plug.trained(PAPER) == moved > 0


@pytest.mark.slow
def test_the_encoder_learns_at_its_own_rate() -> None:
    llm, batch, plug, rate = make_llm(), make_batch(), make_plug(40), 0.25
    optimizer = make_optimizer(10, 1e-2, 1e-4, 0.1, 1.0, rate)
    (same, _), (other, _) = step(plug, llm, batch), step(plug, llm, batch, optimizer=optimizer)

    def moved(after: UserEmbedder) -> list[np.ndarray]:
        leaves = zip(*(jax.tree.leaves(x.input_encoder) for x in (after, plug)), strict=True)
        return [np.asarray(now) - np.asarray(before) for now, before in leaves]

    assert max(np.abs(x).max() for x in moved(other)) > 0
    for slower, full in zip(moved(other), moved(same), strict=True):
        np.testing.assert_allclose(slower, rate * full, atol=1e-6)
    np.testing.assert_allclose(
        other.projector.down[...], same.projector.down[...], rtol=1e-5, atol=1e-7
    )


def test_a_frozen_encoder_is_as_the_vectors_that_it_makes() -> None:
    llm, batch = make_llm(), make_batch()
    trained, frozen = make_plug(40), make_plug(40, False)
    vectors = trained.input_encoder(batch.query, batch.query_mask)
    ready = batch._replace(query=vectors, query_mask=np.ones((B, 1), bool))

    def loss(plug: UserEmbedder, batch: Batch) -> jax.Array:
        return loss_fn(plug, llm, batch, Front(1))[0]

    expected, grads = jax.jit(jax.value_and_grad(loss))(trained, batch)
    found, theirs = jax.jit(jax.value_and_grad(loss))(frozen, ready)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(theirs.projector.up[...], grads.projector.up[...], atol=1e-5)


def test_a_row_that_fills_up_the_batch_has_no_weight() -> None:
    llm, batch = make_llm(), make_batch()
    plug = make_plug(llm.config.hidden_size)
    loss = jax.jit(loss_fn, static_argnums=3)
    total, tokens = loss(plug, llm, jax.tree.map(lambda x: x[: B // 2], batch), Front(1))
    filled = batch._replace(
        target_mask=batch.target_mask & (np.arange(B) < B // 2)[:, None],
        history_mask=batch.history_mask & (np.arange(B) < B // 2)[:, None],
    )
    filled_total, filled_tokens = loss(plug, llm, filled, Front(1))
    assert tokens == filled_tokens
    np.testing.assert_allclose(filled_total, total, rtol=1e-5)


@functools.cache
def one_device_step() -> tuple[UserEmbedder, dict]:
    return step(make_plug(48), make_llm(hidden=48, mlp=64), make_batch())


# Of two that differ in which of the axes has 4 devices and which has 2, one.
MESHES = [
    (slices, data, fsdp, 8 // (slices * data * fsdp))
    for slices, data, fsdp in itertools.product((1, 2, 4, 8), repeat=3)
    if 8 % (slices * data * fsdp) == 0
    and (slices == 1 or fsdp > 1)
    and (slices, data, fsdp) not in {(1, 1, 4), (1, 4, 1), (1, 4, 2)}
]


@pytest.mark.slow
@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_every_kind_of_mesh_gives_the_same_step(shape: tuple[int, int, int, int]) -> None:
    llm, batch, plug = make_llm(hidden=48, mlp=64), make_batch(), make_plug(48)
    one, metrics = one_device_step()
    slices, *others = shape
    mesh = make_mesh(*others, slices=slices)
    sharded_llm = place(llm, mesh)
    many, sharded_metrics = step(plug, sharded_llm, place_batch(batch, mesh), mesh)
    np.testing.assert_allclose(sharded_metrics["loss"], metrics["loss"], rtol=1e-5)
    np.testing.assert_allclose(sharded_metrics["grad_norm"], metrics["grad_norm"], rtol=1e-4)
    # Adam's first step is the gradient's sign: compare a parameter whose gradients are far from 0.
    np.testing.assert_allclose(
        many.instruction_projector.down_bias[...],
        one.instruction_projector.down_bias[...],
        atol=1e-5,
    )
    if shape == (1, 2, 2, 2):
        spec = sharded_llm.layers.gate[...].sharding.spec
        assert tuple(spec) == (None, "fsdp", "tensor")
        assert (
            sharded_llm.layers.gate[...].addressable_shards[0].data.size * 4
            == llm.layers.gate[...].size
        )


@pytest.mark.slow
def test_a_lora_is_trained_alone_and_alike_on_a_mesh() -> None:
    llm, batch = make_llm(hidden=48, mlp=64), make_batch()
    lora = Lora(llm, LoraSettings(rank=2, alpha=4.0), rngs=nnx.Rngs(0))
    one, metrics = step(lora, llm, batch)
    mesh = make_mesh(2, 2, 2)
    many, sharded_metrics = step(lora, place(llm, mesh), place_batch(batch, mesh), mesh)
    np.testing.assert_allclose(sharded_metrics["loss"], metrics["loss"], rtol=1e-5)
    np.testing.assert_allclose(sharded_metrics["grad_norm"], metrics["grad_norm"], rtol=1e-4)
    # The first step moves B alone, by its gradient's sign, and few gradients are near 0.
    for name, up in one.up.items():
        assert np.abs(up[...]).max() > 0
        assert np.mean(np.abs(np.asarray(many.up[name][...]) - up[...]) < 1e-5) > 0.99, name
    # Without history or plug, an untrained LoRA's loss is the LLM's.
    bare, _ = jax.jit(loss_fn, static_argnums=3)(lora, llm, batch, Front(1))
    zero = jax.tree.map(lambda x: x * 0, lora)
    np.testing.assert_allclose(
        jax.jit(loss_fn, static_argnums=3)(zero, llm, batch, Front(1))[0], bare
    )


@pytest.mark.slow
def test_no_device_holds_every_row() -> None:
    """The weights' shards do not decide for the activations: logits and encoder stay split."""
    mesh = make_mesh(1, 8, 1)
    V = 64
    llm, plug = place(make_llm(hidden=48, mlp=64, vocab=V), mesh), place(make_plug(48), mesh)
    gradient = jax.jit(jax.grad(lambda plug, llm, batch: loss_fn(plug, llm, batch, Front(1))[0]))
    with jax.set_mesh(mesh):
        program = gradient.lower(plug, llm, place_batch(make_batch(V), mesh)).compile().as_text()
    tokens = L + 2 + T - 1
    for name, shape in {"logits": (T, V), "LLM": (tokens, 48), "encoder": (Q, E)}.items():
        per_device, all_rows = (f"f32[{rows},{shape[0]},{shape[1]}]" for rows in (B // 8, B))
        assert per_device in program, name
        assert all_rows not in program, name


@pytest.mark.slow
def test_the_loss_falls_and_bfloat16_keeps_float32_parameters() -> None:
    llm, batch = make_llm(), make_batch()
    plug = place(make_plug(llm.config.hidden_size, dtype="bfloat16"), ONE_DEVICE)
    opt_state = init_optimizer(OPTIMIZER, plug, ONE_DEVICE)
    update, losses = jit_step(plug, opt_state), []
    for _ in range(8):
        plug, opt_state, metrics = update(
            plug, opt_state, llm, batch, optimizer=OPTIMIZER, place=Front(1)
        )
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    assert {x.dtype for x in jax.tree.leaves(plug)} == {jnp.dtype("float32")}


def test_soft_tokens_stand_behind_the_prefix() -> None:
    llm = make_llm()
    prompt = np.arange(6, dtype=np.int32)[None]
    mask = np.array([[True] * 5 + [False]])
    soft = jnp.full((1, 2, 40), 7.0)
    embeds, there, _ = inputs_embeds(llm, soft, prompt, mask, Front(1))
    np.testing.assert_array_equal(embeds[0, 1:3], soft[0])
    np.testing.assert_array_equal(embeds[0, 3:], llm.embed(prompt)[0, 1:])
    np.testing.assert_array_equal(there[0], [True] * 7 + [False])


def test_a_meter_reads_means_and_speeds_and_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=10.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("pplug_jax.train.meter.time", clock)
    meter = Meter()
    for loss in (jnp.float32(1), jnp.float32(2)):
        meter.add({"loss": loss}, tokens=30)
    clock.now += 4
    with meter.paused():
        clock.now += 100
    assert meter.read() == {"loss": 1.5, "steps_per_second": 0.5, "tokens_per_second": 15.0}
    meter.add({"loss": jnp.float32(7)}, tokens=8)
    clock.now += 2
    assert meter.read() == {"loss": 7.0, "steps_per_second": 0.5, "tokens_per_second": 4.0}
