"""A Hugging Face directory as a frozen LLM on the mesh."""

from pathlib import Path

import jax
from jax.sharding import Mesh

from pplug_jax import hf
from pplug_jax.errors import InputError
from pplug_jax.llm import llama
from pplug_jax.llm.decoder import Decoder
from pplug_jax.mesh import make_mesh

FAMILIES = {"llama": llama}


def load_llm(path: str | Path, *, mesh: Mesh | None = None, dtype: str = "bfloat16") -> Decoder:
    """Loads `path` (config.json, *.safetensors), each device reading only its shard.

    The weights have `dtype`.

    Raises:
        FileNotFoundError: no such directory, config or weights.
        InputError: an unknown architecture or setting, or tensors that do not fit config.json.
    """
    config = hf.read_config(path)
    if config.get("model_type") not in FAMILIES:
        raise InputError(
            f"{path}/config.json: model_type {config.get('model_type')!r} is not supported; "
            f"supported: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[config["model_type"]]
    generation = Path(path) / "generation_config.json"
    if generation.is_file():  # as in transformers, it has the last word
        settings = hf.read_json(generation)
        config |= {x: settings[x] for x in ("eos_token_id", "pad_token_id") if x in settings}
    eos = config.get("eos_token_id")
    eos_ids = tuple(eos) if isinstance(eos, list) else (() if eos is None else (eos,))
    with hf.naming_missing_fields(path):
        llm = Decoder(family.config_from_hf(config, eos_ids), dtype)
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    return hf.load_weights(
        llm, path, family.SOURCES, mesh, ignore=("rotary_emb.inv_freq", "lm_head.weight")
    )
