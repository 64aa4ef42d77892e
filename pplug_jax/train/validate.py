"""The loss on examples that nothing is trained on."""

from collections.abc import Sequence

import jax
import numpy as np

from pplug_jax.feed.batches import Tokenized, place_batch, plan_batches
from pplug_jax.methods.table import Method
from pplug_jax.plugs.forward import Weights
from pplug_jax.session import Models
from pplug_jax.session.inputs import assembler, place_of
from pplug_jax.settings import Settings
from pplug_jax.train.step import loss_fn


def validation_loss(
    models: Models,
    method: Method,
    config: Settings,
    weights: Weights,
    tokenized: Sequence[Tokenized],
    keeps_prompts: bool = False,
) -> float:
    """Return the mean loss per target token, without dropout."""
    size = config.train.batch_size
    assemble = assembler(models, method, config, tokenized, size)
    loss = jax.jit(loss_fn, static_argnames=("place", "reading"))
    place = place_of(models, method, config)
    total = np.zeros(2)
    for bucket, indices in plan_batches(np.arange(len(tokenized)), assemble.buckets.of, size):
        with jax.set_mesh(models.mesh):
            batch = place_batch(assemble((0, bucket, indices)), models.mesh)
            if keeps_prompts:
                batch = models.prompts.read(models.llm, batch)
            sums = loss(weights, models.llm, batch, place=place, reading=method.reading)
        total += np.array(sums)
    return float(total[0] / total[1])
