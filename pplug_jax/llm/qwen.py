"""The Qwen family: Qwen 2 and 2.5 (biases), Qwen 3 (normalised queries and keys)."""

import transformers

from pplug_jax.llm import llama
from pplug_jax.llm.decoder import DecoderConfig
from pplug_jax.storage.hf import Source

SOURCES = llama.SOURCES | {
    "layers.query_bias": Source("model.layers.{}.self_attn.q_proj.bias"),
    "layers.key_bias": Source("model.layers.{}.self_attn.k_proj.bias"),
    "layers.value_bias": Source("model.layers.{}.self_attn.v_proj.bias"),
    "layers.query_norm": Source("model.layers.{}.self_attn.q_norm.weight"),
    "layers.key_norm": Source("model.layers.{}.self_attn.k_norm.weight"),
}


def config_from_hf(hf: transformers.PreTrainedConfig, eos_ids: tuple[int, ...]) -> DecoderConfig:
    """Return our config of a Qwen.

    Raises:
        InputError: a setting that this code does not implement.
    """
    llama.check(hf, hidden_act="silu", attention_bias=False)
    first = hf.model_type == "qwen2"
    return llama.decoder_config(hf, eos_ids, qkv_bias=first, qk_norm=not first)
