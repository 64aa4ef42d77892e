"""What comparisons, with transformers or of two ways of ours, share."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import pytest

if TYPE_CHECKING:
    import transformers

if importlib.util.find_spec("torch"):
    import torch
else:
    torch = None

needs_torch = pytest.mark.skipif(torch is None, reason="PyTorch is not installed")


def assert_close(ours: jax.Array, theirs: np.ndarray, tolerance: float = 1e-4) -> None:
    """The largest difference, relative to the scale of the values."""
    assert ours.shape == theirs.shape
    error = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
    assert error <= tolerance, error


def with_gradients(f: Callable[..., jax.Array], *arrays: jax.Array) -> list[jax.Array]:
    """What `f` gives, and the gradients of a function of it, one for each array."""

    def total(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = f(*arrays)
        return jnp.sum(h * jnp.cos(h)), h

    wrt = tuple(range(len(arrays)))
    grads, h = jax.jit(jax.grad(total, argnums=wrt, has_aux=True))(*arrays)
    return [h, *grads]


def save_random(model: "transformers.PreTrainedModel", path: Path) -> None:
    """Saves `model` with noise on every tensor, for norms and biases start as all ones or zeros."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(path)
