"""Count the FLOPs of a traced function, from its jaxpr.

XLA's own count, `cost_analysis()`, takes a loop's body once, however often it runs.
"""

import math
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn


def matmul_flops(jaxpr: Jaxpr | ClosedJaxpr, while_trips: int = 1) -> float:
    """Return 2 x multiplications in all matrix products, on all devices together.

    Elementwise work is left out: the matrix unit's peak does not bound it.

    Args:
        jaxpr: the traced function.
        while_trips: how often the body of a `while_loop` runs, if the jaxpr does not say.
    """
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    return sum(_flops(eqn, while_trips) for eqn in jaxpr.eqns)


def shape_of(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _flops(eqn: JaxprEqn, while_trips: int) -> float:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        inner = math.prod(shape_of(eqn.invars[0])[i] for i in contracted)
        return 2.0 * inner * math.prod(shape_of(eqn.outvars[0]))
    inside = [
        matmul_flops(value, while_trips)
        for param in params.values()
        for value in (param if isinstance(param, tuple | list) else (param,))
        if isinstance(value, Jaxpr | ClosedJaxpr)
    ]
    if name == "cond":
        return max(inside)
    if name == "scan":
        times = params["length"]
    elif name == "while":
        times = while_trips
    elif name == "shard_map":  # its inside is one device's
        times = params["mesh"].size
    elif name == "pallas_call":
        times = math.prod(params["grid_mapping"].grid)
    else:
        times = 1
    return times * sum(inside)
