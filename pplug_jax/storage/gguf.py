"""LLMs in a .gguf file, llama.cpp's format, read by the `gguf` package.

Such a file is presented as a directory in Hugging Face format, whose weights are the file itself:
its matrices are dequantised as they are read. The tokenizer is what `transformers` makes of it.
"""

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import numpy as np
import transformers

from pplug_jax.errors import InputError
from pplug_jax.storage.files import whole

PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)

# llama.cpp's architecture -> model_type.
MODEL_TYPES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
}

# llama.cpp's name of a setting, behind its architecture -> config.json's.
SETTINGS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}

# llama.cpp's name of a tensor, without its layer -> `transformers`'.
TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Gemma 2 and 3 normalise before and behind the MLP.
AROUND_MLP = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
ROPE_DIVISORS = "rope_freqs.weight"  # how Llama 3.1's stretched RoPE is told
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def is_gguf(name: str) -> bool:
    return name.lower().endswith(".gguf")


def directory_of(file: Path) -> Path:
    """Return a directory that presents `file` as a model in Hugging Face format.

    It lies beside the hub's cache, under HF_HOME. It holds config.json, the tokenizer, and links to
    the file and its further parts, under their names.

    Raises:
        InputError: not a whole GGUF file, or an architecture or a tokenizer that is not supported.
    """
    file = file.absolute()  # not where a link leads to: the hub's cache has links to nameless files
    about = file.stat()
    # A copy keeps size and mtime where it is told to, but gets a ctime or an inode of its own.
    version = f"{file} {about.st_size} {about.st_mtime_ns} {about.st_ctime_ns} {about.st_ino}"
    key = f"{file.stem}-{hashlib.sha256(version.encode()).hexdigest()[:16]}"
    target = Path(huggingface_hub.constants.HF_HOME) / "gguf" / key
    if target.is_dir():
        return target
    config, tokenizer = read_config(file), _tokenizer(file, _reader(file))
    with whole(target) as made:
        made.mkdir()
        (made / "config.json").write_text(json.dumps(config, indent=1))
        tokenizer.save_pretrained(made)
        for part in parts(file):
            (made / part.name).symlink_to(part)
    return target


def parts(file: Path) -> list[Path]:
    """Return the files that `file` is the first of, itself included.

    Raises:
        FileNotFoundError: one is missing.
        InputError: `file` is not the first.
    """
    numbered = PART.search(file.name)
    if numbered is None:
        return [file]
    if int(numbered[1]) != 1:
        raise InputError(f"{file}: this is part {int(numbered[1])} of the LLM; name the first one")
    stem, count = file.name.removesuffix(numbered[0]), int(numbered[2])
    names = (f"{stem}-{i:05}-of-{count:05}{file.suffix}" for i in range(1, count + 1))
    files = [file.with_name(name) for name in names]
    if missing := [str(part) for part in files if not part.is_file()]:
        raise FileNotFoundError(f"{', '.join(missing)}: no such weight file")
    return files


def _reader(file: Path) -> Any:
    return _opened(file, file.stat().st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _opened(file: Path, changed: int) -> Any:
    """Return a file's reader, which lists every token and so is made once."""
    del changed  # part of the key
    try:
        return gguf.GGUFReader(file)
    except (ValueError, IndexError, KeyError, TypeError, OSError) as error:
        raise InputError(f"{file}: not a whole GGUF file ({error}); fetch it again") from error


def _value(reader: Any, name: str) -> Any:
    """Return the value of a field, or None if the file lacks it."""
    field = reader.get_field(name)
    return None if field is None else field.contents()


def _architecture(file: Path) -> str:
    architecture = _value(_reader(parts(file)[0]), "general.architecture")
    if architecture not in MODEL_TYPES:
        raise InputError(
            f"{file}: the architecture {architecture!r} is not supported; supported: "
            f"{', '.join(MODEL_TYPES)}"
        )
    return architecture


def read_config(file: Path) -> dict[str, Any]:
    """Return what config.json would say of the LLM.

    Raises:
        InputError: a setting is missing or not supported; the message names it.
    """
    reader, architecture = _reader(file), _architecture(file)

    def setting(name: str) -> Any:
        return _value(reader, f"{architecture}.{name}")

    config = _settings(reader, architecture)
    names = {tensor.name for part in parts(file) for tensor in _reader(part).tensors}
    embedding = next((t for t in reader.tensors if t.name == "token_embd.weight"), None)
    for field in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
        if field not in config:
            raise InputError(f"{file}: the file lacks {field}; it holds no whole LLM")
    if embedding is None:
        raise InputError(f"{file}: the file lacks token_embd.weight; it holds no whole LLM")
    config |= {
        "model_type": MODEL_TYPES[architecture],
        "vocab_size": int(embedding.shape[1]),
        "tie_word_embeddings": "output.weight" not in names,
        "bos_token_id": _value(reader, "tokenizer.ggml.bos_token_id"),
        "pad_token_id": _value(reader, "tokenizer.ggml.padding_token_id"),
        "eos_token_id": _stops(reader),
    }
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    config |= _rope(file, reader, setting)
    if architecture in ("gemma2", "gemma3"):
        # The file does not say it: all take a head's width but for the two of 27 B.
        is_27b = config["num_hidden_layers"] == {"gemma2": 46, "gemma3": 62}[architecture]
        heads = config["num_attention_heads"]
        config["query_pre_attn_scalar"] = (
            config["hidden_size"] // heads if is_27b else config["head_dim"]
        )
    return config


def _settings(reader: Any, architecture: str) -> dict[str, Any]:
    """Return what the file itself says of SETTINGS, by config.json's names."""
    settings = {ours: _value(reader, f"{architecture}.{name}") for name, ours in SETTINGS.items()}
    settings = {name: value for name, value in settings.items() if value is not None}
    if "num_attention_heads" in settings:
        settings.setdefault("num_key_value_heads", settings["num_attention_heads"])
    return settings


def _stops(reader: Any) -> list[int]:
    """Return the tokens at which decoding ends: that of the text and that of a chat's turn."""
    names = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = (_value(reader, f"tokenizer.ggml.{name}") for name in names)
    return list(dict.fromkeys(int(id) for id in ids if id is not None))


def _rope(file: Path, reader: Any, setting: Any) -> dict[str, Any]:
    theta, factor = setting("rope.freq_base"), setting("rope.scaling.factor")
    kind = setting("rope.scaling.type")
    scaling: dict[str, Any] = {"rope_type": "default"}
    divisors = next((t for t in reader.tensors if t.name == ROPE_DIVISORS), None)
    if divisors is not None:
        scaling = {"rope_type": "llama3", "factor": float(divisors.data.max()), **LLAMA3}
        head_dim = 2 * divisors.data.size
        if not np.allclose(divisors.data, _llama3_divisors(theta, head_dim, scaling), rtol=1e-3):
            raise InputError(f"{file}: {ROPE_DIVISORS} is not Llama 3's; it is not supported")
    elif kind == "linear" and factor:
        scaling = {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        original = setting("rope.scaling.original_context_length")
        scaling = {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
        }
    elif kind not in (None, "none", "linear"):
        raise InputError(f"{file}: rope.scaling.type {kind!r} is not supported")
    if _value(reader, "general.architecture") == "gemma3":
        local = setting("rope.freq_base_swa") or setting("rope.local.freq_base") or 10000.0
        full = {"rope_theta": theta, **scaling}
        near = {"rope_theta": local, "rope_type": "default"}
        return {"rope_parameters": {"full_attention": full, "sliding_attention": near}}
    return {"rope_parameters": {"rope_theta": theta or 10000.0, **scaling}}


def _llama3_divisors(theta: float, head_dim: int, scaling: Mapping[str, Any]) -> np.ndarray:
    """Return what each frequency is divided by, (head_dim / 2,)."""
    turns = scaling["original_max_position_embeddings"] / (
        2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    )
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1 / ((1 - smooth) / scaling["factor"] + smooth)


def _tokenizer(file: Path, reader: Any) -> transformers.PreTrainedTokenizerBase:
    try:
        from transformers.integrations.gguf import GGUF_TOKENIZER_MAPPING, convert_gguf_tokenizer
    except ImportError as error:
        raise InputError(
            f"{file}: `pip install -U transformers`: this version lacks what reads its tokenizer"
        ) from error
    parts: dict[str, dict[str, Any]] = {}
    for group, names in GGUF_TOKENIZER_MAPPING.items():
        values = {ours: _value(reader, f"tokenizer.{name}") for name, ours in names.items()}
        parts[group] = {name: value for name, value in values.items() if value is not None}
    tokens = parts["tokenizer"].get("tokens")
    if tokens is None:
        raise InputError(f"{file}: there is no tokenizer in the file")
    try:
        backend, _ = convert_gguf_tokenizer(_architecture(file), parts["tokenizer"])
    except ValueError as error:
        raise InputError(f"{file}: {error}") from error
    special = {
        name: tokens[int(id)]
        for name, field in {
            "bos_token": "bos_token_id",
            "eos_token": "eos_token_id",
            "pad_token": "padding_token_id",
            "unk_token": "unknown_token_id",
        }.items()
        if (id := _value(reader, f"tokenizer.ggml.{field}")) is not None
    }
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = parts["tokenizer_config"].get("chat_template")
    return tokenizer


class _Tensor:
    """A matrix of which some rows are dequantised at a time.

    Args:
        tensor: the reader's tensor.
        order: where each of our rows lies in the file; None if they lie as ours.
        offset: what the file adds to each value.
    """

    def __init__(self, tensor: Any, order: np.ndarray | None, offset: float):
        self.tensor, self.order, self.offset = tensor, order, offset

    def get_shape(self) -> tuple[int, ...]:
        return tuple(int(size) for size in self.tensor.shape[::-1])

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        rows = index[0] if self.order is None else self.order[index[0]]
        values = gguf.dequantize(self.tensor.data[rows], self.tensor.tensor_type)
        return values[(slice(None), *index[1:])] - np.float32(self.offset)


def tensors(file: Path) -> Iterable[tuple[str, _Tensor]]:
    """Yield the file's tensors under the names that they have in `transformers`."""
    first = parts(_first(file))[0]
    architecture = _architecture(first)
    config = _settings(_reader(first), architecture)  # without a look into all the other parts
    names = TENSORS | (AROUND_MLP if architecture in ("gemma2", "gemma3") else {})
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for tensor in _reader(file).tensors:
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", tensor.name)
        if tensor.name == ROPE_DIVISORS:
            continue
        if match is None or match[2] not in names:
            yield tensor.name, _Tensor(tensor, None, 0.0)  # refused by name, where it is loaded
            continue
        layer, name, kind = match.groups()
        order, offset = None, 0.0
        if architecture == "llama" and name in heads:
            # llama.cpp rotates neighbouring dimensions where `transformers` rotates halves.
            rows = np.arange(int(tensor.shape[-1]))
            order = rows.reshape(heads[name], -1, 2).swapaxes(1, 2).reshape(-1)
        if architecture.startswith("gemma") and name.endswith("norm"):
            offset = 1.0  # Gemma's norms scale by 1 + weight, which is what the file holds
        place = "" if layer is None else f"model.layers.{layer}."
        yield f"{place}{names[name]}.{kind}", _Tensor(tensor, order, offset)


def _first(file: Path) -> Path:
    numbered = PART.search(file.name)
    if numbered is None:
        return file
    stem = file.name.removesuffix(numbered[0])
    return file.with_name(f"{stem}-00001-of-{numbered[2]}{file.suffix}")
