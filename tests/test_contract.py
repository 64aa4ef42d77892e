"""What every plug of the registry, with every feature of the table, must keep to.

That a served user is read as in the evaluation is test_personalizer.py's, over the same table.
"""

import contextlib
import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pplug_jax.data.tasks import TASKS
from pplug_jax.encoder.bert import Bert, BertConfig
from pplug_jax.feed.batches import Batch
from pplug_jax.feed.features import FEATURES
from pplug_jax.llm import LLM
from pplug_jax.llm.prompts import Front
from pplug_jax.methods.table import METHODS
from pplug_jax.plugs.base import Kind, Plug
from pplug_jax.plugs.forward import adapt, token_losses
from pplug_jax.plugs.reading import PAPER, Reading
from pplug_jax.plugs.registry import PLUGS
from pplug_jax.runtime.mesh import place_abstract
from pplug_jax.settings import LoraSettings, PlugSettings, Settings
from pplug_jax.storage.checkpoint import Checkpoints
from scripts.pretrain.initialise import initialise
from tests.support.tiny import ONE_DEVICE, B, E, H, make_batch, make_llm

LLM_SIZE = 40


def config_of(*features: str) -> Settings:
    plug = PlugSettings(num_persona_tokens=2, projector_size=16, features=features)
    return Settings(plug=plug, lora=LoraSettings(rank=2))


# A kind of plug alone, and with each feature that it reads.
CASES = {
    " ".join([name, *features]): (name, features)
    for name, kind in PLUGS.items()
    for features in ((), *((feature,) for feature in FEATURES))
    if set(features) <= set(kind.features(config_of(*features)))
}
READINGS = [*dict.fromkeys([PAPER, *(method.reading for method in METHODS.values())])]


class Case(NamedTuple):
    """A plug, as if trained: no map is the identity any more, and no parameter 0."""

    kind: Kind
    config: Settings
    plug: Plug
    llm: LLM
    batch: Batch


@functools.cache
def input_encoder() -> Bert:
    shapes = Bert(BertConfig(30, E, 32, 1, 2, 8, 1, 1e-12), "mean", nnx.Param)
    return initialise(shapes, jax.random.key(1))


def build(kind: Kind, config: Settings, llm: LLM) -> Plug:
    encoder = input_encoder() if kind.reads_input else None
    made = jax.jit(functools.partial(kind.build, config, llm))
    return made(encoder, jnp.float32(1), jax.random.key(2))


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    name, features = CASES[request.param]
    kind, config, llm = PLUGS[name], config_of(*features), make_llm(layers=1, hidden=LLM_SIZE)
    rng = np.random.default_rng(0)
    graph, params, rest = nnx.split(build(kind, config, llm), nnx.Param, ...)
    noise = jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape), params)
    params = jax.tree.map(lambda x, y: np.float32(np.asarray(x) + y), params, noise)
    told = {
        name: rng.uniform(size=(B, H, FEATURES[name].width(E))).astype(np.float32)
        for name in kind.features(config)
    }
    plug = nnx.merge(graph, jax.device_put(params), rest)
    return Case(kind, config, plug, llm, make_batch()._replace(features=told))


@functools.partial(jax.jit, static_argnames="reading")
def learn(plug: Plug, llm: LLM, batch: Batch, reading: Reading = PAPER) -> tuple[jax.Array, Plug]:
    """The target's losses (B, T), and the gradient of their sum."""

    def total(plug: Plug) -> tuple[jax.Array, jax.Array]:
        losses = token_losses(plug, llm, batch, Front(1), reading=reading)
        return jnp.sum(losses), losses

    (_, losses), gradient = jax.value_and_grad(total, has_aux=True)(plug)
    return losses, gradient


def of_items(batch: Batch, change: object) -> Batch:
    """The batch with `change` applied to what is told of the items."""
    return batch._replace(
        history=change(batch.history),
        features={name: change(values) for name, values in batch.features.items()},
    )


def assert_equal(ours: object, theirs: object) -> None:
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("reading", READINGS, ids=str)
def test_it_makes_the_soft_tokens_that_its_kind_tells(case: Case, reading: Reading) -> None:
    _, soft = jax.eval_shape(
        functools.partial(adapt, reading=reading), case.plug, case.llm, case.batch
    )
    count = case.kind.soft_tokens(case.config, reading)
    if count:
        assert (soft.shape, soft.dtype) == ((B, count, LLM_SIZE), case.config.plug.dtype)
    else:
        assert soft is None


def test_the_llm_is_changed_by_it(case: Case) -> None:
    losses, _ = learn(case.plug, case.llm, case.batch)
    bare = jax.jit(token_losses, static_argnums=3)(None, case.llm, case.batch, 1)
    there = case.batch.target_mask
    assert np.isfinite(losses).all() and not np.asarray(losses)[~there].any()
    assert np.abs(losses - bare)[there].max() > 1e-3


def test_who_has_no_history_is_answered_and_learnt_from(case: Case) -> None:
    nobody = case.batch._replace(history_mask=np.zeros((B, H), bool))
    learnt = learn(case.plug, case.llm, of_items(nobody, lambda x: np.full_like(x, np.nan)))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(learnt))


def test_a_masked_item_changes_nothing_to_the_last_bit(case: Case) -> None:
    there = case.batch.history_mask[..., None]
    garbage = of_items(case.batch, lambda x: np.where(there, x, np.nan))
    assert_equal(*(learn(case.plug, case.llm, batch) for batch in (garbage, case.batch)))


def test_padding_does_not_matter(case: Case) -> None:
    def wider(x: np.ndarray) -> np.ndarray:
        return np.pad(x, ((0, 0), (0, 2), *[(0, 0)] * (x.ndim - 2)), constant_values=7)

    def masked(x: np.ndarray) -> np.ndarray:
        return np.pad(x, ((0, 0), (0, 2)))

    batch = of_items(case.batch, wider)
    batch = batch._replace(
        query=wider(batch.query),
        query_mask=masked(batch.query_mask),
        history_mask=masked(batch.history_mask),
        text=wider(batch.text),
        text_mask=masked(batch.text_mask),
    )
    for ours, theirs in zip(
        *(jax.tree.leaves(learn(case.plug, case.llm, x)) for x in (batch, case.batch)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "reading",
    [PAPER, *(pytest.param(reading, marks=pytest.mark.slow) for reading in READINGS[1:])],
    ids=str,
)
def test_what_it_declares_trained_is_what_has_a_gradient(case: Case, reading: Reading) -> None:
    mask = np.array(case.batch.history_mask) & reading.history
    mask[0] = False  # the null persona
    _, gradient = learn(case.plug, case.llm, case.batch._replace(history_mask=mask), reading)
    moved = sum(x.size for x in jax.tree.leaves(gradient) if jnp.any(x))
    assert case.plug.trained(reading) == moved > 0


def test_it_is_saved_and_restored_to_the_bit(case: Case, tmp_path: Path) -> None:
    shapes = jax.eval_shape(lambda: case.plug)
    with contextlib.closing(Checkpoints(tmp_path)) as kept:
        kept.save(1, case.plug, {"moment": jnp.zeros(1)})
        kept.wait()
        restored = kept.restore_weights(place_abstract(shapes, ONE_DEVICE))
    assert_equal(restored, case.plug)
    assert_equal(learn(restored, case.llm, case.batch), learn(case.plug, case.llm, case.batch))


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("count", [3, 0])
def test_a_feature_has_a_row_of_its_width_for_each_item(name: str, count: int) -> None:
    feature, size = FEATURES[name], 7
    profile = [
        {"title": f"A title {i}", "abstract": "text", "date": f"200{i}"} for i in range(count)
    ]
    assert (feature.of_items is None) != (feature.of_peers is None)
    if feature.of_items:
        # A served text alone has no fields.
        made = [feature.of_items(TASKS["LaMP_5"], items) for items in (profile, [{}] * count)]
    else:
        vectors = np.ones((count, size), np.float32)
        made = [feature.of_peers(vectors, vectors / 2)]
    for rows in made:
        assert (rows.shape, rows.dtype) == ((count, feature.width(size)), np.float32)
        assert np.isfinite(rows).all()
