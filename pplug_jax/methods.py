"""The methods compared: what the same frozen LLM is shown of the user.

A new method is one entry here.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from pplug_jax.data.batches import Batch
from pplug_jax.embedder import PAPER, Reading, UserEmbedder
from pplug_jax.llm import LLM
from pplug_jax.llm.lora import Lora
from pplug_jax.llm.loss import cross_entropy

Weights = UserEmbedder | Lora  # what is trained


@dataclasses.dataclass(frozen=True)
class Method:
    """What the LLM is shown of the user, and how it is changed.

    retrieval: the profile items shown as demonstrations; top_k: how many, 0 is the config's.
    plug: the trained plug whose soft tokens stand in front. history: whose items it reads: the
    user's `own`, `another` user's, or `none`. reading: how it reads them.
    lora: the trained low-rank update of the LLM. user_lora: another one on top, trained on the
    user's own items.
    settings: fields of the config that its training sets otherwise.
    """

    name: str
    about: str
    retrieval: str | None = None
    top_k: int = 0
    plug: str | None = None
    history: str = "own"
    reading: Reading = PAPER
    lora: str | None = None
    user_lora: bool = False
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def weights(self) -> str | None:
        """The method whose trained weights this one uses."""
        return self.plug or self.lora

    @property
    def trained(self) -> bool:
        """Whether this method has weights of its own to train; the others borrow or need none."""
        return self.weights == self.name


# The plug of the paper, and its history dropout in the official code's data.
PAPER_PLUG = {
    "plug.history_dropout": 0.5,
    "plug.persona_dropout": 0.0,
    "plug.num_persona_tokens": 1,
    "plug.projector_size": 0,
    "plug.temperature": 1.0,
    "plug.learned_temperature": False,
    "plug.heads": 0,
    "plug.recency": False,
    "plug.difference": False,
    "plug.form": False,
    "plug.encoder_rate": 1.0,
}


def _variant(name: str, about: str, **settings: Any) -> Method:
    """pplug, trained with other settings."""
    fields = tuple((field.replace("__", "."), value) for field, value in settings.items())
    return Method(name, about, plug=name, settings=fields)


_UNTRAINED = (
    Method("none", "the input alone"),
    Method("random", "any of the user's items as demonstrations", retrieval="random"),
    Method("recency", "the user's newest items as demonstrations", retrieval="recency"),
    Method("bm25", "the user's nearest items as demonstrations", retrieval="bm25"),
    Method("dense", "the items that the encoder finds nearest", retrieval="dense"),
)

_PAPER = (
    Method("pplug", "the persona of the whole history", plug="pplug"),
    Method(
        "pplug_no_instruction",
        "trained without the instruction embedding",
        plug="pplug_no_instruction",
        reading=Reading(instruction=False),
    ),
    Method(
        "pplug_mean",
        "trained with all items weighed alike",
        plug="pplug_mean",
        reading=Reading(uniform=True),
    ),
    Method(
        "pplug_top4",
        "trained with the 4 items nearest to the input",
        plug="pplug_top4",
        reading=Reading(top=4),
    ),
    Method(
        "pplug+retrieval",
        "trained behind the user's nearest item as a demonstration",
        plug="pplug+retrieval",
        retrieval="bm25",
        top_k=1,
    ),
)

_CONTROLS = (
    Method(
        "instruction_only",
        "as many soft tokens, trained without any history",
        plug="instruction_only",
        history="none",
        reading=Reading(uniform=True),  # no query is needed to weigh nothing
    ),
    Method("shuffled_user", "pplug given another user's history", plug="pplug", history="another"),
    Method(
        "mean_persona",
        "pplug with all items weighed alike",
        plug="pplug",
        reading=Reading(uniform=True),
    ),
)

_LORA = (
    Method("task_lora", "one LoRA for all users", lora="task_lora"),
    Method(
        "task_lora+retrieval",
        "one LoRA for all users, trained behind demonstrations",
        lora="task_lora+retrieval",
        retrieval="bm25",
    ),
    Method(
        "user_lora",
        "task_lora and a LoRA of the user's own, trained on their items (OPPU)",
        lora="task_lora",
        user_lora=True,
    ),
)

# The config's plug, by default the paper's, with one thing changed each.
_ADDED = (
    _variant("pplug_cold", "a fixed temperature of 0.1", plug__temperature=0.1),
    _variant(
        "pplug_learned_temperature",
        "a learned temperature, from 0.3 on",
        plug__temperature=0.3,
        plug__learned_temperature=True,
    ),
    _variant("pplug_tokens", "4 persona tokens", plug__num_persona_tokens=4),
    _variant("pplug_heads", "4 heads with learned query and key maps", plug__heads=4),
    _variant("pplug_dropout", "10% of personas are dropped", plug__persona_dropout=0.1),
    _variant("pplug_difference", "what others write on the like", plug__difference=True),
    _variant("pplug_form", "how the user writes, beside what about", plug__form=True),
    _variant("pplug_recency", "a learned preference for the newest items", plug__recency=True),
    _variant("pplug_frozen", "the input encoder stays as it was", plug__encoder_rate=0.0),
    _variant("pplug_own_items", "trained on history items too", train__own_items=2),
    # The other way round, for a config whose own plug is another.
    Method(
        "pplug_paper",
        "the paper's plug",
        plug="pplug_paper",
        settings=(*PAPER_PLUG.items(), ("train.own_items", 0)),
    ),
)

METHODS = {method.name: method for method in (*_UNTRAINED, *_PAPER, *_CONTROLS, *_LORA, *_ADDED)}


def configured(
    config: ml_collections.ConfigDict, method: Method, seed: int
) -> ml_collections.ConfigDict:
    """The config that the method's weights are trained by."""
    config = config.copy_and_resolve_references().unlock()
    if method.weights:
        config.update_from_flattened_dict(dict(METHODS[method.weights].settings))
    config.seed = seed
    return config


def strangers(own: Sequence[np.ndarray], seed: int) -> list[int | None]:
    """For each example another one, whose history has no text in common with its own, if any.

    own: (n,) int rows of each example's own history in the history store.
    """
    # A random cycle over the examples gives everyone another's history. One user may have several
    # examples, with histories of different times, and the files may not say whose they are: so the
    # cycle is walked on to the next history that has no text in common.
    cycle = np.random.default_rng(seed).permutation(len(own))
    place = {example: i for i, example in enumerate(cycle)}
    found = []
    for i in range(len(own)):
        others = (int(cycle[(place[i] + step) % len(own)]) for step in range(1, len(own)))
        strange = (j for j in others if len(own[j]) and not np.isin(own[j], own[i]).any())
        found.append(next(strange, None))
    return found


def adapt(
    weights: Weights | None, llm: LLM, batch: Batch, reading: Reading = PAPER, remat: bool = False
) -> tuple[LLM, jax.Array | None]:
    """The LLM as the weights change it, and the soft tokens that they make for `batch`."""
    if isinstance(weights, UserEmbedder):
        return llm, weights(*batch.plug_inputs, reading=reading, remat=remat)
    return (llm, None) if weights is None else (weights.on(llm), None)


def inputs_embeds(
    llm: LLM, soft: jax.Array | None, text: jax.Array, mask: jax.Array, prefix_length: int
) -> tuple[jax.Array, jax.Array]:
    """A prompt or text as embeddings, the soft tokens behind its first `prefix_length` tokens.

    Args:
        soft: (B, k + 1, D), or None for no soft tokens. text, mask: (B, L) int32 and bool.

    Returns:
        (B, k + 1 + L, D) and its mask (B, k + 1 + L).
    """
    embeds = llm.embed(text)
    if soft is None:
        return embeds, mask
    soft = soft.astype(embeds.dtype)
    there = jnp.ones(soft.shape[:2], bool)
    return (
        jnp.concatenate([embeds[:, :prefix_length], soft, embeds[:, prefix_length:]], axis=1),
        jnp.concatenate([mask[:, :prefix_length], there, mask[:, prefix_length:]], axis=1),
    )


def token_losses(
    weights: Weights | None,
    llm: LLM,
    batch: Batch,
    prefix_length: int,
    remat: bool = False,
    reading: Reading = PAPER,
) -> jax.Array:
    """-log p(y_t | I, P, x, y_<t) of the target's tokens, (B, T) float32, 0 at padding."""
    llm, soft = adapt(weights, llm, batch, reading, remat)
    embeds, mask = inputs_embeds(llm, soft, batch.text, batch.text_mask, prefix_length)
    hidden = llm.target_hidden(embeds, mask, batch.target, batch.target_mask, remat)
    return cross_entropy(llm, hidden, batch.target) * batch.target_mask
