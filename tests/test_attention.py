"""Attention a part of the queries at a time against attention of all at once."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pplug_jax.nn import attention
from pplug_jax.runtime.mesh import make_mesh
from tests.support.parity import with_gradients

pytestmark = pytest.mark.slow

B, L, S, HEADS, KV_HEADS, D = 8, 150, 170, 4, 2, 16


def draw(*shape: int, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(len(shape) + shape[1]).normal(size=shape), dtype)


def outputs(query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array | None, **settings):
    """What `attend` gives, and the gradients of a function of it."""
    arrays = (query, key, value) if bias is None else (query, key, value, bias)
    return with_gradients(
        lambda query, key, value, bias=None: attention.attend(
            query, key, value, bias=bias, **settings
        ),
        *arrays,
    )


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how many bytes of scores are made at a time."""
    monkeypatch.setattr(attention, "FEWEST_QUERIES", 16)
    return functools.partial(monkeypatch.setattr, attention, "SCORES_BYTES")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("rows", [None, 1, B])
@pytest.mark.parametrize("queries", [1, L])
def test_parts_change_nothing(
    in_parts: Callable[[int], None], queries: int, rows: int | None, cap: float | None, dtype: str
) -> None:
    arrays = [draw(B, n, h, D, dtype=dtype) for n, h in ((L, HEADS), (S, KV_HEADS), (S, KV_HEADS))]
    bias = None if rows is None else draw(rows, HEADS, L, S)
    mask = draw(B, queries, S) > -0.5
    at_once = outputs(*arrays, bias, mask=mask, cap=cap)
    in_parts(4 * B * HEADS * S * 40)  # four parts of 38 queries, the last padded
    tolerance = {"float32": 1e-5, "bfloat16": 0.03}[dtype]
    in_four = outputs(*arrays, bias, mask=mask, cap=cap)
    for whole, parts in zip(*map(jax.tree.leaves, (at_once, in_four)), strict=True):
        assert whole.dtype == parts.dtype
        np.testing.assert_allclose(
            np.float32(parts), np.float32(whole), rtol=tolerance, atol=tolerance
        )


def test_a_part_is_what_fits_a_device(in_parts: Callable[[int], None]) -> None:
    arrays = draw(B, L, HEADS, D), draw(B, S, KV_HEADS, D), draw(B, S, KV_HEADS, D)
    mask = jnp.ones((B, 1, S), bool)
    in_parts(4 * B * HEADS * S * 40)

    for devices, queries in ((1, 38), (2, 75), (8, L)):
        with jax.set_mesh(make_mesh(devices, 1, 1, jax.devices()[:devices])):
            program = str(jax.make_jaxpr(lambda *x: attention.attend(*x, mask))(*arrays))
        for n in (38, 75, L):
            assert (f"f32[{B},{HEADS},{n},{S}]" in program) == (n == queries)


def test_parts_on_a_mesh(in_parts: Callable[[int], None]) -> None:
    arrays = draw(B, L, HEADS, D), draw(B, S, KV_HEADS, D), draw(B, S, KV_HEADS, D)
    mask = draw(B, L, S) > -0.5
    at_once = outputs(*arrays, None, mask=mask)
    in_parts(4 * HEADS * S * 40)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        parts = outputs(*arrays, None, mask=mask)
    for one, many in zip(*map(jax.tree.leaves, (at_once, parts)), strict=True):
        np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-5)
