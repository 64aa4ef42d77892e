"""What a config names, built: mesh, LLM, tokenizer, encoder, stores."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from etils import epath

from pplug_jax.config import check_batches
from pplug_jax.data.answers import task_of
from pplug_jax.data.lamp import Example, Item
from pplug_jax.encoder import Encoder, load_encoder
from pplug_jax.errors import ConfigError, InputError
from pplug_jax.feed.batches import history_texts
from pplug_jax.feed.peers import Peers
from pplug_jax.feed.store import HistoryStore
from pplug_jax.llm import LLM, abstract_llm, llm_loader
from pplug_jax.llm.prompts import Tokenizer
from pplug_jax.runtime.mesh import make_mesh, parts, place_abstract
from pplug_jax.session.check import check_methods
from pplug_jax.session.prompts import GB, PromptCache
from pplug_jax.settings import Settings
from pplug_jax.storage import hf
from pplug_jax.storage.checkpoint import is_saved, module_loader, read_origin, save_module
from pplug_jax.storage.files import absolute, is_remote
from pplug_jax.storage.hub import local_directory
from pplug_jax.storage.workdir import CONVERTED, HISTORY

ASSETS = Path(__file__).parents[1] / "assets"


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


def history_encoder(config: Settings) -> Encoder:
    """Load the frozen encoder that a config names, on all of this process' devices.

    Raises:
        ConfigError: it is not there.
    """
    settings = config.encoder
    return load_encoder(
        model_path(settings.path, "encoder"),
        mesh=make_mesh(devices=jax.local_devices()),
        dtype=settings.dtype,
        pooling=settings.pooling or None,
        max_length=settings.max_length,
        query_prefix=settings.query_prefix,
        item_prefix=settings.item_prefix,
    )


def history_store(
    config: Settings, workdir: Path, encoder: Encoder | None = None, queries: bool = False
) -> HistoryStore:
    """Open the store that a run keeps histories in, or inputs' vectors.

    Args:
        config: the settings.
        workdir: the run's directory.
        encoder: the config's; None is to load it.
        queries: open the store of inputs.
    """
    encoder = encoder or history_encoder(config)
    local = HISTORY if is_remote(workdir) else workdir / HISTORY
    data = config.data
    return HistoryStore(
        data.history_store or local, encoder, queries, data.max_history, data.history_numbers
    )


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

    def __init__(self, config: Settings, workdir: Path):
        self.config = config
        self.workdir = workdir
        self.task = task_of(config)
        self.mesh = make_mesh(**vars(config.mesh))
        check_batches(config, parts(self.mesh, "batch"))
        llm_path = model_path(config.llm.path, "llm")
        self.encoder_path = model_path(config.encoder.path, "encoder")
        known = read_origin(self.converted) if is_saved(self.converted) else {}
        own_head = known.get("own_head")
        llm = abstract_llm(llm_path, **self._llm_settings, own_head=own_head)
        self.abstract_llm = place_abstract(llm, self.mesh)
        self._load_llm = (
            module_loader(self.converted, self.abstract_llm, self._llm_origin)
            if is_saved(self.converted)
            else llm_loader(llm_path, mesh=self.mesh, **self._llm_settings)
        )
        tokenizer = hf.load_tokenizer(llm_path, llm.config.vocab_size)
        self.tokenizer = Tokenizer(
            tokenizer,
            llm.config.eos_ids,
            vocab_size=llm.config.vocab_size,
            separator=config.llm.separator,
            prompt_end=llm.prompt_end,
            chat=config.llm.chat,
        )
        check_methods(config, llm, self.tokenizer)
        self.encoder = history_encoder(config)

    @functools.cached_property
    def llm(self) -> LLM:
        """The frozen LLM, loaded at the first access."""
        load = vars(self).pop("_load_llm")  # and with it the open files
        return load()

    @functools.cached_property
    def embedding(self) -> LLM:
        """The frozen LLM's `embed` alone, where another server answers."""
        if "llm" in vars(self) or is_saved(self.converted):
            return self.llm
        path = model_path(self.config.llm.path, "llm")
        load = llm_loader(path, mesh=self.mesh, embedding_alone=True, **self._llm_settings)
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

    @property
    def history_texts(self) -> Callable[[Example], tuple[str, list[str]]]:
        """What returns whose an example's history is, and its texts as the encoder reads them."""
        data = self.config.data
        return functools.partial(
            history_texts,
            self.task,
            max_history=data.max_history,
            history_labels=data.history_labels,
        )

    @functools.cached_property
    def store(self) -> HistoryStore:
        """The store of the histories' vectors; most plugs are served without it."""
        return history_store(self.config, self.workdir, self.encoder)

    @functools.cached_property
    def queries(self) -> HistoryStore:
        """The store of inputs' vectors, for plugs that do not train Enc_inp."""
        return history_store(self.config, self.workdir, self.encoder, queries=True)

    @functools.cached_property
    def peers(self) -> Peers:
        """The items of the training split's histories, which `train.inputs.save_peers` wrote."""
        return Peers.load(self.store, self.workdir)

    @functools.cached_property
    def prompts(self) -> PromptCache:
        """What the LLM has read of prompts in front of soft tokens."""
        budget = self.config.train.prompt_cache * GB
        return PromptCache(self.abstract_llm, self.mesh, budget)

    @functools.cached_property
    def soft_norm(self) -> jax.Array:
        """The mean norm of the LLM's embedding rows, () float32."""
        return jax.jit(lambda llm: llm.embedding_norm())(self.llm)
