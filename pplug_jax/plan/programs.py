"""The programs of a run, traced for a mesh without any weights: what the planner compiles."""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pplug_jax.config import check_batches
from pplug_jax.errors import ConfigError
from pplug_jax.feed.batches import Batch, round_up
from pplug_jax.feed.features import FEATURES
from pplug_jax.llm import abstract_llm
from pplug_jax.llm.prompts import Behind, Front, Place
from pplug_jax.llm.shapes import PUBLISHED, published_directory
from pplug_jax.methods.shown import layout_of
from pplug_jax.methods.table import Method, asked_for, configured
from pplug_jax.plugs.forward import answer_tokens, gold_losses
from pplug_jax.plugs.registry import PLUGS
from pplug_jax.runtime.mesh import parts, place_abstract, replicated, sharding
from pplug_jax.serve.engine import slots
from pplug_jax.session.models import Models, model_path
from pplug_jax.session.weights import abstract_weights
from pplug_jax.settings import Settings
from pplug_jax.storage import hf
from pplug_jax.train.step import abstract_optimizer, jit_step, optimizer_of

# Tokens around the input: what the chat templates of the presets have at most (Llama's, with its
# dates), or the start token and the separator.
CHAT_TOKENS, PLAIN_TOKENS = 48, 3
CHAT_SUFFIX, PLAIN_SUFFIX = 8, 2  # those of them that stand behind the input


def config_directory(path: str, field: str) -> Path:
    """Return the directory of a model's config.json, which is never downloaded.

    Raises:
        ConfigError: it is no directory, and the model's shape is not known here.
    """
    if path.startswith("assets/") or Path(path).is_dir():
        return model_path(path, field)
    if path in PUBLISHED:
        return published_directory(path)
    raise ConfigError(
        f"config.{field}.path: there is no directory {path!r}, and of no such model the shape is "
        f"known without its config.json; known: {', '.join(PUBLISHED)}"
    )


class AbstractModels(Models):
    """`Models` of a config for compiling alone: shapes, dtypes and places instead of arrays."""

    def __init__(self, config: Settings, mesh: Mesh):
        self.config, self.mesh = config, mesh
        check_batches(config, parts(mesh, "batch"))
        llm = abstract_llm(config_directory(config.llm.path, "llm"), **self._llm_settings)
        self.abstract_llm = place_abstract(llm, mesh)
        self.encoder_path = config_directory(config.encoder.path, "encoder")


class Lengths(NamedTuple):
    """The most tokens of a row, as its arrays are padded.

    Attributes:
        text: what the LLM reads to learn the target, `Buckets.text`.
        prompt: the prompt.
        soft: the plug's tokens.
        target: the target.
        query: the input encoder's tokens.
        new: generated tokens.
    """

    text: int
    prompt: int
    soft: int
    target: int
    query: int
    new: int


class Programs:
    """A config's training step, evaluation and decoding on a mesh.

    They are those of the first trained method, with every array as long as the config allows.
    """

    def __init__(self, config: Settings, mesh: Mesh):
        self.config, self.mesh = config, mesh
        self.models = AbstractModels(config, mesh)
        self.encoder = hf.read_config(self.models.encoder_path)
        self.method = _trained(config)
        self.settings = configured(config, self.method, config.seed)
        self.weights = abstract_weights(self.models, self.method, self.settings)
        around = CHAT_TOKENS if config.llm.chat else PLAIN_TOKENS
        suffix = CHAT_SUFFIX if config.llm.chat else PLAIN_SUFFIX
        self.kind = PLUGS[self.method.kind]
        prompt, target = config.data.max_input_length + around, config.data.max_target_length
        self.place: Place = Front(1)
        self.layout = layout_of(self.method, self.settings)
        if self.layout.behind:
            prompt -= suffix
            self.place = Behind((0,) * suffix)
        joined = self.models.abstract_llm.decoder_only and isinstance(self.place, Front)
        self.lengths = Lengths(
            text=round_up(prompt + target - 1 if joined else prompt),
            prompt=round_up(prompt),
            soft=self.kind.soft_tokens(self.settings, self.method.reading),
            target=round_up(target),
            query=min(config.encoder.max_length, self.encoder["max_position_embeddings"]),
            new=config.eval.max_new_tokens,
        )

    @property
    def row_tokens(self) -> int:
        """The tokens that the LLM reads of a row to learn its target, padding included."""
        apart = self.lengths.target
        if isinstance(self.place, Behind):
            apart += len(self.place.suffix)
        elif self.models.abstract_llm.decoder_only:
            apart = 0
        return self.lengths.soft + self.lengths.text + apart

    def batch(self, rows: int) -> Batch:
        """Return a batch as `place_batch` lays it out."""
        lengths = self.lengths
        items = round_up(self.config.data.max_history)
        width = self.encoder["hidden_size"]

        def array(dtype: Any, *shape: int) -> Any:
            shape = (rows, *shape)
            where = sharding(self.mesh, ("batch", *[None] * (len(shape) - 1)), shape)
            return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

        query = {"query": array(jnp.int32, lengths.query), "query_mask": array(bool, lengths.query)}
        if self.layout.encoded:
            query = {"query": array(jnp.float32, width), "query_mask": array(bool, 1)}
        return Batch(
            prompt=array(jnp.int32, lengths.prompt),
            prompt_mask=array(bool, lengths.prompt),
            text=array(jnp.int32, lengths.text),
            text_mask=array(bool, lengths.text),
            target=array(jnp.int32, lengths.target),
            target_mask=array(bool, lengths.target),
            **query,
            history=array(jnp.float32, items, width),
            history_mask=array(bool, items),
            index=array(jnp.int32),
            weight=array(jnp.float32),
            features={
                name: array(jnp.float32, items, FEATURES[name].width(width))
                for name in self.kind.features(self.settings)
            },
        )

    def train(self, remat: bool | None = None) -> jax.stages.Traced:
        """Trace the step of `Trainer.fit`; `remat` is the config's by default."""
        train, optimizer = self.settings.train, optimizer_of(self.settings, steps=1)
        state = abstract_optimizer(optimizer, self.weights, self.mesh)
        return self._trace(
            jit_step(self.weights, state).trace,
            self.weights,
            state,
            self.models.abstract_llm,
            self.batch(train.batch_size),
            optimizer=optimizer,
            place=self.place,
            accumulation=train.accumulation,
            remat=train.remat if remat is None else remat,
            reading=self.method.reading,
        )

    def losses(self) -> jax.stages.Traced:
        """Trace the evaluation of the gold outputs."""
        batch = self.batch(self.config.eval.batch_size)
        return self._trace(
            gold_losses.trace,
            self.weights,
            self.models.abstract_llm,
            batch,
            self.place,
            self.method.reading,
        )

    def answer(self) -> jax.stages.Traced:
        """Trace the generation of answers: prefill, and a loop of decoding steps."""
        settings = self.config.eval
        return self._trace(
            answer_tokens.trace,
            self.weights,
            self.models.abstract_llm,
            self.batch(settings.batch_size),
            reading=self.method.reading,
            place=self.place,
            **settings.decoding,
        )

    def admit(self) -> jax.stages.Traced:
        """Trace how the serving engine reads a prompt into one of its slots."""
        held, programs = self._slots
        llm = self.models.abstract_llm
        rows = self.longest_prompt, llm.config.hidden_size

        def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(self.mesh))

        prompt = array(jnp.float32, 1, *rows), array(bool, 1, rows[0])
        slot, seed = array(jnp.int32), array(jnp.int32)
        temperature, top_p = array(jnp.float32), array(jnp.float32)
        return self._trace(programs.admit.trace, llm, held, *prompt, slot, temperature, top_p, seed)

    def step(self) -> jax.stages.Traced:
        """Trace a step of the serving engine, which makes a token of each slot."""
        held, programs = self._slots
        time = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(self.mesh))
        return self._trace(
            programs.step.trace,
            self.models.abstract_llm,
            held,
            time,
            ring=self.lengths.new,
            count=self.config.eval.batch_size,
        )

    @property
    def longest_prompt(self) -> int:
        """The most rows of a prompt that is served."""
        suffix = len(self.place.suffix) if isinstance(self.place, Behind) else 0
        return self.lengths.prompt + self.lengths.soft + suffix

    @functools.cached_property
    def _slots(self) -> tuple[slots.Slots, slots.Programs]:
        """The engine's slots, `eval.batch_size` of them, and its programs."""
        llm, sizes = (
            self.models.abstract_llm,
            (self.config.eval.batch_size, self.longest_prompt, self.lengths.new),
        )
        shapes = jax.eval_shape(functools.partial(slots.empty, llm, *sizes))
        abstract = jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            shapes,
            slots.places(shapes, self.mesh),
        )
        return abstract, slots.programs(llm, self.mesh, *sizes)

    def _trace(self, trace: Callable[..., jax.stages.Traced], *args: Any, **kwargs: Any) -> Any:
        with jax.set_mesh(self.mesh):
            return trace(*args, **kwargs)

    def held(self, training: bool) -> int:
        """Return a chip's bytes of the LLM and the weights, in training with their moments."""

        def held(tree: Any) -> int:
            return sum(
                x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape))
                for x in jax.tree.leaves(tree)
            )

        return held(self.models.abstract_llm) + (3 if training else 1) * held(self.weights)


def _trained(config: Settings) -> Method:
    """Return the first of the config's methods that has weights of its own.

    Raises:
        ConfigError: none has.
    """
    for method in asked_for(config):
        if method.trained:
            return method
    raise ConfigError("config.methods: nothing is trained, so there is nothing to plan")
