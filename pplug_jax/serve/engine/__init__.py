"""What answers: rows of embeddings and sampling in, tokens out as they come."""

from pplug_jax.serve.engine.base import (
    Busy,
    Engine,
    Event,
    Finished,
    Request,
    Sampling,
    Token,
    Unwell,
    tokens_of,
)

__all__ = [
    "Busy",
    "Engine",
    "Event",
    "Finished",
    "Request",
    "Sampling",
    "Token",
    "Unwell",
    "tokens_of",
]
