"""PPlug ("LLMs + Persona-Plug = Personalized LLMs", arXiv 2409.11901) in JAX.

A frozen LLM and a trained user embedder.
"""

from pplug_jax.encoder import load_encoder
from pplug_jax.generate import generate
from pplug_jax.llm import load_llm
from pplug_jax.metrics import score
from pplug_jax.personalizer import Personalizer

__all__ = ["Personalizer", "generate", "load_encoder", "load_llm", "score"]
