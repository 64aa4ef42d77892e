"""What comparisons, with transformers or of two ways of ours, share."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers


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


def save_random(model: transformers.PreTrainedModel, path: Path) -> None:
    """Saves `model` with noise on every tensor, for norms and biases start as all ones or zeros."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(path)


def joined(
    prompt: np.ndarray, prompt_mask: np.ndarray, target: np.ndarray, target_mask: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`Batch.text` and its mask: each row's own tokens, but for its target's last, side by side."""
    text = np.zeros((len(prompt), prompt.shape[1] + target.shape[1] - 1), np.int32)
    mask = np.zeros(text.shape, bool)
    for row in range(len(text)):
        ids = [*prompt[row, prompt_mask[row]], *target[row, target_mask[row]][:-1]]
        text[row, : len(ids)], mask[row, : len(ids)] = ids, True
    return text, mask
