"""Make, describe and restore the weights that a method trains."""

import contextlib
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pplug_jax.encoder.bert import Bert
from pplug_jax.encoder.encode import abstract_bert, load_bert
from pplug_jax.methods.table import Method
from pplug_jax.plugs.base import Kind
from pplug_jax.plugs.forward import Weights
from pplug_jax.plugs.registry import PLUGS
from pplug_jax.runtime.mesh import place, place_abstract
from pplug_jax.session.models import Models
from pplug_jax.settings import Settings
from pplug_jax.storage.checkpoint import Checkpoints
from pplug_jax.storage.workdir import checkpoints_path


def _input_encoder(config: Settings) -> dict[str, Any]:
    return {
        "pooling": config.encoder.pooling or None,
        "variable": nnx.Param,
        "dtype": config.plug.dtype,
    }


def _abstract_encoder(models: Models, kind: Kind, config: Settings) -> Bert | None:
    if not kind.reads_input:
        return None
    return abstract_bert(models.encoder_path, **_input_encoder(config))


def abstract_weights(models: Models, method: Method, config: Settings) -> Weights:
    """Return the shapes, dtypes and places of the method's weights, to restore into.

    Args:
        models: the run's models.
        method: the method.
        config: the method's config (`table.configured`).
    """
    kind = PLUGS[method.kind]
    build = functools.partial(kind.build, config, models.abstract_llm)
    scale = jax.ShapeDtypeStruct((), jnp.float32)
    shapes = jax.eval_shape(
        build, _abstract_encoder(models, kind, config), scale, jax.random.key(0)
    )
    return place_abstract(shapes, models.mesh)


def restore_weights(models: Models, method: Method, config: Settings, directory: Path) -> Weights:
    """Restore the weights that the method uses, of the best checkpoint in `directory`.

    Raises:
        CheckpointError: `directory` has no checkpoint of them.
    """
    assert method.plug
    path = checkpoints_path(directory, method.plug)
    with contextlib.closing(Checkpoints(path)) as checkpoints:
        return checkpoints.restore_weights(abstract_weights(models, method, config))


def new_weights(models: Models, method: Method, config: Settings) -> Weights:
    """Make the method's weights before training, on the mesh, drawn from the config's seed.

    A plug's Enc_inp has the encoder's weights; a LoRA changes nothing yet.
    """
    kind = PLUGS[method.kind]
    build = functools.partial(kind.build, config, models.abstract_llm)
    scale = models.soft_norm if kind.soft_tokens(config, method.reading) else 1.0
    arguments = scale, jax.random.key(config.seed)
    if kind.trains_encoder(config):
        encoder = load_bert(models.encoder_path, models.mesh, **_input_encoder(config))
        weights = jax.jit(build)(encoder, *arguments)
    else:
        build = functools.partial(build, _abstract_encoder(models, kind, config))
        weights = jax.jit(build)(*arguments)
    return place(weights, models.mesh)
