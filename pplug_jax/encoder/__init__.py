"""Text encoders: BERT-style models that turn a text into one unit vector."""

from pplug_jax.encoder.encode import Encoder, load_encoder

__all__ = ["Encoder", "load_encoder"]
