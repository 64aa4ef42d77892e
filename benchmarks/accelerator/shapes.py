"""Models of published shapes with random weights, ours and the same in PyTorch.

They are made on the device: no file of them exists, and an 8B would not travel.
"""

import copy
import functools
import gc
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import torch
import transformers
from flax import nnx

from benchmarks.fill import fill
from benchmarks.lamp_like import EXAMPLES, fill_store
from configs import common
from pplug_jax.encoder import bert
from pplug_jax.encoder.encode import abstract_bert
from pplug_jax.feed.store import HistoryStore
from pplug_jax.llm.load import FAMILIES
from pplug_jax.llm.shapes import PUBLISHED
from pplug_jax.plan.programs import AbstractModels
from pplug_jax.plugs.persona import UserEmbedder
from pplug_jax.plugs.registry import PLUGS
from pplug_jax.runtime.mesh import make_mesh, place, place_abstract
from pplug_jax.settings import Settings
from pplug_jax.storage.hf import Source

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
# For rehearsals.
TINY: dict[str, transformers.PreTrainedConfig] = {
    "tiny-llama": transformers.LlamaConfig(
        **_SMALL, num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True
    ),
    "tiny-gemma3": transformers.Gemma3TextConfig(
        **_SMALL,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=32,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "tiny-bert": transformers.BertConfig(**_SMALL),
}


def shape(name: str) -> transformers.PreTrainedConfig:
    """A config that ends no answer, so that all peers decode as many tokens."""
    found = copy.deepcopy(TINY.get(name) or PUBLISHED[name])
    found.eos_token_id, found.pad_token_id = None, 0
    return found


class RandomModels(AbstractModels):
    """`Models` of an LLM's and an encoder's shape, with numbers from a seed for weights.

    dtype: the LLM's. settings: fields of the config, as LaMP-5's paper settings have them
    otherwise.
    """

    def __init__(self, llm: str, encoder: str, dtype: str, settings: Mapping[str, Any]):
        self.directory = tempfile.TemporaryDirectory()
        config = common.task_config("LaMP_5", "embedded")
        for field, name in (("llm", llm), ("encoder", encoder)):
            path = Path(self.directory.name, field)
            shape(name).save_pretrained(path)
            config[field].path = str(path)
        config.llm.dtype, config.plug.history_dropout = dtype, 0.0
        config.update_from_flattened_dict(dict(settings))
        # Of one device: the peers have no other either.
        super().__init__(Settings.of(config), make_mesh(devices=jax.devices()[:1]))
        self.llm_shape, self.encoder_shape = shape(llm), shape(encoder)
        self.llm = fill(self.abstract_llm)
        size = self.encoder_shape.hidden_size
        model = SimpleNamespace(
            config=SimpleNamespace(max_length=self.encoder_shape.max_position_embeddings)
        )
        self.encoder = SimpleNamespace(size=size, fingerprint="random", model=model)
        self.store = HistoryStore(Path(self.directory.name), self.encoder)
        fill_store(self.store, EXAMPLES)


def random_weights(models: RandomModels) -> UserEmbedder:
    """As the plug begins, but for Enc_inp's weights; every call gives the same."""
    config = models.config
    found = abstract_bert(
        models.encoder_path, pooling=None, variable=nnx.Param, dtype=config.plug.dtype
    )
    encoder = fill(place_abstract(found, models.mesh), seed=1)
    build = jax.jit(functools.partial(PLUGS["persona"].build, config, models.abstract_llm))
    return place(build(encoder, models.soft_norm, jax.random.key(config.seed)), models.mesh)


def copy_weights(
    ours: nnx.Module, sources: Mapping[str, Source], theirs: transformers.PreTrainedModel
) -> None:
    """Gives `theirs` our weights, without a way through the host."""
    state = {}
    for name, source in sources.items():
        variable: Any = functools.reduce(getattr, name.split("."), ours)
        if variable is None:  # a family has it, this model has not
            continue
        tensor = torch.from_dlpack(variable.get_value())
        layers = enumerate(tensor) if "{}" in source.name else [(0, tensor)]
        for i, each in layers:
            state[source.name.format(i)] = each.T if source.transpose else each
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    tied = {"lm_head.weight"} if getattr(theirs.config, "tie_word_embeddings", False) else set()
    assert not unexpected and set(missing) <= tied, (missing, unexpected)


def torch_llm(models: RandomModels) -> transformers.PreTrainedModel:
    """The same LLM in PyTorch."""
    config = models.llm_shape
    dtype = getattr(torch, models.config.llm.dtype)
    with torch.device(DEVICE):
        theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    copy_weights(models.llm, FAMILIES[config.model_type].sources, theirs)
    theirs.generation_config.eos_token_id, theirs.generation_config.pad_token_id = None, 0
    return theirs.eval().requires_grad_(False)


def torch_encoder(models: RandomModels, ours: bert.Bert) -> transformers.BertModel:
    """Enc_inp in PyTorch."""
    with torch.device(DEVICE):
        theirs = transformers.BertModel(models.encoder_shape, add_pooling_layer=False)
    copy_weights(ours, bert.SOURCES, theirs)
    return theirs


def free() -> None:
    """Gives memory back that nothing holds any more."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def torch_peak() -> int | None:
    """Bytes that PyTorch has held at most since this was last asked."""
    if DEVICE == "cpu":
        return None
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak
