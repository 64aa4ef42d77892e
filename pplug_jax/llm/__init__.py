"""Frozen LLMs behind one small interface (`decoder.Decoder` states it)."""

from pplug_jax.llm.load import load_llm

__all__ = ["load_llm"]
