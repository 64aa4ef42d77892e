"""Random tiny models in Hugging Face format, written without PyTorch."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from safetensors.numpy import save_file

from scripts.pretrain.bpe import train_bpe

VOCABULARY = 320
TEXT = (
    "A small model reads what its user has written, and writes as the user would: titles, reviews, "
    "tweets and scores. Personalisation of frozen language models needs no training for new users."
)
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
T5 = {
    "vocab_size": 24,
    "d_model": 32,
    "d_kv": 12,  # not D / heads
    "d_ff": 48,
    # transformers cannot generate with a decoder that is deeper than the encoder.
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "decoder_start_token_id": 0,
}
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
STD = 0.23  # larger than usual, so that the logits are not all alike
T5_STD = {"shared": 1.0, "lm_head": 1.0, "q": 0.1}  # it divides no scores by their width's root
Shapes = Iterator[tuple[str, tuple[int, ...]]]


def _llama_shapes(config: transformers.LlamaConfig) -> Shapes:
    size, mlp = config.hidden_size, config.intermediate_size
    inner, kv = (
        n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads)
    )
    yield "model.embed_tokens", (config.vocab_size, size)
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        for name, width in (("q", inner), ("k", kv), ("v", kv)):
            yield f"{layer}.self_attn.{name}_proj", (width, size)
        yield f"{layer}.self_attn.o_proj", (size, inner)
        for name in ("gate", "up"):
            yield f"{layer}.mlp.{name}_proj", (mlp, size)
        yield f"{layer}.mlp.down_proj", (size, mlp)
        yield f"{layer}.input_layernorm", (size,)
        yield f"{layer}.post_attention_layernorm", (size,)
    yield "model.norm", (size,)
    if not config.tie_word_embeddings:
        yield "lm_head", (config.vocab_size, size)


def _bert_shapes(config: transformers.BertConfig) -> Shapes:
    size, mlp = config.hidden_size, config.intermediate_size
    yield "embeddings.word_embeddings", (config.vocab_size, size)
    yield "embeddings.position_embeddings", (config.max_position_embeddings, size)
    yield "embeddings.token_type_embeddings", (config.type_vocab_size, size)
    yield "embeddings.LayerNorm", (size,)
    for i in range(config.num_hidden_layers):
        layer = f"encoder.layer.{i}"
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            yield f"{layer}.attention.{name}", (size, size)
        yield f"{layer}.attention.output.LayerNorm", (size,)
        yield f"{layer}.intermediate.dense", (mlp, size)
        yield f"{layer}.output.dense", (size, mlp)
        yield f"{layer}.output.LayerNorm", (size,)
    yield "pooler.dense", (size, size)


def _t5_shapes(config: transformers.T5Config) -> Shapes:
    size, mlp, inner = config.d_model, config.d_ff, config.num_heads * config.d_kv
    yield "shared", (config.vocab_size, size)
    parts = (("encoder", config.num_layers, 1), ("decoder", config.num_decoder_layers, 2))
    for part, layers, attentions in parts:
        for i in range(layers):
            for j, kind in enumerate(("SelfAttention", "EncDecAttention")[:attentions]):
                layer = f"{part}.block.{i}.layer.{j}"
                for name in "qkv":
                    yield f"{layer}.{kind}.{name}", (inner, size)
                yield f"{layer}.{kind}.o", (size, inner)
                if i == j == 0:
                    buckets = config.relative_attention_num_buckets
                    yield f"{layer}.{kind}.relative_attention_bias", (buckets, config.num_heads)
                yield f"{layer}.layer_norm", (size,)
            layer = f"{part}.block.{i}.layer.{attentions}"
            for name in ("wi_0", "wi_1"):
                yield f"{layer}.DenseReluDense.{name}", (mlp, size)
            yield f"{layer}.DenseReluDense.wo", (size, mlp)
            yield f"{layer}.layer_norm", (size,)
        yield f"{part}.final_layer_norm", (size,)
    yield "lm_head", (config.vocab_size, size)


def _save(
    path: Path, architecture: str, config: transformers.PreTrainedConfig, shapes: Shapes
) -> None:
    """Writes the config and random weights; norms and biases are not all ones or zeros."""
    config.architectures = [architecture]
    config.save_pretrained(path)
    random, tensors = np.random.default_rng(0), {}
    for name, shape in shapes:
        if len(shape) == 1:
            tensors[f"{name}.weight"] = 1 + random.normal(0, 0.1, shape)
        else:
            std = T5_STD.get(name.rpartition(".")[2], STD)
            tensors[f"{name}.weight"] = random.normal(0, std, shape)
        if architecture == "BertModel" and "_embeddings" not in name:
            tensors[f"{name}.bias"] = random.normal(0, 0.1, shape[:1])
    tensors = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def save_llama(path: Path, **settings: Any) -> Path:
    """A Llama (D 32, 2 layers, 4 heads, 2 KV heads, but for `settings`) and its tokenizer."""
    config = transformers.LlamaConfig(**(LLAMA | settings))
    _save(path, "LlamaForCausalLM", config, _llama_shapes(config))
    generation = {name: getattr(config, name) for name in SPECIAL_IDS}
    (path / "generation_config.json").write_text(json.dumps(generation))
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    train_bpe([TEXT], VOCABULARY, special).save_pretrained(path)
    return path


def save_bert(path: Path, **settings: Any) -> Path:
    """A BERT (E 32, 2 layers, 128 positions, but for `settings`) and its tokenizer."""
    config = transformers.BertConfig(**(BERT | settings))
    _save(path, "BertModel", config, _bert_shapes(config))
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = train_bpe([TEXT], VOCABULARY, special, template="[CLS] $A [SEP]")
    tokenizer.save_pretrained(path)
    return path


def save_t5(path: Path, **settings: Any) -> Path:
    """A T5 with a head of its own, without a tokenizer."""
    config = transformers.T5Config(**(T5 | settings))
    _save(path, "T5ForConditionalGeneration", config, _t5_shapes(config))
    return path
