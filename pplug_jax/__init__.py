"""PPlug ("LLMs + Persona-Plug = Personalized LLMs", arXiv 2409.11901) in JAX.

A frozen LLM and a trained user embedder.
"""

import importlib
import os
from typing import Any

# Else transformers tells every user who lacks PyTorch that "models won't be available".
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

# Each is imported when it is first asked for: a reader of results needs no JAX.
_ROOMS = {
    "Personalizer": "serve.personalizer",
    "generate": "llm.generate",
    "load_encoder": "encoder",
    "load_llm": "llm",
    "score": "scoring.metrics",
}

__all__ = ["Personalizer", "generate", "load_encoder", "load_llm", "score"]


def __dir__() -> list[str]:
    return [*globals(), *__all__]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)
