"""The interface of a plug, which is trained beside the frozen LLM."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
from flax import nnx

from pplug_jax.encoder.bert import Bert
from pplug_jax.feed.batches import Batch
from pplug_jax.llm import LLM
from pplug_jax.plugs.reading import Reading
from pplug_jax.settings import Settings


class Plug(nnx.Module):
    """What a method trains: its trained parameters are `nnx.Param`."""

    def on(self, llm: LLM) -> LLM:
        """Return the LLM as the plug changes it."""
        return llm

    def adapt(
        self, llm: LLM, batch: Batch, reading: Reading, remat: bool
    ) -> tuple[LLM, jax.Array | None]:
        """Return the LLM as the plug changes it, and the plug's soft tokens (B, s, D), if any."""
        raise NotImplementedError

    def trained(self, reading: Reading) -> int:
        """Return how many parameters training changes if the plug reads users so."""
        raise NotImplementedError


class Kind(NamedTuple):
    """A recipe to make plugs of one kind from a config (`methods.table.configured`).

    Attributes:
        build: makes a plug from the config, the LLM's shapes, Enc_inp, the soft tokens' scale and a
            key. Enc_inp is abstract if it is not trained, and None if the plug reads no input.
        reads_input: whether the plug weighs the history by the input, as Enc_inp reads it.
        trains_encoder: returns whether the plug trains an Enc_inp; otherwise the history's encoder
            takes its place.
        soft_tokens: returns how many soft tokens the plug makes of a row.
        features: returns the features of history items that the plug reads.
    """

    build: Callable[[Settings, LLM, Bert | None, jax.Array, jax.Array], Plug]
    reads_input: bool = False
    trains_encoder: Callable[[Settings], bool] = lambda config: False
    soft_tokens: Callable[[Settings, Reading], int] = lambda config, reading: 0
    features: Callable[[Settings], tuple[str, ...]] = lambda config: ()


def parameter_count(module: nnx.Module, kind: type[nnx.Variable] = nnx.Variable) -> int:
    """Count the parameters of a module, or those of one kind."""
    variables = nnx.to_flat_state(nnx.state(module, kind))
    return sum(math.prod(variable.get_value().shape) for _, variable in variables)
