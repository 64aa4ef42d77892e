"""A LoRA for each user, trained on the user's items (OPPU, arXiv 2402.04401)."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from pplug_jax.feed.batches import Assemble, Batch, Tokenized, place_batch
from pplug_jax.llm import LLM
from pplug_jax.llm.prompts import Place
from pplug_jax.plugs.forward import token_losses
from pplug_jax.plugs.lora import Lora
from pplug_jax.runtime.mesh import local_rows, place
from pplug_jax.session import Models
from pplug_jax.session.inputs import buckets_of
from pplug_jax.settings import Settings


@functools.partial(
    jax.jit, static_argnames=("learning_rate", "place"), donate_argnames=("lora", "state")
)
def _step(
    lora: Lora,
    state: optax.OptState,
    llm: LLM,
    batch: Batch,
    *,
    learning_rate: float,
    place: Place,
) -> tuple[Lora, optax.OptState]:
    """Update every row's LoRA once on that row's example; rows of weight 0 stay as they are."""

    def loss(lora: Lora) -> jax.Array:
        # The rows' sum: each LoRA gets the gradient of its own row's mean alone.
        tokens = jnp.maximum(jnp.sum(batch.target_mask, axis=1), 1)
        losses = token_losses(lora, llm, batch, place)
        return jnp.sum(jnp.sum(losses, axis=1) / tokens)

    updates, state = optax.adam(learning_rate).update(jax.grad(loss)(lora), state, lora)
    active = batch.weight[None, :, None, None]  # the parameters are (layers, users, ..)
    return optax.apply_updates(lora, jax.tree.map(lambda u: u * active, updates)), state


def fit_user_loras(
    models: Models,
    llm: LLM,
    config: Settings,
    items: Sequence[Tokenized],
    users: Sequence[Sequence[int]],
) -> Lora:
    """Train a LoRA for each user, all at once, one row of the batch each.

    A user without items keeps `llm`.

    Args:
        models: the run's models.
        llm: what the LoRAs are added to; it includes the task's LoRA.
        config: the method's config; `config.lora.user_epochs` says how often items are trained on.
        items: all users' items as examples.
        users: each user's places in `items`.
    """
    count, settings = len(users), config.lora
    lora = place(Lora(llm, settings, count, rngs=nnx.Rngs(config.seed)), models.mesh)
    if not any(map(len, users)):
        return lora
    state = optax.adam(settings.user_learning_rate).init(lora)
    rows = local_rows(models.mesh, count)
    assemble = Assemble(items, buckets_of(models, items, 1), models.store, rows)
    orders = []
    for places in users:
        rng = np.random.default_rng((config.seed, *places[:1]))
        epochs = [rng.permutation(places) for _ in range(settings.user_epochs)]
        orders.append(np.concatenate(epochs).astype(int))
    for step in range(max(map(len, orders))):
        # Who has no item left gets any one, and weight 0.
        left = np.array([step < len(order) for order in orders])
        indices = [order[step] if step < len(order) else 0 for order in orders]
        batch = assemble((0, 0, np.array(indices)))
        batch = batch._replace(weight=left.astype(np.float32)[rows])
        with jax.set_mesh(models.mesh):
            lora, state = _step(
                lora,
                state,
                llm,
                place_batch(batch, models.mesh),
                learning_rate=settings.user_learning_rate,
                place=models.tokenizer.place(behind=False),
            )
    return place(lora, models.mesh)  # the compiler may have put some elsewhere


class UserLoras:
    """Each user's own LoRA, trained when a batch of users is answered.

    Args:
        models: the run's models.
        config: the method's config (`table.configured`).
        task_lora: what all users share.
        user_items: each user's history items as examples.

    Attributes:
        llm: the LLM with the task's LoRA.
        shapes: the same, to compile for.
        order: the users, those of as many items together: the training of a batch is as long as its
            longest user's.
    """

    def __init__(
        self,
        models: Models,
        config: Settings,
        task_lora: Lora,
        user_items: Sequence[Sequence[Tokenized]],
    ):
        self.models, self.config = models, config
        self.llm = self.shapes = task_lora.on(models.llm)
        self.items = [item for items in user_items for item in items]
        counts = [len(items) for items in user_items]
        self.users = [
            range(end - count, end) for count, end in zip(counts, np.cumsum(counts), strict=True)
        ]
        self.order = np.argsort(counts, kind="stable")

    def of(self, indices: Sequence[int]) -> Lora:
        """Train the LoRAs of these users, a row of the evaluation's batch each."""
        nobody = [range(0)] * (self.config.eval.batch_size - len(indices))
        users = [self.users[i] for i in indices] + nobody
        return fit_user_loras(self.models, self.llm, self.config, self.items, users)
