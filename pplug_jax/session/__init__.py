"""What training, evaluation and serving share."""

from pplug_jax.session.models import Models

__all__ = ["Models"]
