"""The methods compared: what the same frozen LLM is shown of the user.

A new method is one entry here.
"""

import dataclasses
from typing import Any

import ml_collections

from pplug_jax.plugs.reading import PAPER, Reading


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
    "plug.recency": False,
    "plug.features": (),
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
    _variant("pplug_dropout", "10% of personas are dropped", plug__persona_dropout=0.1),
    _variant("pplug_difference", "what others write on the like", plug__features=("difference",)),
    _variant("pplug_form", "how the user writes, beside what about", plug__features=("form",)),
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
