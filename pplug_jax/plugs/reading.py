"""How a plug reads a user, and how many soft tokens it makes."""

from typing import NamedTuple

from pplug_jax.settings import PlugSettings


class Reading(NamedTuple):
    """The way a plug reads a user; the defaults are the paper's method, the others its ablations.

    Attributes:
        uniform: weigh all items alike instead of by the input.
        top: read only so many items, those nearest to the input; 0 reads all.
        instruction: put I in front of P.
        history: whether there is a history to read; otherwise all users have the null persona.
    """

    uniform: bool = False
    top: int = 0
    instruction: bool = True
    history: bool = True


PAPER = Reading()


def features_of(plug: PlugSettings) -> tuple[str, ...]:
    """Return the features of the items that a plug with these settings reads."""
    return (*(["age"] if plug.recency else []), *plug.features)


def soft_tokens(plug: PlugSettings, reading: Reading = PAPER) -> int:
    """Count the soft tokens of a plug with these settings: I, P, and as many as P a feature."""
    return reading.instruction + plug.num_persona_tokens * (1 + len(plug.features))
