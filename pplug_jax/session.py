"""What training, evaluation and serving share: mesh, LLM, encoder, store."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath
from flax import nnx

from pplug_jax.config import check_batches
from pplug_jax.data.lamp import Example, Item
from pplug_jax.data.tasks import TASKS
from pplug_jax.encoder import load_encoder
from pplug_jax.encoder.bert import Bert
from pplug_jax.encoder.encode import abstract_bert, load_bert
from pplug_jax.errors import ConfigError, InputError
from pplug_jax.feed.batches import Assemble, Buckets, Tokenized, history_rows, tokenize
from pplug_jax.feed.features import compare_with_peers
from pplug_jax.feed.peers import Peers
from pplug_jax.feed.store import HistoryStore
from pplug_jax.llm import LLM, abstract_llm, llm_loader
from pplug_jax.llm.prompts import Place, Tokenizer
from pplug_jax.methods.shown import PLAIN, Layout, layout_of
from pplug_jax.methods.table import Method, configured, methods_of
from pplug_jax.plugs.base import Kind
from pplug_jax.plugs.forward import Weights
from pplug_jax.plugs.registry import PLUGS
from pplug_jax.runtime.mesh import local_rows, make_mesh, parts, place, place_abstract
from pplug_jax.storage import hf
from pplug_jax.storage.checkpoint import (
    Checkpoints,
    is_saved,
    module_loader,
    read_origin,
    save_module,
)
from pplug_jax.storage.files import absolute, is_remote
from pplug_jax.storage.hub import local_directory
from pplug_jax.storage.workdir import CONVERTED, HISTORY, checkpoints_path

ASSETS = Path(__file__).parent / "assets"


def model_path(path: str, field: str) -> Path:
    """Return a model's directory: `assets/NAME` is bundled with the package, `hub` finds others.

    Raises:
        ConfigError: nothing is there; the message says what belongs there.
    """
    if path.startswith("assets/"):
        path = str(ASSETS / path.removeprefix("assets/"))
    try:
        return local_directory(path)
    except InputError as error:
        raise ConfigError(f"config.{field}.path: {error}") from error


class Models:
    """The models and stores that a config names, on its mesh.

    Args:
        config: the run's config.
        workdir: the run's directory.

    Attributes:
        abstract_llm: the LLM's shapes, dtypes and places, which suffice to compile.

    Raises:
        ConfigError: a path or setting cannot work.
        FileNotFoundError: a path is missing.
        ValueError: a checkpoint or setting cannot work.
    """

    def __init__(self, config: ml_collections.ConfigDict, workdir: Path):
        self.config = config
        self.workdir = workdir
        self.task = TASKS[config.task]
        self.mesh = make_mesh(**config.mesh)
        check_batches(config, parts(self.mesh, "batch"))
        llm_path = model_path(config.llm.path, "llm")
        self.encoder_path = model_path(config.encoder.path, "encoder")
        known = read_origin(self.converted) if is_saved(self.converted) else {}
        own_head = known.get("own_head")
        llm = abstract_llm(llm_path, **self._llm_settings, own_head=own_head)
        self.abstract_llm = place_abstract(llm, self.mesh)
        self._load_llm = self._llm_loader(llm_path)
        tokenizer = hf.load_tokenizer(llm_path, llm.config.vocab_size)
        self.tokenizer = Tokenizer(
            tokenizer,
            llm.config.eos_ids,
            vocab_size=llm.config.vocab_size,
            separator=config.llm.separator,
            prompt_end=llm.prompt_end,
            chat=config.llm.chat,
        )
        self._check_methods()
        self.encoder = load_encoder(
            self.encoder_path,
            mesh=self.mesh,
            dtype=config.encoder.dtype,
            pooling=config.encoder.pooling or None,
            max_length=config.encoder.max_length,
            query_prefix=config.encoder.query_prefix,
            item_prefix=config.encoder.item_prefix,
        )
        local = HISTORY if is_remote(workdir) else workdir / HISTORY
        self._history_path = config.data.history_store or local

    @functools.cached_property
    def store(self) -> HistoryStore:
        """The store of the histories' vectors; most plugs are served without it."""
        return HistoryStore(self._history_path, self.encoder)

    def _llm_loader(self, path: Path) -> Callable[[], LLM]:
        if is_saved(self.converted):
            return module_loader(self.converted, self.abstract_llm, self._llm_origin)
        return llm_loader(path, mesh=self.mesh, **self._llm_settings)

    @functools.cached_property
    def llm(self) -> LLM:
        """The frozen LLM, loaded at the first access."""
        load = vars(self).pop("_load_llm")  # and with it the open files
        return load()

    def convert_llm(self) -> bool:
        """Write the loaded LLM for later starts to restore; return whether it was not there yet."""
        if is_saved(self.converted):
            return False
        own_head = {"own_head": self.llm.head is not None}
        save_module(self.converted, self.llm, self._llm_origin | own_head)
        return True

    @property
    def converted(self) -> epath.Path:
        """The path of the converted LLM, which need not exist."""
        return absolute(self.config.llm.converted or self.workdir / CONVERTED)

    @property
    def _llm_settings(self) -> dict[str, Any]:
        return {"dtype": self.config.llm.dtype, "quantize": self.config.llm.quantize or None}

    @property
    def _llm_origin(self) -> dict[str, Any]:
        return {"path": self.config.llm.path, **self._llm_settings}

    def item_text(self, item: Item) -> str:
        """Return a history item as the encoder reads it."""
        return self.task.item_text(item, self.config.data.history_labels)

    def history_rows(self, examples: Iterable[Example]) -> list[np.ndarray]:
        """Return the store's rows of each example's history, without tokenising anything."""
        data = self.config.data
        return [
            history_rows(self.task, example, self.store, data.max_history, data.history_labels)
            for example in examples
        ]

    def tokenize(self, examples: Iterable[Example], layout: Layout = PLAIN) -> list[Tokenized]:
        """Tokenise examples with this task, tokenizer, store and the config's lengths."""
        data = self.config.data
        return tokenize(
            self.task,
            examples,
            self.tokenizer,
            self.store,
            max_input_length=data.max_input_length,
            max_target_length=data.max_target_length,
            max_history=data.max_history,
            history_labels=data.history_labels,
            behind=layout.behind,
            queries=self.queries if layout.encoded else None,
        )

    @functools.cached_property
    def queries(self) -> HistoryStore:
        """The store of inputs' vectors, for plugs that do not train Enc_inp."""
        return HistoryStore(self._history_path, self.encoder, queries=True)

    def place(self, method: Method, config: ml_collections.ConfigDict) -> Place:
        """Return where the method's soft tokens stand."""
        return self.tokenizer.place(layout_of(method, config).behind)

    @functools.cached_property
    def peers(self) -> Peers:
        """The items of the training split's histories, which `train.inputs.save_peers` wrote."""
        return Peers.load(self.store, self.workdir)

    def buckets(self, tokenized: Sequence[Tokenized], count: int, behind: bool = False) -> Buckets:
        """Choose padded shapes for examples whose soft tokens stand in front, or `behind`."""
        longest_query = self.encoder.model.config.max_length
        # Behind the input a place has a backward pass beside the forward one.
        target_cost = 2 if behind else 0 if self.abstract_llm.decoder_only else 1
        return Buckets(tokenized, count, longest_query, target_cost)

    def assemble(
        self,
        method: Method,
        config: ml_collections.ConfigDict,
        tokenized: Sequence[Tokenized],
        batch_size: int,
        **training: Any,
    ) -> Assemble:
        """Return the function that makes batches of the examples, as the method's plug reads them.

        Args:
            method: the method.
            config: the method's config (`table.configured`).
            tokenized: the examples.
            batch_size: rows of the global batch.
            **training: the seed and rates of `Assemble`'s dropout.
        """
        features, layout = PLUGS[method.kind].features(config), layout_of(method, config)
        return Assemble(
            tokenized,
            self.buckets(tokenized, config.data.buckets, layout.behind),
            self.store,
            local_rows(self.mesh, batch_size),
            features=features,
            peers=self.peers if compare_with_peers(features) else None,
            queries=self.queries if layout.encoded else None,
            **training,
        )

    def _check_methods(self) -> None:
        data, tokenizer = self.config.data, self.tokenizer
        known = methods_of(self.config)
        # Of an older workdir's methods some may be gone.
        methods = [known[name] for name in self.config.methods if name in known]
        settings = [configured(self.config, method, 0) for method in methods]
        behind = any(layout_of(*pair).behind for pair in zip(methods, settings, strict=True))
        if behind and not self.abstract_llm.decoder_only:
            raise ConfigError(
                "config.plug.place 'behind': an LLM with an encoder reads the whole prompt at "
                "once, so nothing is gained behind it; take 'front'"
            )
        soft = max(
            PLUGS[method.kind].soft_tokens(config, method.reading)
            for method, config in zip(methods, settings, strict=True)
        )
        prompt = len(tokenizer.prefix) + data.max_input_length + len(tokenizer.suffix)
        prompt += len(tokenizer.ids(tokenizer.joint)) if behind else 0
        answer = max(data.max_target_length, self.config.eval.max_new_tokens)
        longest = self.abstract_llm.config.max_length
        if prompt + soft + answer > longest:
            raise ConfigError(
                f"config.data.max_input_length: prompt, soft tokens and answer may reach "
                f"{prompt + soft + answer} tokens, "
                f"but the LLM was made for {longest}"
            )

    @functools.cached_property
    def _soft_norm(self) -> jax.Array:
        return jax.jit(lambda llm: llm.embedding_norm())(self.llm)

    def _input_encoder(self, config: ml_collections.ConfigDict) -> dict[str, Any]:
        return {
            "pooling": self.config.encoder.pooling or None,
            "variable": nnx.Param,
            "dtype": config.dtype,
        }

    def _abstract_encoder(self, kind: Kind, config: ml_collections.ConfigDict) -> Bert | None:
        if not kind.reads_input:
            return None
        return abstract_bert(self.encoder_path, **self._input_encoder(config.plug))

    def abstract_weights(self, method: Method, config: ml_collections.ConfigDict) -> Weights:
        """Return the shapes, dtypes and places of the method's weights, to restore into.

        Args:
            method: the method.
            config: the method's config (`table.configured`).
        """
        kind = PLUGS[method.kind]
        build = functools.partial(kind.build, config, self.abstract_llm)
        scale = jax.ShapeDtypeStruct((), jnp.float32)
        shapes = jax.eval_shape(
            build, self._abstract_encoder(kind, config), scale, jax.random.key(0)
        )
        return place_abstract(shapes, self.mesh)

    def restore_weights(
        self, method: Method, config: ml_collections.ConfigDict, directory: Path
    ) -> Weights:
        """Restore the weights that the method uses, of the best checkpoint in `directory`.

        Raises:
            CheckpointError: `directory` has no checkpoint of them.
        """
        path = checkpoints_path(directory, method.plug)
        with contextlib.closing(Checkpoints(path)) as checkpoints:
            return checkpoints.restore_weights(self.abstract_weights(method, config))

    def new_weights(self, method: Method, config: ml_collections.ConfigDict) -> Weights:
        """Make the method's weights before training, on the mesh, drawn from the config's seed.

        A plug's Enc_inp has the encoder's weights; a LoRA changes nothing yet.
        """
        kind = PLUGS[method.kind]
        build = functools.partial(kind.build, config, self.abstract_llm)
        scale = self._soft_norm if kind.soft_tokens(config, method.reading) else 1.0
        arguments = scale, jax.random.key(config.seed)
        if kind.trains_encoder(config):
            encoder = load_bert(self.encoder_path, self.mesh, **self._input_encoder(config.plug))
            weights = jax.jit(build)(encoder, *arguments)
        else:
            build = functools.partial(build, self._abstract_encoder(kind, config))
            weights = jax.jit(build)(*arguments)
        return place(weights, self.mesh)
