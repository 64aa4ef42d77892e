"""The Llama family, the base of the others: its settings and its tensors' names."""

from collections.abc import Mapping
from typing import Any

import transformers

from pplug_jax.errors import InputError
from pplug_jax.hf import Source
from pplug_jax.llm.decoder import DecoderConfig, Rope, SlowStretch

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


def config_from_hf(hf: transformers.PreTrainedConfig, eos_ids: tuple[int, ...]) -> DecoderConfig:
    """Raises InputError for a setting that this code does not implement."""
    check(hf, hidden_act="silu", attention_bias=False, mlp_bias=False, pretraining_tp=1)
    return decoder_config(hf, eos_ids)


def check(hf: transformers.PreTrainedConfig, **supported: Any) -> None:
    """Refuses what would change the arithmetic: a setting that has another value than `supported`.

    Raises:
        InputError: names the setting.
    """
    for field, value in supported.items():
        found = getattr(hf, field, None)
        if found is not None and found != value:
            raise InputError(
                f"config.json: {field}={found!r} is not supported for model_type {hf.model_type} "
                f"(only {value!r})"
            )


def decoder_config(
    hf: transformers.PreTrainedConfig, eos_ids: tuple[int, ...], **differences: Any
) -> DecoderConfig:
    """What all families have in common, with `differences` from Llama."""
    kinds = getattr(hf, "layer_types", None) or ["full_attention"] * hf.num_hidden_layers
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise InputError(f"config.json: layer_types {sorted(unknown)} are not supported")
    sliding = tuple(kind == "sliding_attention" for kind in kinds)
    if any(sliding):
        differences = {"sliding": sliding, "window": hf.sliding_window} | differences
    if "rope" not in differences:
        differences["rope"] = rope(hf.rope_parameters, hf.model_type)
    pad_id = getattr(hf, "pad_token_id", None)
    return DecoderConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        norm_eps=hf.rms_norm_eps,
        tied_head=hf.tie_word_embeddings,
        max_length=hf.max_position_embeddings,
        eos_ids=eos_ids,
        pad_id=pad_id if pad_id is not None else (*eos_ids, 0)[0],
        **differences,
    )


def rope(parameters: Mapping[str, Any], model_type: str) -> Rope:
    """`rope_parameters`, as transformers 5 makes them of any older form, as ours.

    Raises:
        InputError: a kind of scaling that this code does not implement.
    """
    parameters = dict(parameters)
    kind, theta = parameters.pop("rope_type", "default"), parameters.pop("rope_theta")
    if parameters.pop("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(
            f"config.json: partial_rotary_factor is not supported for model_type {model_type}"
        )
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, parameters["factor"])
    if kind == "llama3":
        return Rope(theta, parameters.pop("factor"), SlowStretch(**parameters))
    raise InputError(
        f"config.json: rope type {kind!r} is not supported for model_type {model_type} "
        "(default, linear, llama3)"
    )
