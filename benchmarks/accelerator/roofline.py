"""The planner's bound of a program on this card, to stand beside the time it took."""

import re
from typing import Any

import jax

from benchmarks.cards import find_card
from pplug_jax.plan.chips import Chip, Slice
from pplug_jax.plan.flops import matmul_flops
from pplug_jax.plan.hlo import traffic
from pplug_jax.plan.roofline import Cost

# cuBLAS' scratch space, a second result of every product that it makes and that nothing reads.
WORKSPACE = re.compile(r", s8\[\d+\]\{0\}\) custom-call")


def this_card() -> Slice | None:
    """The first device as the planner's slice of one chip; None where its figures are unknown."""
    device = jax.devices()[0]
    card = find_card(device.device_kind)
    if card is None:
        return None
    chip = Chip(card.flops, card.hbm_gib, card.bandwidth, 0.0, (), "data sheet", {})
    return Slice(device.device_kind, chip, (1,), [device])


def predicted(
    traced: jax.stages.Traced, compiled: jax.stages.Compiled, while_trips: int | None = None
) -> dict[str, Any]:
    """FLOPs, HBM bytes and memory of a program, and what bounds it for how many seconds.

    while_trips: how often a decoding loop runs.
    """
    memory = compiled.memory_analysis()
    found: dict[str, Any] = {
        "flops": matmul_flops(traced.jaxpr, while_trips or 0),
        "memory_bytes": memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
    }
    try:
        cost = Cost(
            found["flops"], traffic(WORKSPACE.sub(") custom-call", compiled.as_text()), while_trips)
        )
    except (ValueError, LookupError, AttributeError, TypeError) as error:  # it knows TPUs' best
        return found | {"bound_error": f"{type(error).__name__}: {error}"}
    found["hbm_bytes"] = cost.moved.hbm
    where = this_card()
    if where is None:
        return found
    return found | {"bound_seconds": cost.seconds(where), "bound_by": cost.bound_by(where)}
