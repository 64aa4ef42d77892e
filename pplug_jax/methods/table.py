"""The methods that are compared: each shows the same frozen LLM something else of the user.

A new method is an entry here; a variant of `pplug` is one of `config.variants`.
"""

import ast
import dataclasses
import functools
import re
from typing import Any, NamedTuple

from pplug_jax.errors import ConfigError
from pplug_jax.plugs.reading import PAPER, Reading
from pplug_jax.settings import PlugSettings, Settings

Changes = tuple[tuple[str, Any], ...]  # names of settings and their values


@dataclasses.dataclass(frozen=True)
class Method:
    """What the LLM is shown of the user, and how it is changed.

    Attributes:
        name: the method's name.
        about: a few words for tables.
        retrieval: the retriever of the profile items that are shown as demonstrations; None shows
            none.
        top_k: how many are shown; 0 is the config's number.
        answers: show the items' answers alone, behind the input.
        plug: the method whose trained plug this one uses; None uses none.
        history: whose items the plug reads: `own` are the user's, `another` another user's, `none`
            nobody's. What is shown is another user's too for `another`, otherwise the user's.
        reading: how the plug reads them.
        kind: the plug's kind, of `plugs.registry`.
        user_lora: train a LoRA on top of it, on the user's items.
        settings: fields of the config that its training changes.
    """

    name: str
    about: str
    retrieval: str | None = None
    top_k: int = 0
    answers: bool = False
    plug: str | None = None
    history: str = "own"
    reading: Reading = PAPER
    kind: str = "persona"
    user_lora: bool = False
    settings: Changes = ()

    @property
    def trained(self) -> bool:
        """Whether this method trains weights; the others borrow or need none."""
        return self.plug == self.name


PAPER_PLUG = tuple((f"plug.{name}", value) for name, value in vars(PlugSettings()).items())

NO_HISTORY = Reading(uniform=True, history=False)  # no query is needed to weigh nothing

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
        reading=NO_HISTORY,
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
    Method("task_lora", "one LoRA for all users", plug="task_lora", kind="lora"),
    Method(
        "task_lora+retrieval",
        "one LoRA for all users, trained behind demonstrations",
        plug="task_lora+retrieval",
        kind="lora",
        retrieval="bm25",
    ),
    Method(
        "user_lora",
        "task_lora and a LoRA of the user's own, trained on their items (OPPU)",
        plug="task_lora",
        kind="lora",
        user_lora=True,
    ),
)

_LORA_AND_PLUG = (
    Method(
        "task_lora+pplug",
        "one LoRA for all users and pplug, trained together",
        plug="task_lora+pplug",
        kind="lora+persona",
    ),
    Method(
        "task_lora+instruction_only",
        "one LoRA for all users and as many soft tokens, trained without any history",
        plug="task_lora+instruction_only",
        history="none",
        reading=NO_HISTORY,
        kind="lora+persona",
    ),
    Method(
        "task_lora+shuffled_user",
        "task_lora+pplug given another user's history",
        plug="task_lora+pplug",
        history="another",
        kind="lora+persona",
    ),
)

_WITHOUT_ANSWERS = (*_UNTRAINED, *_PAPER, *_CONTROLS, *_LORA, *_LORA_AND_PLUG)


def _with_answers(method: Method) -> Method:
    """Return the method behind what the user wrote on the nearest inputs."""
    return dataclasses.replace(
        method,
        name=f"{method.name}+answers",
        about=f"{method.about}, behind what the user wrote on the nearest inputs",
        plug=f"{method.plug}+answers",
        retrieval="dense",
        answers=True,
    )


_SHOWN_ANSWERS = (
    "pplug",
    "instruction_only",
    "shuffled_user",
    "task_lora",
    "task_lora+pplug",
    "task_lora+instruction_only",
    "task_lora+shuffled_user",
)
_ANSWERS = (
    Method("answers", "what the user wrote on the nearest inputs", retrieval="dense", answers=True),
    *(_with_answers(method) for method in _WITHOUT_ANSWERS if method.name in _SHOWN_ANSWERS),
)

_OTHER = (
    Method(
        "pplug_paper",
        "the paper's plug, where the config's own is another",
        plug="pplug_paper",
        settings=(*PAPER_PLUG, ("train.own_items", 0)),
    ),
)

METHODS = {method.name: method for method in (*_WITHOUT_ANSWERS, *_ANSWERS, *_OTHER)}


class Controls(NamedTuple):
    """The methods that tell whether a plug has learnt the user or only the task, by name.

    Attributes:
        nobody: trains as many soft tokens without any history.
        stranger: gives the plug another user's history.
    """

    nobody: str
    stranger: str


def _controls() -> dict[str, Controls]:
    methods = METHODS.values()
    strangers = {method.plug: method.name for method in methods if method.history == "another"}
    nobodies = {
        (method.kind, method.answers): method.name for method in methods if method.history == "none"
    }
    return {
        method.name: Controls(nobodies[method.kind, method.answers], strangers[method.name])
        for method in methods
        if method.name in strangers
    }


CONTROLS = _controls()  # of the methods that have them


def methods_of(config: Settings) -> dict[str, Method]:
    """Return METHODS and the variants of `pplug` that the config defines.

    Raises:
        ConfigError: `config.variants` is malformed; the message says how.
    """
    return METHODS | {
        name: Method(name, f"pplug with {_in_words(settings)}", plug=name, settings=settings)
        for name, settings in read_variants(config.variants).items()
    }


def asked_for(config: Settings) -> list[Method]:
    """Return the methods that `config.methods` names, in its order.

    Raises:
        ConfigError: `config.variants` is malformed.
    """
    known = methods_of(config)
    return [known[name] for name in config.methods]


def _in_words(settings: Changes) -> str:
    return ", ".join(f"{field} = {value!r}" for field, value in settings)


@functools.lru_cache
def read_variants(text: str) -> dict[str, Changes]:
    """Read `config.variants`, as "{'k16': {'plug.num_persona_tokens': 16}}", as {name: settings}.

    Raises:
        ConfigError: the text is malformed, a name is given twice, or it is another method's.
    """
    try:
        tree = ast.parse(text.strip() or "{}", mode="eval")
        parsed = ast.literal_eval(tree)
        variants = {name: tuple(settings.items()) for name, settings in parsed.items()}
        assert all(isinstance(name, str) and re.fullmatch(r"[\w+-]+", name) for name in variants)
        fields = (field for settings in variants.values() for field, _ in settings)
        assert all(isinstance(field, str) for field in fields)
    except (ValueError, SyntaxError, AttributeError, AssertionError) as error:
        raise ConfigError(
            "config.variants must be names with the settings that they change, as in "
            "\"{'k16': {'plug.num_persona_tokens': 16}}\""
        ) from error
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):  # of equal keys, a dict keeps the last
            names = [ast.unparse(key) for key in node.keys if key]
            if twice := [name for name in names if names.count(name) > 1]:
                raise ConfigError(f"config.variants: {twice[0]} is given twice")
    if taken := sorted(variants.keys() & METHODS.keys()):
        raise ConfigError(f"config.variants: {taken[0]!r} is a method already; take another name")
    return variants


def configured(config: Settings, method: Method, seed: int) -> Settings:
    """Return the config that the method's weights are trained by."""
    settings = dict(methods_of(config)[method.plug].settings) if method.plug else {}
    return config.changed(settings | {"seed": seed})
