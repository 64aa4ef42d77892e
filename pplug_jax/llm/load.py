"""Load a Hugging Face directory as a frozen LLM on the mesh."""

import functools
import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import transformers
from flax import nnx
from huggingface_hub.errors import StrictDataclassError
from jax.sharding import Mesh

from pplug_jax.errors import InputError
from pplug_jax.llm import gemma, llama, qwen, t5
from pplug_jax.llm.decoder import Decoder
from pplug_jax.llm.quantize import KINDS
from pplug_jax.llm.quantize import quantize as quantized
from pplug_jax.runtime.mesh import make_mesh
from pplug_jax.storage import hf
from pplug_jax.storage.files import read_object
from pplug_jax.storage.tensors import Stored, are_equal, read_tensors


class Family(NamedTuple):
    """How the checkpoints of a model_type are read.

    Attributes:
        config_from_hf: (transformers' config, eos_ids) -> the config of `module`.
        sources: variable path -> its tensor.
        module: the LLM's class.
    """

    config_from_hf: Callable[[Any, tuple[int, ...]], Any]
    sources: Mapping[str, hf.Source]
    module: type[Decoder] | type[t5.T5] = Decoder


FAMILIES = {
    "llama": Family(llama.config_from_hf, llama.SOURCES),
    "gemma": Family(gemma.config_from_hf, llama.SOURCES),
    "gemma2": Family(gemma.config_from_hf, gemma.SOURCES),
    "gemma3_text": Family(gemma.config_from_hf, gemma.SOURCES),
    "gemma3": Family(gemma.config_from_hf, gemma.SOURCES),  # its vision tower is left out
    "qwen2": Family(qwen.config_from_hf, qwen.SOURCES),
    "qwen3": Family(qwen.config_from_hf, qwen.SOURCES),
    "t5": Family(t5.config_from_hf, t5.SOURCES, t5.T5),
}

# What a checkpoint may have besides: buffers, tied copies, the vision part of a multimodal model.
IGNORED = (
    r".*rotary_emb\.inv_freq|.*lm_head\.weight|(en|de)coder\.embed_tokens\.weight|"
    r".*(vision_tower|multi_modal_projector)\..*"
)


class Checkpoint(NamedTuple):
    """A directory's module, abstract and not yet quantised, and the places of its tensors.

    Attributes:
        module: the LLM.
        sources: variable path, joined with dots -> its tensor, by the name that it has there.
        tensors: the tensors by name.
    """

    module: Decoder | t5.T5
    sources: Mapping[str, hf.Source]
    tensors: Mapping[str, Stored]


def _read_config(path: str | Path) -> tuple[Family, transformers.PreTrainedConfig]:
    settings = hf.read_config(path)
    model_type = settings.get("model_type")
    if model_type not in FAMILIES:
        raise InputError(
            f"{path}/config.json: model_type {model_type!r} is not supported; "
            f"supported: {', '.join(FAMILIES)}"
        )
    if "quantization_config" in settings:
        raise InputError(
            f"{path}/config.json: quantization_config: quantised checkpoints are not supported; "
            "name the original one"
        )
    try:
        # It knows every family's defaults and the older forms of its fields.
        config = transformers.CONFIG_MAPPING[model_type].from_dict(settings).get_text_config()
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}/config.json: {error}") from error
    # generation_config.json has the last word, as in transformers.
    file, generating = Path(path) / "config.json", {}
    if (generation := Path(path) / "generation_config.json").is_file():
        file, generating = generation, read_object(generation)
    for field in ("eos_token_id", "pad_token_id"):
        value = generating.get(field, getattr(config, field, None))
        ids = value if isinstance(value, list) and field.startswith("eos") else [value]
        if not all(id is None or (isinstance(id, int) and not isinstance(id, bool)) for id in ids):
            raise InputError(f"{file}: {field} must be a token's id, not {value!r}")
        object.__setattr__(config, field, value)
    return FAMILIES[model_type], config


def _read_checkpoint(
    path: str | Path,
    dtype: str,
    quantize: str | None,
    *,
    weights: bool,
    own_head: bool | None = None,
) -> Checkpoint:
    """Read a directory's config and the names of its tensors.

    Args:
        path: the directory.
        dtype: of the weights.
        quantize: int8, int4 or None.
        weights: whether there must be weights.
        own_head: whether there is a head, if that is known without weights.
    """
    if quantize and quantize not in KINDS:
        raise InputError(f"quantize={quantize!r} is unknown; known: {', '.join(KINDS)}")
    family, config = _read_config(path)
    eos = config.eos_token_id
    eos_ids = tuple(eos) if isinstance(eos, list) else (() if eos is None else (eos,))
    family.config_from_hf(config, eos_ids)  # its errors before those of the weights
    try:
        tensors = read_tensors(path)
    except FileNotFoundError:
        if weights:
            raise
        tensors = {}
    # A multimodal checkpoint's text tensors stand behind one prefix or another, by its age.
    prefix = hf.common_prefix(tensors, "layers.0.input_layernorm.weight") or "model."
    sources = {
        name: source._replace(name=source.name.replace("model.", prefix, 1))
        for name, source in family.sources.items()
    }
    if tensors:
        _find_tied(config, sources, tensors)
    elif own_head is not None:
        config.tie_word_embeddings = not own_head
    module = family.module(family.config_from_hf(config, eos_ids), dtype)
    return Checkpoint(module, sources, tensors)


def _find_tied(
    config: transformers.PreTrainedConfig,
    sources: dict[str, hf.Source],
    tensors: Mapping[str, Stored],
) -> None:
    """Find the matrices that may be stored under one of several names, or under all.

    As in `transformers` 5 the tensors decide. A head that differs from the embedding is not tied to
    it, whatever `config.tie_word_embeddings` says; if only one of two tied names exists, it stands
    for both. This changes `config` and `sources` accordingly.

    Raises:
        InputError: T5's encoder or decoder has an embedding of its own.
    """
    embedding = sources["embedding"].name
    copies = [n for n in tensors if n.endswith("embed_tokens.weight") and n != embedding]
    head = next((name for name in tensors if name.endswith("lm_head.weight")), None)
    if embedding in tensors:
        for name in copies:
            if not are_equal(tensors[embedding].tensor, tensors[name].tensor):
                raise InputError(
                    f"{tensors[name].file}: the tensor {name} differs from {embedding}, "
                    "which is not supported"
                )
        if head and config.tie_word_embeddings:
            equal = are_equal(tensors[embedding].tensor, tensors[head].tensor)
            config.tie_word_embeddings = equal
    elif copies:
        sources["embedding"] = hf.Source(copies[0])
    elif head and config.tie_word_embeddings:
        sources["embedding"] = hf.Source(head)
    if head:
        sources["head"] = hf.Source(head)
    elif config.tie_word_embeddings:
        sources["head"] = sources["embedding"]


def _store(kernels: Any, quantize: str | None) -> Any:
    """Make what a variable holds; only the layers' kernels, stacks of matrices, are quantised."""
    return quantized(kernels, quantize) if quantize and kernels.ndim == 3 else kernels


def abstract_llm(
    path: str | Path, *, dtype: str, quantize: str | None, own_head: bool | None = None
) -> Decoder | t5.T5:
    """Return what `load_llm` loads, with `jax.ShapeDtypeStruct` for arrays; `path` may lack
    weights.

    Args:
        path: the directory.
        dtype: of the weights.
        quantize: int8, int4 or None.
        own_head: whether there is a head beside the embedding; None is what config.json says.
    """
    module = _read_checkpoint(path, dtype, quantize, weights=False, own_head=own_head).module
    graph, state = nnx.split(module)
    stored = jax.eval_shape(lambda state: jax.tree.map(lambda x: _store(x, quantize), state), state)
    return nnx.merge(graph, stored)


def load_llm(
    path: str | Path,
    *,
    mesh: Mesh | None = None,
    dtype: str = "bfloat16",
    quantize: str | None = None,
) -> Decoder | t5.T5:
    """Load an LLM (config.json, *.safetensors), each device reading only its shard.

    Args:
        path: its directory.
        mesh: the mesh to lay it out on; None is the first device.
        dtype: of the weights.
        quantize: store the layers' kernels as int8 or int4, each converted as soon as it is read.

    Raises:
        FileNotFoundError: no such directory, config or weights.
        InputError: an unknown quantisation, architecture or setting, or tensors that do not fit
            config.json.
    """
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    return llm_loader(path, mesh=mesh, dtype=dtype, quantize=quantize)()


def fingerprint(path: str | Path) -> str:
    """Return 16 digits that differ between LLMs whose weights differ, whatever file holds them.

    Of each tensor they depend on the shape and on three rows, so that a large LLM takes no longer:
    training changes all rows of all layers.

    Args:
        path: the LLM's directory.

    Raises:
        FileNotFoundError: it has no weights.
        InputError: a file is cut, or nothing here can read it.
    """
    digest = hashlib.sha256()
    for name, (_, tensor) in sorted(read_tensors(path).items()):
        shape = tuple(tensor.get_shape())
        if re.fullmatch(IGNORED, name) or not shape:
            continue
        digest.update(str(shape).encode())
        for row in sorted({0, shape[0] // 2, shape[0] - 1}):
            digest.update(tensor[(slice(row, row + 1),)].astype(np.float32).tobytes())
    return digest.hexdigest()[:16]


def llm_loader(
    path: str | Path,
    *,
    mesh: Mesh,
    dtype: str,
    quantize: str | None,
    embedding_alone: bool = False,
) -> Callable[[], Decoder | t5.T5]:
    """Return a function that loads `path` as `load_llm` does.

    All checks run now, so errors appear before the (slow) load. With `embedding_alone` the LLM has
    only what its `embed` needs.
    """
    checkpoint = _read_checkpoint(path, dtype, quantize, weights=True)
    module = checkpoint.module
    if embedding_alone:
        for name, part in list(vars(module).items()):
            if isinstance(part, nnx.Module | nnx.Variable) and name != "embedding":
                setattr(module, name, None)
    return hf.weights_loader(
        module,
        path,
        checkpoint.tensors,
        checkpoint.sources,
        mesh,
        ignore=".*" if embedding_alone else IGNORED,
        store=functools.partial(_store, quantize=quantize),
    )
