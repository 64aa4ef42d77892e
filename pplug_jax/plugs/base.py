"""What every plug, a thing that is trained beside the frozen LLM, can do."""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import ml_collections
from flax import nnx

from pplug_jax.encoder.bert import Bert
from pplug_jax.feed.batches import Batch
from pplug_jax.llm import LLM
from pplug_jax.plugs.reading import Reading


class Plug(Protocol):
    """An `nnx.Module`; its parameters are `nnx.Param`."""

    def adapt(
        self, llm: LLM, batch: Batch, reading: Reading, remat: bool
    ) -> tuple[LLM, jax.Array | None]:
        """Return the LLM as the plug changes it, and the soft tokens (B, s, D) that it makes."""

    def trained(self, reading: Reading) -> int:
        """Return how many parameters training changes, read so."""


class Kind(NamedTuple):
    """How the plugs of a kind are made from a config, `methods.configured`.

    build: (config, the LLM's shapes, Enc_inp, the soft tokens' scale, key) -> the plug. Enc_inp is
        abstract where it is not trained, and None where no input is read.
    reads_input: it weighs the history by the input, as Enc_inp reads that.
    trains_encoder: it has an Enc_inp of its own. Otherwise the history's encoder takes its place.
    soft_tokens: how many it makes of a row.
    features: those of the history's items that it reads.
    """

    build: Callable[[ml_collections.ConfigDict, LLM, Bert | None, jax.Array, jax.Array], nnx.Module]
    reads_input: bool = False
    trains_encoder: Callable[[ml_collections.ConfigDict], bool] = lambda config: False
    soft_tokens: Callable[[ml_collections.ConfigDict, Reading], int] = lambda config, reading: 0
    features: Callable[[ml_collections.ConfigDict], tuple[str, ...]] = lambda config: ()


def parameter_count(module: nnx.Module, *filters: type[nnx.Variable]) -> int:
    variables = nnx.to_flat_state(nnx.state(module, *filters))
    return sum(math.prod(variable.get_value().shape) for _, variable in variables)
