"""The published config.json of the checkpoints that the presets name, for planning without them.

They hold only what decides shapes, FLOPs and where decoding may end; `transformers` has the rest's
defaults. For Gemma 3 see also transformers' models/gemma3/convert_gemma3_weights.py: the published
checkpoints of 4B and more extend its embedding tables by 64 rows for images.
"""

import functools
import tempfile
from pathlib import Path
from typing import Any

import transformers


def _decoder(
    kind: Any, width: int, mlp: int, layers: int, heads: int, kv_heads: int, **settings: Any
) -> Any:
    return kind(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        **settings,
    )


_gemma3 = functools.partial(
    _decoder,
    transformers.Gemma3TextConfig,
    vocab_size=262208,
    head_dim=256,
    sliding_window=1024,
    eos_token_id=[1, 106],
)
_TEXT_ONLY = {"vocab_size": 262144, "sliding_window": 512}  # of those that read no images
_llama3 = functools.partial(
    _decoder,
    transformers.LlamaConfig,
    vocab_size=128256,
    max_position_embeddings=131072,
    eos_token_id=[128001, 128008, 128009],
)
_smollm2 = functools.partial(
    _decoder,
    transformers.LlamaConfig,
    vocab_size=49152,
    tie_word_embeddings=True,
    max_position_embeddings=8192,
    eos_token_id=2,
)
_qwen3 = functools.partial(
    _decoder,
    transformers.Qwen3Config,
    vocab_size=151936,
    head_dim=128,
    eos_token_id=[151645, 151643],
)


def _flan_t5(width: int, mlp: int, layers: int, heads: int) -> transformers.T5Config:
    return transformers.T5Config(  # type: ignore[call-arg]
        vocab_size=32128,
        d_model=width,
        d_kv=64,
        d_ff=mlp,
        num_layers=layers,
        num_heads=heads,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    )


PUBLISHED: dict[str, transformers.PreTrainedConfig] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": _smollm2(576, 1536, 30, 9, 3),
    "HuggingFaceTB/SmolLM2-360M-Instruct": _smollm2(960, 2560, 32, 15, 5),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": _smollm2(2048, 8192, 24, 32, 32),
    "google/gemma-3-270m-it": _gemma3(640, 2048, 18, 4, 1, **_TEXT_ONLY),
    "google/gemma-3-1b-it": _gemma3(1152, 6912, 26, 4, 1, **_TEXT_ONLY),
    "google/gemma-3-4b-it": _gemma3(2560, 10240, 34, 8, 4),
    "google/gemma-3-12b-it": _gemma3(3840, 15360, 48, 16, 8),
    "google/gemma-3-27b-it": _gemma3(5376, 21504, 62, 32, 16, head_dim=128),
    "google/gemma-2-9b-it": _decoder(
        transformers.Gemma2Config,
        *(3584, 14336, 42, 16, 8),
        vocab_size=256000,
        head_dim=256,
        eos_token_id=[1, 107],
    ),
    "meta-llama/Llama-3.2-1B-Instruct": _llama3(2048, 8192, 16, 32, 8, tie_word_embeddings=True),
    "meta-llama/Llama-3.1-8B-Instruct": _llama3(4096, 14336, 32, 32, 8),
    "meta-llama/Llama-3.3-70B-Instruct": _llama3(8192, 28672, 80, 64, 8),
    "Qwen/Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, 8, tie_word_embeddings=True),
    "Qwen/Qwen3-8B": _qwen3(4096, 12288, 36, 32, 8),
    "google/flan-t5-base": _flan_t5(768, 2048, 12, 12),
    "google/flan-t5-xxl": _flan_t5(4096, 10240, 24, 64),
    "BAAI/bge-base-en-v1.5": transformers.BertConfig(),  # BERT base, whose defaults these are
}


@functools.cache
def _written(name: str) -> tempfile.TemporaryDirectory:
    directory = tempfile.TemporaryDirectory(prefix="pplug_jax-")
    PUBLISHED[name].save_pretrained(directory.name)
    return directory


def published_directory(name: str) -> Path:
    """Return a directory with the config.json of `name`, a key of PUBLISHED, for this process."""
    return Path(_written(name).name)
