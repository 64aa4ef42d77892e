"""A persona for the user beside a LoRA for the task, trained together.

The LoRA takes on what all users have in common, so that the soft tokens are free for the person.
With the soft tokens behind the input, the LoRA changes only what the LLM makes of them and of what
follows (an activated LoRA, arXiv 2504.12397): the input is read by the LLM as it is, once for all
users, and nothing is trained through it.
"""

import jax
from flax import nnx

from pplug_jax.encoder.bert import Bert
from pplug_jax.feed.batches import Batch
from pplug_jax.llm import LLM
from pplug_jax.plugs import lora, persona
from pplug_jax.plugs.base import Plug
from pplug_jax.plugs.reading import Reading
from pplug_jax.settings import Settings


class LoraPersona(Plug):
    """A LoRA and the paper's plug, side by side.

    Args:
        lora: changes the LLM, for all users alike.
        persona: makes a user's soft tokens.
    """

    def __init__(self, lora: lora.Lora, persona: persona.UserEmbedder):
        self.lora, self.persona = lora, persona

    def on(self, llm: LLM) -> LLM:
        return self.lora.on(llm)

    def adapt(self, llm: LLM, batch: Batch, reading: Reading, remat: bool) -> tuple[LLM, jax.Array]:
        _, soft = self.persona.adapt(llm, batch, reading, remat)
        return self.on(llm), soft

    def trained(self, reading: Reading) -> int:
        return self.lora.trained(reading) + self.persona.trained(reading)


def _build(
    config: Settings, llm: LLM, encoder: Bert | None, scale: jax.Array, key: jax.Array
) -> LoraPersona:
    keys = jax.random.split(key)
    return LoraPersona(
        lora.Lora(llm, config.lora, rngs=nnx.Rngs(keys[0])),
        persona.build(config, llm, encoder, scale, keys[1]),
    )


def persona_of(plug: Plug) -> persona.UserEmbedder:
    """Return what makes soft tokens: the plug itself, or its part beside a LoRA."""
    part = plug.persona if isinstance(plug, LoraPersona) else plug
    assert isinstance(part, persona.UserEmbedder)  # as of all kinds that read an input
    return part


KIND = persona.KIND._replace(build=_build)
