"""The Llama family, the base of the others: its settings and its tensors' names."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import transformers

from pplug_jax.errors import InputError
from pplug_jax.llm.decoder import DecoderConfig, Llama3Stretch, Rope, Yarn
from pplug_jax.storage.hf import Source

SOURCES = {
    "embedding": Source("model.embed_tokens.weight"),
    "layers.attention_norm": Source("model.layers.{}.input_layernorm.weight"),
    "layers.query": Source("model.layers.{}.self_attn.q_proj.weight", transpose=True),
    "layers.key": Source("model.layers.{}.self_attn.k_proj.weight", transpose=True),
    "layers.value": Source("model.layers.{}.self_attn.v_proj.weight", transpose=True),
    "layers.output": Source("model.layers.{}.self_attn.o_proj.weight", transpose=True),
    "layers.mlp_norm": Source("model.layers.{}.post_attention_layernorm.weight"),
    "layers.gate": Source("model.layers.{}.mlp.gate_proj.weight", transpose=True),
    "layers.up": Source("model.layers.{}.mlp.up_proj.weight", transpose=True),
    "layers.down": Source("model.layers.{}.mlp.down_proj.weight", transpose=True),
    "norm": Source("model.norm.weight"),
    "head": Source("lm_head.weight"),
}


# Kind of RoPE scaling -> its settings.
SCALINGS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", *Llama3Stretch.__dataclass_fields__),
    "yarn": ("factor", "attention_factor", "mscale", "mscale_all_dim", *Yarn.__dataclass_fields__),
}


def config_from_hf(hf: transformers.PreTrainedConfig, eos_ids: tuple[int, ...]) -> DecoderConfig:
    """Return our config of a Llama.

    Raises:
        InputError: a setting that this code does not implement.
    """
    check(hf, hidden_act="silu", attention_bias=False, mlp_bias=False, pretraining_tp=1)
    return decoder_config(hf, eos_ids)


def check(hf: transformers.PreTrainedConfig, **supported: Any) -> None:
    """Refuse settings that would change the arithmetic, which have other values than `supported`.

    Raises:
        InputError: names the setting.
    """
    for field, value in supported.items():
        given = getattr(hf, field, None)
        if given is not None and given != value:
            raise InputError(
                f"config.json: {field}={given!r} is not supported for model_type {hf.model_type} "
                f"(only {value!r})"
            )


def decoder_config(
    hf: transformers.PreTrainedConfig, eos_ids: tuple[int, ...], **differences: Any
) -> DecoderConfig:
    """Return the config that all families share, with `differences` from Llama."""
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    kinds = getattr(hf, "layer_types", None) or ["full_attention"] * hf.num_hidden_layers
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise InputError(f"config.json: layer_types {sorted(unknown)} are not supported")
    sliding = tuple(kind == "sliding_attention" for kind in kinds)
    if any(sliding):
        differences = {"sliding": sliding, "window": hf.sliding_window} | differences
    if "rope" not in differences:
        differences["rope"] = rope(hf.rope_parameters, hf.model_type)
        if (factor := attention_factor(hf.rope_parameters)) != 1.0:
            scale = differences.get("attention_scale") or head_dim**-0.5
            differences["attention_scale"] = scale * factor**2
    pad_id = getattr(hf, "pad_token_id", None)
    return DecoderConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        head_dim=head_dim,
        norm_eps=hf.rms_norm_eps,
        tied_head=hf.tie_word_embeddings,
        max_length=hf.max_position_embeddings,
        eos_ids=eos_ids,
        pad_id=pad_id if pad_id is not None else (*eos_ids, 0)[0],
        **differences,
    )


def rope(parameters: Mapping[str, Any], model_type: str) -> Rope:
    """Return `rope_parameters`, as transformers 5 makes them of any older form, as our `Rope`.

    Raises:
        InputError: a kind of scaling, or a setting of it, that this code does not implement.
    """
    given = {name: value for name, value in parameters.items() if value is not None}
    kind = given.pop("rope_type", None) or given.pop("type", "default")
    theta = given.get("rope_theta")
    if theta is None:
        raise InputError("config.json: rope_theta is missing")
    known = {"rope_theta", "type", "partial_rotary_factor", *SCALINGS.get(kind, ())}
    if kind not in SCALINGS:
        raise InputError(
            f"config.json: rope type {kind!r} is not supported for model_type {model_type} "
            f"({', '.join(SCALINGS)})"
        )
    if given.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(
            f"config.json: partial_rotary_factor is not supported for model_type {model_type}"
        )
    if unknown := sorted(given.keys() - known):
        raise InputError(
            f"config.json: rope_scaling has {unknown[0]!r}, which rope type {kind!r} does not know"
        )
    try:
        if kind == "llama3":
            return Rope(theta, given["factor"], Llama3Stretch(**_of(Llama3Stretch, given)))
        if kind == "yarn":
            return Rope(theta, given["factor"], Yarn(**_of(Yarn, given)))
        return Rope(theta, given["factor"] if kind == "linear" else 1.0)
    except (KeyError, TypeError) as error:
        raise InputError(f"config.json: rope_scaling of type {kind!r}: {error}") from error


def _of(kind: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a dataclass that are given."""
    names = (field.name for field in dataclasses.fields(kind))
    return {name: given[name] for name in names if name in given}


def attention_factor(parameters: Mapping[str, Any]) -> float:
    """Return what YaRN multiplies queries and keys by, and so scores twice; 1 for other kinds."""
    given = {name: value for name, value in parameters.items() if value is not None}
    if (given.get("rope_type") or given.get("type")) != "yarn":
        return 1.0
    if "attention_factor" in given:
        return given["attention_factor"]

    def grown(scale: float) -> float:
        return 0.1 * scale * math.log(max(given["factor"], 1.0)) + 1.0

    if given.get("mscale") and given.get("mscale_all_dim"):
        return grown(given["mscale"]) / grown(given["mscale_all_dim"])
    return grown(1.0)
