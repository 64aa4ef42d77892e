"""The methods compared: what the same frozen LLM is shown of the user.

A new method is one entry here.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pplug_jax.embedder import PAPER, Reading
from pplug_jax.llm import LLM


@dataclasses.dataclass(frozen=True)
class Method:
    """What the LLM is shown of the user.

    retrieval: the profile items shown as demonstrations. plug: the trained plug whose soft tokens
    stand in front. history: whose items the plug reads: the user's `own`, `another` user's, or
    `none`. reading: how it reads them.
    """

    name: str
    about: str
    retrieval: str | None = None
    plug: str | None = None
    history: str = "own"
    reading: Reading = PAPER

    @property
    def trained(self) -> bool:
        """Whether this method has a plug of its own to train; the others borrow or need none."""
        return self.plug == self.name


METHODS = {
    method.name: method
    for method in (
        Method("none", "the input alone"),
        Method("bm25", "the user's nearest items as demonstrations", retrieval="bm25"),
        Method("random", "any of the user's items as demonstrations", retrieval="random"),
        Method("dense", "the items that the encoder finds nearest", retrieval="dense"),
        Method("recency", "the user's newest items as demonstrations", retrieval="recency"),
        Method("pplug", "the persona of the whole history", plug="pplug"),
        Method(
            "instruction_only",
            "as many soft tokens, trained without any history",
            plug="instruction_only",
            history="none",
        ),
        Method(
            "shuffled_user", "pplug given another user's history", plug="pplug", history="another"
        ),
        Method(
            "mean_persona",
            "pplug with all items weighed alike",
            plug="pplug",
            reading=Reading(uniform=True),
        ),
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
    )
}


def histories(method: Method, own: Sequence[np.ndarray], seed: int) -> list[np.ndarray]:
    """The history that the plug reads for each example, as rows of the history store.

    own: (n,) int rows of each example's own history.
    """
    if method.history == "none":
        return [rows[:0] for rows in own]
    if method.history == "own":
        return list(own)
    # A random cycle over the examples gives everyone another's history. One user may have several
    # examples, with histories of different times, and the files may not say whose they are: so the
    # cycle is walked on to the next history that has no text in common.
    cycle = np.random.default_rng(seed).permutation(len(own))
    place = {example: i for i, example in enumerate(cycle)}
    result = []
    for i in range(len(own)):
        others = (own[cycle[(place[i] + step) % len(own)]] for step in range(1, len(own)))
        strange = (rows for rows in others if len(rows) and not np.isin(rows, own[i]).any())
        result.append(next(strange, own[i][:0]))
    return result


def inputs_embeds(
    llm: LLM, soft: jax.Array | None, prompt: jax.Array, mask: jax.Array, prefix_length: int
) -> tuple[jax.Array, jax.Array]:
    """The prompt as embeddings, the soft tokens behind its first `prefix_length` tokens.

    Args:
        soft: (B, k + 1, D), or None for no soft tokens. prompt, mask: (B, L) int32 and bool.

    Returns:
        (B, k + 1 + L, D) and its mask (B, k + 1 + L).
    """
    embeds = llm.embed(prompt)
    if soft is None:
        return embeds, mask
    soft = soft.astype(embeds.dtype)
    there = jnp.ones(soft.shape[:2], bool)
    return (
        jnp.concatenate([embeds[:, :prefix_length], soft, embeds[:, prefix_length:]], axis=1),
        jnp.concatenate([mask[:, :prefix_length], there, mask[:, prefix_length:]], axis=1),
    )
