"""Frozen LLMs behind one small interface (`decoder.Decoder` states it)."""

from pplug_jax.llm.decoder import Decoder
from pplug_jax.llm.load import abstract_llm, fingerprint, llm_loader, load_llm
from pplug_jax.llm.t5 import T5

LLM = Decoder | T5

__all__ = ["LLM", "abstract_llm", "fingerprint", "llm_loader", "load_llm"]
