"""The Llama family: its config.json and its tensor names."""

from typing import Any

from pplug_jax.errors import InputError
from pplug_jax.hf import Source
from pplug_jax.llm.decoder import DecoderConfig, Llama3Rope

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

# Settings that would change the arithmetic: the values that this code implements.
SUPPORTED = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "pretraining_tp": (1,),
}


def config_from_hf(hf: dict[str, Any], eos_ids: tuple[int, ...]) -> DecoderConfig:
    """A Llama config.json as our config.

    Raises:
        InputError: a setting that this code does not implement.
    """
    for field, values in SUPPORTED.items():
        if hf.get(field, values[0]) not in values:
            raise InputError(
                f"config.json: {field}={hf[field]!r} is not supported for model_type llama "
                f"(only {values[0]!r})"
            )
    # transformers 5 writes rope_parameters; earlier versions rope_theta and rope_scaling.
    rope = (
        {"rope_theta": hf.get("rope_theta", 10000.0)}
        | (hf.get("rope_scaling") or {})
        | (hf.get("rope_parameters") or {})
    )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise InputError(
            f"config.json: rope type {kind!r} is not supported for model_type llama "
            "(default, llama3)"
        )
    return DecoderConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=hf["num_attention_heads"],
        num_kv_heads=hf.get("num_key_value_heads") or hf["num_attention_heads"],
        head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        rope_theta=rope["rope_theta"],
        rope_scaling=None
        if kind == "default"
        else Llama3Rope(
            rope["factor"],
            rope["low_freq_factor"],
            rope["high_freq_factor"],
            rope["original_max_position_embeddings"],
        ),
        tied_head=hf.get("tie_word_embeddings", False),
        max_length=hf.get("max_position_embeddings", 2048),
        eos_ids=eos_ids,
        pad_id=(*(i for i in [hf.get("pad_token_id")] if i is not None), *eos_ids, 0)[0],
    )
