"""How a plug reads a user, and how many soft tokens it makes of that."""

from typing import NamedTuple

import ml_collections


class Reading(NamedTuple):
    """How a plug reads a user; the defaults are the paper's method, the others its ablations.

    uniform: weigh all items alike instead of by the input. top: only that many items, those
    nearest to the input; 0 is all. instruction: whether I stands in front of P. history: whether
    there is any to read; where there is none all users have the null persona.
    """

    uniform: bool = False
    top: int = 0
    instruction: bool = True
    history: bool = True


PAPER = Reading()


def features_of(plug: ml_collections.ConfigDict) -> tuple[str, ...]:
    """The features of the items that a plug of these settings reads."""
    return (*(["age"] if plug.recency else []), *plug.features)


def soft_tokens(plug: ml_collections.ConfigDict, reading: Reading = PAPER) -> int:
    """How many soft tokens a plug of these settings makes: I, P, and as many as P a feature."""
    return reading.instruction + plug.num_persona_tokens * (1 + len(plug.features))
