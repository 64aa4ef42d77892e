"""Programs compiled in the background."""

import threading

import jax
import jax.numpy as jnp
import pytest

from pplug_jax.runtime.ahead import compiled_ahead

double = jax.jit(lambda x: 2 * x)


def lower(size: int) -> jax.stages.Lowered:
    return double.lower(jax.ShapeDtypeStruct((size,), jnp.float32))


def test_each_key_has_its_program() -> None:
    with compiled_ahead(lower, [1, 3]) as compiled:
        for size in (3, 1):
            assert compiled(size)(jnp.ones(size)).tolist() == [2.0] * size
        with pytest.raises(TypeError):
            compiled(3)(jnp.ones(1))


def test_what_fails_says_so_where_it_is_asked_for() -> None:
    def fail(size: int) -> jax.stages.Lowered:
        if size == 2:
            raise ValueError("size 2")
        return lower(size)

    with compiled_ahead(fail, [2, 3]) as compiled:
        assert compiled(3)(jnp.ones(3)).tolist() == [2.0] * 3
        with pytest.raises(ValueError, match="size 2"):
            compiled(2)


def test_what_has_not_begun_when_the_context_ends_never_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1)  # one compiler at a time
    begun, busy, ended = [], threading.Event(), threading.Event()

    def note(size: int) -> jax.stages.Lowered:
        begun.append(size)
        if size == 2:
            busy.set()
            assert ended.wait(60)
        return lower(size)

    with compiled_ahead(note, [1, 2, 3]) as compiled:
        compiled(1)
        assert busy.wait(60)
    ended.set()
    for thread in threading.enumerate():
        if thread.name.startswith("ThreadPoolExecutor"):
            thread.join(60)
    assert begun == [1, 2]
