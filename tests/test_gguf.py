"""LLMs in llama.cpp's files, against the models that they were made from and `transformers`."""

import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import huggingface_hub
import jax
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file

from pplug_jax.llm import load_llm
from pplug_jax.llm.decoder import Decoder
from pplug_jax.storage import hf
from pplug_jax.storage.gguf import directory_of
from pplug_jax.storage.hub import local_directory
from scripts.pretrain.bpe import train_bpe
from tests.support.models import TEXT, VOCABULARY, save_llama
from tests.support.parity import needs_torch, torch

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# architecture -> transformers' config, its settings.
CASES: dict[str, tuple[type[transformers.PreTrainedConfig], dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, {"tie_word_embeddings": True}),
    "llama, untied": (transformers.LlamaConfig, {"rope_parameters": LLAMA3}),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": False}),
    # transformers does not read the width of Qwen 3's heads, and takes 128.
    "qwen3": (transformers.Qwen3Config, {"tie_word_embeddings": True, "head_dim": 128}),
    "gemma": (transformers.GemmaConfig, {}),
    "gemma2": (transformers.Gemma2Config, {"sliding_window": 5, "query_pre_attn_scalar": 32}),
    "gemma3": (transformers.Gemma3TextConfig, {"sliding_window": 5, "query_pre_attn_scalar": 32}),
}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


class Original(NamedTuple):
    """A model that files are made from: its logits, its settings and its tensors."""

    logits: Callable[[np.ndarray], np.ndarray]
    config: transformers.PreTrainedConfig
    tensors: dict[str, np.ndarray]


def logits_of(llm: Decoder, tokens: np.ndarray) -> jax.Array:
    return llm.logits(llm.embed(tokens), np.ones(tokens.shape, bool))


def of_torch(model: transformers.PreTrainedModel) -> Callable[[np.ndarray], np.ndarray]:
    def logits(tokens: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return model(input_ids=torch.tensor(tokens)).logits.numpy()

    return logits


def of_files(path: Path, settings: dict[str, Any]) -> Original:
    """A Llama made without PyTorch."""
    path.mkdir()
    llm = load_llm(save_llama(path, **settings), dtype="float32")
    tensors = load_file(path / "model.safetensors")
    config = transformers.LlamaConfig(**settings)
    return Original(functools.partial(logits_of, llm), config, tensors)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Original:
    settings = SIZES | CASES["llama"][1]
    return of_files(tmp_path_factory.mktemp("plain") / "llama", settings)


def of_transformers(case: str) -> Original:
    kind, settings = CASES[case]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        kind(**(SIZES | settings)), attn_implementation="eager"
    ).eval()
    with torch.no_grad():  # norms that are all alike would hide a mistake
        for name, weight in model.named_parameters():
            if "norm" in name or "bias" in name:
                weight.add_(torch.randn_like(weight) * 0.3)
    config = model.config
    tensors = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
    if config.rope_parameters.get("rope_type") == "llama3":
        inverse = model.model.rotary_emb.inv_freq.numpy()
        powers = np.arange(0, config.head_dim, 2) / config.head_dim
        plain = config.rope_parameters["rope_theta"] ** -powers
        tensors["rope_freqs.weight"] = (plain / inverse).astype(np.float32)
    return Original(of_torch(model), config, tensors)


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """A projection's rows as llama.cpp's own conversion orders them for its rotation."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write(file: Path, model: Original, kind: str = "F32", split: int = 0) -> None:
    """Writes a model as llama.cpp's converter would."""
    config, quantised = model.config, gguf.GGMLQuantizationType[kind]
    architecture = config.model_type.removesuffix("_text")
    writer = gguf.GGUFWriter(file, architecture, split_max_tensors=split)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    ropes = config.rope_parameters
    writer.add_rope_freq_base(ropes.get("full_attention", ropes)["rope_theta"])
    if architecture in ("gemma2", "gemma3"):
        writer.add_sliding_window(config.sliding_window)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    tokenizer = train_bpe([TEXT], VOCABULARY, SPECIAL)
    backend = tokenizer.backend_tokenizer
    tokens = [backend.id_to_token(i) for i in range(VOCABULARY)]
    merges = json.loads(backend.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL.values() else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    writer.add_eot_token_id(5)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    names = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers
    )
    for name, weight in model.tensors.items():
        if name.startswith("rope_freq"):
            writer.add_tensor(name, weight)
            continue
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            weight = weight + 1
        if architecture == "llama" and ".q_proj." in name:
            weight = permuted(weight, config.num_attention_heads)
        if architecture == "llama" and ".k_proj." in name:
            weight = permuted(weight, config.num_key_value_heads)
        name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if weight.ndim == 1 or kind == "F32":
            writer.add_tensor(name, np.ascontiguousarray(weight))
        else:
            packed = gguf.quants.quantize(weight, quantised)
            writer.add_tensor(name, packed, raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def compare(
    file: Path, theirs: Callable[[np.ndarray], np.ndarray], tolerance: float = 1e-4
) -> None:
    llm = load_llm(local_directory(file), dtype="float32")
    tokens = np.random.default_rng(0).integers(3, VOCABULARY, (2, 23))
    expected = theirs(tokens)
    found = logits_of(llm, tokens)
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max())
    assert llm.config.eos_ids == (1, 5)
    assert llm.config.pad_id == 2


@pytest.mark.slow
@needs_torch
@pytest.mark.parametrize("case", CASES)
def test_a_file_is_the_model_that_it_was_made_from(tmp_path: Path, case: str) -> None:
    file, model = tmp_path / "any name.gguf", of_transformers(case)
    write(file, model)
    compare(file, model.logits)


@pytest.mark.slow
@needs_torch
@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
@pytest.mark.parametrize("case", ["llama", "qwen3"])
def test_quantised_matrices_are_those_of_transformers(tmp_path: Path, case: str, kind: str) -> None:
    file = tmp_path / "model.gguf"
    write(file, of_transformers(case), kind)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype="float32"
    )
    compare(file, of_torch(theirs.eval()))


@needs_torch  # transformers reads GGUF with it
def test_the_tokenizer_is_that_of_transformers(tmp_path: Path, plain: Original) -> None:
    file = tmp_path / "model.gguf"
    write(file, plain)
    ours = hf.load_tokenizer(directory_of(file), VOCABULARY)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    for text in (TEXT, "two  blanks\n\tand <s> a tab", "ünïcödé 🙂", ""):
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(
            text, add_special_tokens=False
        )
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (0, 1, 2)
    assert ours.chat_template == "{{ messages[0]['content'] }}"


def test_a_file_in_parts(tmp_path: Path, plain: Original) -> None:
    write(tmp_path / "model.gguf", plain, split=8)
    files = sorted(tmp_path.glob("model-0000*-of-0000*.gguf"))
    assert len(files) > 2
    compare(files[0], plain.logits)
    files = [file.rename(file.with_suffix(".GGUF")) for file in files]
    compare(files[0], plain.logits)
    files[1].unlink()
    with pytest.raises(FileNotFoundError, match=f"{files[1].name}: no such weight file"):
        load_llm(local_directory(files[0]))


def test_the_second_of_several_parts_is_refused(tmp_path: Path, plain: Original) -> None:
    write(tmp_path / "model.gguf", plain, split=8)
    second = sorted(tmp_path.glob("model-0000*-of-0000*.gguf"))[1]
    with pytest.raises(ValueError, match=f"{second.name}: this is part 2 of the LLM; name the fir"):
        local_directory(second)


def test_parts_that_are_links_to_nameless_files(tmp_path: Path, plain: Original) -> None:
    """As the hub's cache keeps them."""
    (blobs := tmp_path / "blobs").mkdir()
    write(tmp_path / "model.gguf", plain, split=8)
    files = sorted(tmp_path.glob("model-0000*-of-0000*.gguf"))
    for i, file in enumerate(files):
        file.symlink_to(file.rename(blobs / f"{i:064x}"))
    compare(files[0], plain.logits)


def test_a_name_in_capitals(tmp_path: Path, plain: Original) -> None:
    write(tmp_path / "MODEL.GGUF", plain)
    compare(tmp_path / "MODEL.GGUF", plain.logits)


def test_a_file_that_was_moved(tmp_path: Path, plain: Original) -> None:
    (old := tmp_path / "old" / "model.gguf").parent.mkdir()
    (new := tmp_path / "new" / "model.gguf").parent.mkdir()
    write(old, plain)
    compare(old, plain.logits)
    old.rename(new)
    compare(new, plain.logits)


def test_files_that_differ_in_nothing_but_place_and_content(
    tmp_path: Path, plain: Original
) -> None:
    first, second = tmp_path / "first" / "model.gguf", tmp_path / "second" / "model.gguf"
    for file in (first, second):
        file.parent.mkdir()
    write(first, plain)
    write(second, plain)
    changed(SPECIAL["pad_token"], "<PAD>")(second)
    os.utime(second, ns=(0, first.stat().st_mtime_ns))
    assert second.stat().st_size == first.stat().st_size
    compare(first, plain.logits)
    tokenizers = [hf.load_tokenizer(local_directory(file), VOCABULARY) for file in (first, second)]
    assert [tokenizer.pad_token for tokenizer in tokenizers] == ["<pad>", "<PAD>"]
    shutil.copy2(second, first)
    os.utime(first, ns=(0, second.stat().st_mtime_ns))
    assert hf.load_tokenizer(local_directory(first), VOCABULARY).pad_token == "<PAD>"


def test_a_second_start_finds_the_directory_and_a_changed_file_another(
    tmp_path: Path, plain: Original
) -> None:
    file = tmp_path / "model.gguf"
    write(file, plain)
    first = directory_of(file)
    assert directory_of(file) == first
    file.unlink()
    write(file, other := of_files(tmp_path / "other", SIZES))
    assert directory_of(file) != first
    compare(file, other.logits)


def changed(key: str, value: str) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(file.read_bytes().replace(key.encode(), value.encode()))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:5000]), "not a whole GGUF file"),
        (lambda file: file.write_bytes(file.read_bytes()[:-5000]), "not a whole GGUF file"),
        (lambda file: file.write_bytes(b""), "not a whole GGUF file"),
        (lambda file: file.write_bytes(b"<html>no such page</html>"), "not a whole GGUF file"),
        (changed("llama", "mamba"), "architecture 'mamba' is not supported; supported: llama"),
        (changed("gpt2", "rwkv"), "rwkv"),
        (changed("llama.embedding_length", "llama.embedding_breadth"[:22]), "hidden_size"),
    ],
)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, plain: Original, damage: Callable[[Path], object], message: str
) -> None:
    file = tmp_path / "model.gguf"
    write(file, plain)
    damage(file)
    with pytest.raises(ValueError, match=rf"model\.gguf.*{message}|{message}"):
        load_llm(local_directory(file))


def test_a_tensor_of_another_architecture_is_refused_by_name(
    tmp_path: Path, plain: Original
) -> None:
    file = tmp_path / "model.gguf"
    unknown = {"rope_freqz.weight": np.ones(16, np.float32)}
    write(file, plain._replace(tensors=plain.tensors | unknown))
    with pytest.raises(ValueError, match=r"that this architecture does not: rope_freqz\.weight"):
        load_llm(local_directory(file))


REAL = {"smollm2_135m_instruct": 49152, "gemma3_270m": 262144}


@needs_torch
@pytest.mark.parametrize("name", REAL)
def test_real_files(name: str, real_gguf: Path) -> None:
    file, vocabulary = real_gguf / name / "model.gguf", REAL[name]
    llm = load_llm(directory_of(file), dtype="float32")
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype="float32"
    ).eval()
    tokenizer = hf.load_tokenizer(directory_of(file), vocabulary)
    tokens = np.array([tokenizer.encode(TEXT, add_special_tokens=False)])
    ours = llm.logits(llm.embed(tokens), np.ones(tokens.shape, bool))
    with torch.no_grad():
        theirs = reference(input_ids=torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())
