"""The Gemma family: Gemma 1, 2 and the text part of 3."""

import transformers

from pplug_jax.errors import InputError
from pplug_jax.llm import llama
from pplug_jax.llm.decoder import DecoderConfig
from pplug_jax.storage.hf import Source

# Of Gemma 2 and 3; Gemma 1's are Llama's.
SOURCES = llama.SOURCES | {
    "layers.query_norm": Source("model.layers.{}.self_attn.q_norm.weight"),
    "layers.key_norm": Source("model.layers.{}.self_attn.k_norm.weight"),
    "layers.attention_post_norm": Source("model.layers.{}.post_attention_layernorm.weight"),
    "layers.mlp_norm": Source("model.layers.{}.pre_feedforward_layernorm.weight"),
    "layers.mlp_post_norm": Source("model.layers.{}.post_feedforward_layernorm.weight"),
}


def config_from_hf(hf: transformers.PreTrainedConfig, eos_ids: tuple[int, ...]) -> DecoderConfig:
    """Return our config of a Gemma.

    Raises:
        InputError: a setting that this code does not implement.
    """
    gelu = "gelu_pytorch_tanh"
    llama.check(
        hf,
        hidden_act=gelu,
        hidden_activation=gelu,
        attention_bias=False,
        use_bidirectional_attention=False,
    )
    differences = {
        "activation": "gelu_tanh",
        "embedding_scale": hf.hidden_size**0.5,
        "norm_offset": True,
    }
    if hf.model_type != "gemma":
        differences |= {
            "post_norms": True,
            "attention_scale": hf.query_pre_attn_scalar**-0.5,
            "logit_cap": hf.final_logit_softcapping,
        }
    if hf.model_type == "gemma2":
        differences["attention_cap"] = hf.attn_logit_softcapping
    if hf.model_type == "gemma3_text":
        llama.check(hf, attn_logit_softcapping=None)
        ropes = hf.rope_parameters
        if any(llama.attention_factor(rope) != 1.0 for rope in ropes.values()):
            raise InputError("config.json: rope type 'yarn' is not supported for gemma3_text")
        differences |= {
            "qk_norm": True,
            "rope": llama.rope(ropes["full_attention"], hf.model_type),
            "sliding_rope": llama.rope(ropes["sliding_attention"], hf.model_type),
        }
    return llama.decoder_config(hf, eos_ids, **differences)
