"""Model directories that are whole, and every way in which they may not be."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file

from pplug_jax import hf
from pplug_jax.encoder import load_encoder
from pplug_jax.llm import llama, load_llm
from pplug_jax.llm.decoder import Decoder
from pplug_jax.mesh import make_mesh

LAYER = "model.layers.1.mlp.up_proj.weight"


def assert_same_weights(first: nnx.Module, second: nnx.Module) -> None:
    pairs = zip(
        nnx.to_flat_state(nnx.state(first)), nnx.to_flat_state(nnx.state(second)), strict=True
    )
    for (path, ours), (other_path, theirs) in pairs:
        assert path == other_path
        np.testing.assert_array_equal(ours[...], theirs[...])


def edit_tensors(path: Path, edit: Callable[[dict[str, np.ndarray]], object]) -> None:
    file = path / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


@pytest.fixture
def path(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama, to be broken."""
    return shutil.copytree(tiny_llama, tmp_path / "model")


@pytest.fixture
def sharded(tiny_llama: Path, tmp_path: Path) -> Path:
    """The tiny Llama in several files with an index."""
    path = tmp_path / "sharded"
    model = transformers.LlamaForCausalLM.from_pretrained(tiny_llama)
    model.save_pretrained(path, max_shard_size="50KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


def test_a_sharded_checkpoint_is_the_same_model(tiny_llama: Path, sharded: Path) -> None:
    assert_same_weights(load_llm(sharded, dtype="float32"), load_llm(tiny_llama, dtype="float32"))


@pytest.mark.parametrize(("tied", "vocab"), [(True, 320), (False, 320), (False, 331)])
def test_saved_weights_are_read_back(
    make_llama: Callable[..., Path], tmp_path: Path, tied: bool, vocab: int
) -> None:
    path = make_llama(tie_word_embeddings=tied, vocab_size=vocab)
    llm = load_llm(path, dtype="float32")
    shutil.copy(path / "config.json", tmp_path)
    hf.save_weights(llm, tmp_path, llama.SOURCES, np.float32)
    assert_same_weights(load_llm(tmp_path, dtype="float32"), llm)
    # transformers reads it too.
    first, second = (
        transformers.LlamaForCausalLM.from_pretrained(x).state_dict() for x in (path, tmp_path)
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_layers_read_in_pieces_are_the_same(
    make_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, quantize: str | None
) -> None:
    path, mesh = make_llama(num_hidden_layers=5), make_mesh(2, 2, 2)
    whole = load_llm(path, mesh=mesh, dtype="float32", quantize=quantize)
    monkeypatch.setattr(hf, "PIECE_BYTES", 2 * 4 * 64 * 32)  # two of five layers' `gate` kernels
    pieces = load_llm(path, mesh=mesh, dtype="float32", quantize=quantize)
    for ours, theirs in zip(*map(jax.tree.leaves, (pieces, whole)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such directory"):
        load_llm(tmp_path / "nowhere")


def test_no_config(path: Path) -> None:
    (path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"model/config\.json: no such file"):
        load_llm(path)


@pytest.mark.parametrize("content", [b'{"model_type": "llama",', b"\xff\xfe\x00", b""])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_broken_json(path: Path, name: str, content: bytes) -> None:
    (path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"model/{name}: not JSON"):
        load_llm(path)


def test_no_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors: no such weight file$"):
        load_llm(path)


def test_only_pytorch_weights(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"\.bin files are not read: convert them"):
        load_llm(path)


def test_a_missing_tensor(path: Path) -> None:
    edit_tensors(path, lambda tensors: tensors.pop(LAYER))
    with pytest.raises(ValueError, match=f"lacks the tensor {LAYER}"):
        load_llm(path)


def test_a_missing_head(path: Path) -> None:
    edit_tensors(path, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"lacks the tensor lm_head\.weight"):
        load_llm(path)


@pytest.mark.parametrize("shape", [(32, 64), (64, 31), (64, 32, 1)])
def test_a_misshapen_tensor(path: Path, shape: tuple[int, ...]) -> None:
    edit_tensors(path, lambda tensors: tensors.update({LAYER: np.zeros(shape, np.float32)}))
    with pytest.raises(ValueError) as error:
        load_llm(path)
    assert f"{LAYER} has shape {shape}, config.json asks for (64, 32)" in str(error.value)


def test_an_unexpected_tensor(path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    edit_tensors(path, lambda tensors: tensors.update({name: np.zeros(32, np.float32)}))
    with pytest.raises(ValueError, match=f"that this architecture does not: {name}"):
        load_llm(path)


def test_a_layer_too_many(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(ValueError, match=r"model\.layers\.1\.input_layernorm\.weight"):
        load_llm(path)


@pytest.mark.parametrize("kept", [0, 5, 500, 100_000])
def test_a_truncated_file(path: Path, kept: int) -> None:
    file = path / "model.safetensors"
    assert file.stat().st_size > kept
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file"):
        load_llm(path)


def test_a_truncated_encoder(tiny_bert: Path, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_bert, tmp_path / "encoder")
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:50_000])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file"):
        load_encoder(path)


def test_a_missing_shard(sharded: Path) -> None:
    (shard := sorted(sharded.glob("*.safetensors"))[1]).unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard.name}: no such weight file"):
        load_llm(sharded)


def test_a_broken_index(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json: not JSON"):
        load_llm(sharded)


def test_a_tokenizer_larger_than_the_embedding_table(tiny_llama: Path) -> None:
    assert len(hf.load_tokenizer(tiny_llama, 320)) == 320
    with pytest.raises(ValueError, match="has 320 entries, the embedding table only 319 rows"):
        hf.load_tokenizer(tiny_llama, 319)


def test_no_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"model: no tokenizer, which is one of tokenizer\.json"
    ):
        hf.load_tokenizer(path, 320)


def test_a_tied_model_may_store_its_head(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    # Under the name of an older multimodal model, too.
    name = "lm_head.weight"
    edit_tensors(path, lambda tensors: tensors.update({f"language_model.{name}": tensors[name]}))
    llm = load_llm(path)
    assert isinstance(llm, Decoder)
    assert llm.head is None
