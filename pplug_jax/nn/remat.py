"""Choose what a layer's forward pass keeps for its backward pass, once for every model."""

from collections.abc import Callable

import jax

KEPT = "kept"  # `checkpoint_name` of what else is kept: a kernel's outputs


def checkpointed(layer: Callable, remat: bool) -> Callable:
    """Return `layer`, to be scanned over, so that it keeps only its products with weights, or
    nothing.

    Norms, activations, rotations and attention are computed again. Attention's arrays of (B, heads,
    L, S) would be the largest. This is a sixth more matmul work of attention alone, a third where
    weights are trained. It takes no time that could be measured, and saves two fifths of the memory
    (docs/notes/speed.md).

    Args:
        layer: the layer's function.
        remat: keep only the layer's input.
    """
    policies = jax.checkpoint_policies
    costly = policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(KEPT)
    )
    # In a scan nothing has to keep XLA from merging the two passes.
    return jax.checkpoint(layer, policy=None if remat else costly, prevent_cse=False)
