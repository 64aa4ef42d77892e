"""Our training step, as the benchmarks time it."""

from typing import Any

import jax
import numpy as np

from benchmarks.original import SOFT, Planned
from pplug_jax.feed.batches import Assemble, Batch, place_batch
from pplug_jax.llm.decoder import Decoder
from pplug_jax.llm.prompts import Front, Place
from pplug_jax.plan.flops import matmul_flops
from pplug_jax.plugs.persona import UserEmbedder
from pplug_jax.plugs.reading import PAPER, Reading
from pplug_jax.session import Models
from pplug_jax.train.step import init_optimizer, jit_step, loss_fn, make_optimizer

forward = jax.jit(loss_fn, static_argnames="place")


class Ours:
    """Our step, as `Trainer.fit` runs it."""

    def __init__(self, models: Models, data: Assemble, weights: UserEmbedder, place: Place):
        self.models, self.data, self.weights = models, data, weights
        train = models.config.train
        # So many steps, and so few of them to warm up, that the rate stays the same.
        optimizer = make_optimizer(
            10**6, train.learning_rate, train.weight_decay, 0.0, train.clip_norm
        )
        self.state = init_optimizer(optimizer, weights, models.mesh)
        self.update = jit_step(weights, self.state)
        self.static = {"optimizer": optimizer, "place": place}

    def batch(self, planned: Planned) -> Batch:
        return self.data(planned)

    def arguments(self, planned: Planned) -> tuple[Any, ...]:
        batch = place_batch(self.batch(planned), self.models.mesh)
        return self.weights, self.state, self.models.llm, batch

    def step(self, planned: Planned, reading: Reading = PAPER) -> float:
        """One update; returns the loss before it."""
        with jax.set_mesh(self.models.mesh):
            arguments = self.arguments(planned)
            self.weights, self.state, metrics = self.update(
                *arguments, **self.static, reading=reading
            )
        return float(metrics["loss"])

    def loss(self, planned: Planned) -> float:
        """The same without gradients and update."""
        with jax.set_mesh(self.models.mesh):
            weights, _, llm, batch = self.arguments(planned)
            total, tokens = forward(weights, llm, batch, self.static["place"])
        return float(total / tokens)

    def flops(self, planned: Planned) -> float:
        with jax.set_mesh(self.models.mesh):
            return matmul_flops(self.update.trace(*self.arguments(planned), **self.static).jaxpr)

    def ideal_flops(self, planned: Planned) -> float:
        """What a step on these shapes needs: no work twice, no gradient of a frozen weight.

        A frozen kernel costs 4 FLOPs a parameter and place (forward, and its input's gradient), a
        trained one 6, attention 12 a channel and pair of places, masked pairs too.
        """
        llm, plug, batch = self.models.llm, self.weights, self.batch(planned)
        B, S = batch.text.shape
        T, Q, H = (x.shape[1] for x in (batch.target, batch.query, batch.history))
        behind = self._behind(T)

        def kernels(module: Any) -> int:
            return sum(x.size for x in jax.tree.leaves(module) if x.ndim == 3)

        c = llm.config
        heads, head = c.num_heads * c.head_dim, c.vocab_size * c.hidden_size
        if behind:  # the prompt alone is read forward, and has no gradient
            flops = (2 * S + 4 * behind) * kernels(llm.layers)
            pairs = 4 * S**2 + 8 * behind * (S + behind) + 4 * behind**2
            flops += pairs * heads * c.num_layers
        elif isinstance(llm, Decoder):
            S += SOFT
            flops = 4 * S * kernels(llm.layers) + 12 * S**2 * heads * c.num_layers
        else:
            S += SOFT
            cross = kernels((llm.decoder.cross.key, llm.decoder.cross.value))
            flops = 4 * (S * (kernels(llm.encoder) + cross) + T * (kernels(llm.decoder) - cross))
            flops += 12 * S**2 * heads * c.num_encoder_layers
            flops += 12 * (T**2 + T * S) * heads * c.num_decoder_layers
        bert = plug.input_encoder
        E, (U, D) = batch.history.shape[2], plug.projector.down.shape
        flops += 4 * T * head
        if bert is not None:
            flops += 6 * Q * kernels(bert.layers) + 12 * Q**2 * E * bert.config.num_layers
        # The histories are frozen: their first layer and the scores have no gradient of them.
        flops += 4 * H * E * U + 4 * H * E + 6 * H * U + 6 * U * D
        return B * flops + 6 * (E + D) * D  # the instruction embedding is one for all rows

    def _behind(self, targets: int) -> int:
        """Places of the LLM behind the prompt, 0 where they are no others than the prompt's."""
        place = self.static["place"]
        if isinstance(place, Front):
            return 0
        return SOFT + len(place.suffix) + targets - 1

    def places(self, planned: Planned) -> np.ndarray:
        """A batch's places of LLM, query and history, padding included; (3,)."""
        batch = self.batch(planned)
        text = batch.text.size
        if behind := self._behind(batch.target.shape[1]):
            text += behind * len(batch.text)
        else:
            text += SOFT * len(batch.text)
            text += 0 if self.models.llm.decoder_only else batch.target.size
        query = 0 if self.weights.input_encoder is None else batch.query.size
        return np.array([text, query, batch.history_mask.size])
