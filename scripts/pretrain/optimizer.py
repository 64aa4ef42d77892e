"""The optimiser that makes models from nothing: Muon for kernels, Adam for the rest."""

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon


def kernels(params: optax.Params) -> optax.Params:
    """Marks the stacked kernels (layers, in, out), which Muon updates; None for the others."""
    return jax.tree.map(lambda x: MuonDimensionNumbers(1, 2) if x.ndim == 3 else None, params)


def make_optimizer(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """`learning_rate` is Adam's; Muon's is 5 times that.

    Both warm up over 2% of the steps and fall linearly.
    """

    def schedule(peak: float) -> optax.Schedule:
        warmup = max(1, steps // 50)
        return optax.join_schedules(
            [
                optax.linear_schedule(0, peak, warmup),
                optax.linear_schedule(peak, peak / 50, steps - warmup),
            ],
            [warmup],
        )

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(
            schedule(5 * learning_rate),
            adam_learning_rate=schedule(learning_rate),
            adam_b2=0.98,
            muon_weight_dimension_numbers=kernels,
        ),
    )
