"""What a layer's forward pass keeps for its backward pass: one choice for every model."""

from collections.abc import Callable

import jax

KEPT = "kept"  # `checkpoint_name` of what else is kept: a kernel's outputs


def checkpointed(layer: Callable, remat: bool) -> Callable:
    """`layer`, to be scanned over, of which products with weights are kept, or nothing at all.

    What lies between them is made anew: norms, activations, rotations, and attention, whose arrays
    of (B, heads, L, S) would be the largest. That is a sixth more matmul work of attention alone, a
    third where weights are trained; it takes no time that could be measured, and saves two fifths
    of the memory (docs/performance.md).

    remat: keep the layer's input alone.
    """
    policies = jax.checkpoint_policies
    costly = policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(KEPT)
    )
    # In a scan nothing has to keep XLA from merging the two passes.
    return jax.checkpoint(layer, policy=None if remat else costly, prevent_cse=False)
