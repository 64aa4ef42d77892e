"""A Hugging Face directory as a frozen LLM on the mesh."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import transformers
from flax import nnx
from huggingface_hub.errors import StrictDataclassError
from jax.sharding import Mesh

from pplug_jax import hf
from pplug_jax.errors import InputError
from pplug_jax.llm import gemma, llama, qwen, t5
from pplug_jax.llm.decoder import Decoder
from pplug_jax.llm.quantize import KINDS
from pplug_jax.llm.quantize import quantize as quantized
from pplug_jax.mesh import make_mesh


class Family(NamedTuple):
    """How the checkpoints of a model_type are read.

    config_from_hf: (transformers' config, eos_ids) -> the config of `module`.
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


def _read_module(
    path: str | Path, dtype: str, quantize: str | None
) -> tuple[Family, Decoder | t5.T5]:
    """The directory's family and its module, abstract and not yet quantised."""
    if quantize and quantize not in KINDS:
        raise InputError(f"quantize={quantize!r} is unknown; known: {', '.join(KINDS)}")
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
        config = transformers.AutoConfig.from_pretrained(path).get_text_config()
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}/config.json: {error}") from error
    generation = Path(path) / "generation_config.json"
    if generation.is_file():  # as in transformers, it has the last word
        for field, value in hf.read_json(generation).items():
            if field in ("eos_token_id", "pad_token_id"):
                setattr(config, field, value)
    eos = config.eos_token_id
    eos_ids = tuple(eos) if isinstance(eos, list) else (() if eos is None else (eos,))
    family = FAMILIES[model_type]
    return family, family.module(family.config_from_hf(config, eos_ids), dtype)


def _store(kernels: Any, quantize: str | None) -> Any:
    """How a variable is kept; only the layers' kernels are stacks of matrices."""
    return quantized(kernels, quantize) if quantize and kernels.ndim == 3 else kernels


def abstract_llm(path: str | Path, *, dtype: str, quantize: str | None) -> Decoder | t5.T5:
    """What `load_llm` gives, with `jax.ShapeDtypeStruct` for arrays; of `path` only config.json."""
    _, module = _read_module(path, dtype, quantize)
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
    """Loads `path` (config.json, *.safetensors), each device reading only its shard.

    The weights have `dtype`; with `quantize` (int8, int4) the layers' kernels are stored so, each
    converted as soon as it is read.

    Raises:
        FileNotFoundError: no such directory, config or weights.
        InputError: an unknown quantisation, architecture or setting, or tensors that do not fit
            config.json.
    """
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    return llm_loader(path, mesh=mesh, dtype=dtype, quantize=quantize)()


def llm_loader(
    path: str | Path, *, mesh: Mesh, dtype: str, quantize: str | None
) -> Callable[[], Decoder | t5.T5]:
    """What loads `path` as `load_llm` does, of which all that `load_llm` raises is raised here."""
    family, module = _read_module(path, dtype, quantize)
    # A multimodal checkpoint's text tensors stand behind one prefix or another, by its age.
    prefix = hf.common_prefix(path, "embed_tokens.weight") or "model."
    sources = {
        name: source._replace(name=source.name.replace("model.", prefix, 1))
        for name, source in family.sources.items()
    }
    return hf.weights_loader(
        module,
        path,
        sources,
        mesh,
        ignore=IGNORED,
        store=functools.partial(_store, quantize=quantize),
    )
