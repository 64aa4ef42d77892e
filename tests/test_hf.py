"""Model directories that are whole, and every way in which they may not be."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file

from pplug_jax.encoder import load_encoder
from pplug_jax.llm import llama, load_llm
from pplug_jax.llm.decoder import Decoder
from pplug_jax.llm.load import abstract_llm
from pplug_jax.llm.prompts import Tokenizer
from pplug_jax.runtime.mesh import make_mesh
from pplug_jax.storage import hf
from pplug_jax.storage.tensors import read_tensors
from tests.support.parity import needs_torch, torch

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
    path.mkdir()
    shutil.copy(tiny_llama / "config.json", path)
    tensors = load_file(tiny_llama / "model.safetensors")
    names, where = sorted(tensors), {}
    for i in range(3):
        file = f"model-{i + 1:05}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names[i::3]}, path / file)
        where |= dict.fromkeys(names[i::3], file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
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
    if torch is None:
        return
    # transformers reads it too.
    first, second = (
        transformers.LlamaForCausalLM.from_pretrained(x).state_dict() for x in (path, tmp_path)
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
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


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_json_behind_a_byte_order_mark(tiny_llama: Path, path: Path, name: str) -> None:
    (path / name).write_bytes(b"\xef\xbb\xbf" + (path / name).read_bytes())
    assert_same_weights(load_llm(path, dtype="float32"), load_llm(tiny_llama, dtype="float32"))


@pytest.mark.parametrize("content", ["[]", "null", '"llama"'])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_json_that_is_no_object(path: Path, name: str, content: str) -> None:
    (path / name).write_text(content)
    with pytest.raises(ValueError, match=f"model/{name}: expected an object, found"):
        load_llm(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [("eos_token_id", [1, "</s>"]), ("eos_token_id", True), ("pad_token_id", [2])],
)
def test_a_token_that_is_no_id(path: Path, field: str, value: object) -> None:
    file = path / "generation_config.json"
    file.write_text(json.dumps({field: value}))
    with pytest.raises(ValueError, match=rf"generation_config\.json: {field} must be a token's id"):
        load_llm(path)


def test_no_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors: no such weight file$"):
        load_llm(path)


@needs_torch
def test_only_pytorch_weights(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: PyTorch finds it cut, or holding"):
        load_llm(path)  # safetensors under another name


@needs_torch
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shards", ["1GB", "50KB"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pytorchs_own_files(
    tiny_llama: Path, tmp_path: Path, dtype: str, shards: str, zipped: bool
) -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(tiny_llama, dtype=dtype)
    model.save_pretrained(tmp_path / "safe")
    (other := tmp_path / "pickled").mkdir()
    shutil.copy(tiny_llama / "config.json", other)
    names = sorted(model.state_dict())
    cut = len(names) if shards == "1GB" else len(names) // 2
    files = {"pytorch_model.bin": names[:cut], "pytorch_model-2.bin": names[cut:]}
    for file, held in files.items():
        tensors = {name: model.state_dict()[name] for name in held}
        torch.save(tensors, other / file, _use_new_zipfile_serialization=zipped)
    if cut < len(names):
        (other / "pytorch_model.bin").rename(other / "pytorch_model-1.bin")
        where = {name: "pytorch_model-1.bin" for name in names[:cut]}
        where |= {name: "pytorch_model-2.bin" for name in names[cut:]}
        (other / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    same = [load_llm(tmp_path / name, dtype="bfloat16") for name in ("safe", "pickled")]
    assert_same_weights(*same)


@needs_torch
def test_a_pickle_that_would_run_code_is_refused(path: Path, tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    (path / "model.safetensors").unlink()
    torch.save({"weight": Code()}, path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holding more than tensors"):
        load_llm(path)
    assert not (tmp_path / "ran").exists()


def test_without_pytorch_its_files_say_what_to_install(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: only PyTorch reads .*pip install"):
        read_tensors(path)


def test_one_whole_file_goes_before_an_old_index(path: Path, sharded: Path) -> None:
    weights = load_llm(path, dtype="float32")
    for file in sharded.glob("model*"):
        shutil.copy(file, path)
    for shard in path.glob("model-*.safetensors"):
        tensors = {name: np.zeros_like(array) for name, array in load_file(shard).items()}
        save_file(tensors, shard)
    assert_same_weights(load_llm(path, dtype="float32"), weights)
    for shard in path.glob("model-*.safetensors"):
        shard.unlink()
    assert_same_weights(load_llm(path, dtype="float32"), weights)


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


def test_an_index_that_names_no_files(sharded: Path) -> None:
    file = sharded / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    file.write_text(json.dumps({"weight_map": dict.fromkeys(index["weight_map"], 1)}))
    with pytest.raises(ValueError, match="'weight_map' must name a file for each tensor"):
        load_llm(sharded)


def test_an_index_that_names_files_of_another_format(path: Path) -> None:
    (path / "model.safetensors").rename(path / "model.msgpack")
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.msgpack"}}')
    with pytest.raises(ValueError, match=r"model\.msgpack: weights are read from \.safetensors, "):
        load_llm(path)


@pytest.fixture
def tokenizer(path: Path) -> transformers.PreTrainedTokenizerBase:
    """The copy's tokenizer, of 320 tokens, to be changed and saved there."""
    return transformers.AutoTokenizer.from_pretrained(path)


def test_a_token_that_a_text_can_give_must_have_a_row(path: Path) -> None:
    assert len(hf.load_tokenizer(path, 320)) == 320
    with pytest.raises(ValueError, match="can give the token .* with id 319, but the embedding"):
        hf.load_tokenizer(path, 319)


def test_a_special_token_behind_the_table_is_no_harm(
    path: Path, tokenizer: transformers.PreTrainedTokenizerBase
) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    tokenizer.save_pretrained(path)
    loaded = hf.load_tokenizer(path, 320)
    assert len(loaded) == 321
    prompts = Tokenizer(loaded, [1], vocab_size=320)
    assert max(prompts.prompt("what <image_soft_token> is", 99)) < 320
    prompts.tokenizer.chat_template = (
        "{{ '<image_soft_token>' }}{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"prefix has the token '<image_soft_token>' with id 320"):
        Tokenizer(prompts.tokenizer, [1], vocab_size=320, chat=True)


def test_an_added_token_that_a_text_can_give_is_named(
    path: Path, tokenizer: transformers.PreTrainedTokenizerBase
) -> None:
    tokenizer.add_tokens(["wholeword"])
    tokenizer.save_pretrained(path)
    with pytest.raises(ValueError, match="can give the token 'wholeword' with id 320"):
        hf.load_tokenizer(path, 320)


@pytest.mark.parametrize("name", ["bos_token", "eos_token"])
def test_a_bos_or_eos_without_a_row_is_named(
    path: Path, tokenizer: transformers.PreTrainedTokenizerBase, name: str
) -> None:
    tokenizer.add_special_tokens({name: "<far>"})
    with pytest.raises(ValueError, match="has the token '<far>' with id 320"):
        Tokenizer(tokenizer, [1, 320], vocab_size=320)


def test_a_byte_level_tokenizer_that_is_called_llamas_keeps_its_blanks(path: Path) -> None:
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "LlamaTokenizerFast"
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = hf.load_tokenizer(path, 320)
    text = "two words,  two blanks\nand a line"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    whole = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    assert ids == whole.encode(text, add_special_tokens=False).ids
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")


@pytest.mark.parametrize("kind", ["BertTokenizer", "T5Tokenizer", "XLNetTokenizer"])
def test_a_tokenizer_that_is_called_anothers_is_read_as_it_is(path: Path, kind: str) -> None:
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": kind}))
    tokenizer = hf.load_tokenizer(path, 320)
    whole = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    text = "two words,  two blanks"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == whole.encode(text, add_special_tokens=False).ids
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")


def test_a_tokenizer_behind_a_byte_order_mark_is_told_of(path: Path) -> None:
    file = path / "tokenizer.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    with pytest.raises(ValueError, match="byte order mark; save it as UTF-8 without one"):
        hf.load_tokenizer(path, 320)


def test_a_tokenizer_that_loses_blanks_is_refused(path: Path) -> None:
    whole = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    whole.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace("Ġ", ""), tokenizers.decoders.Fuse()]
    )
    whole.save(str(path / "tokenizer.json"))
    with pytest.raises(ValueError, match="loses the blanks between words"):
        hf.load_tokenizer(path, 320)


def test_a_broken_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="model: the tokenizer cannot be read"):
        hf.load_tokenizer(path, 320)


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model as T5's."""
    sentencepiece = pytest.importorskip("sentencepiece")
    directory = tmp_path_factory.mktemp("sentencepiece")
    (directory / "text").write_text("the two words\nwords and blanks between two words\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "text"),
        model_prefix=str(directory / "spiece"),
        vocab_size=23,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
    )
    return directory / "spiece.model"


def test_a_sentencepiece_model_alone(sentencepiece_file: Path, tmp_path: Path) -> None:
    shutil.copy(sentencepiece_file, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    tokenizer = hf.load_tokenizer(tmp_path, 200)
    ids = tokenizer.encode("two words", add_special_tokens=False)
    assert tokenizer.decode(ids) == "two words"


@pytest.mark.parametrize("kept", [10, 120_000, -1])
def test_a_sentencepiece_model_that_is_cut(
    sentencepiece_file: Path, tmp_path: Path, kept: int
) -> None:
    (tmp_path / "spiece.model").write_bytes(sentencepiece_file.read_bytes()[:kept])
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ValueError, match=r"spiece\.model is not a whole SentencePiece file"):
        hf.load_tokenizer(tmp_path, 200)


def test_special_tokens_in_a_text_are_no_control_tokens_of_t5(
    sentencepiece_file: Path, tmp_path: Path
) -> None:
    shutil.copy(sentencepiece_file, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    prompts = Tokenizer(hf.load_tokenizer(tmp_path, 200), [1], prompt_end=[1])
    tokenizer = prompts.tokenizer
    marked = prompts.ids("two </s> words <pad> and <extra_id_0> blanks")
    assert not {*marked} & {*tokenizer.all_special_ids}
    assert tokenizer.decode(marked).split() == ["two", "words", "and", "blanks"]
    assert prompts.prompt("two </s>", 99).tolist()[-1:] == [1]
    assert prompts.target("</s>", 99).tolist().count(1) == 1
    unknown = prompts.ids("two Ж words")
    assert tokenizer.unk_token_id in unknown


def test_without_sentencepiece_its_files_say_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "spiece.model").write_bytes(b"as if it were one")
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    monkeypatch.setattr(hf, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"spiece\.model: `pip install sentencepiece`"):
        hf.load_tokenizer(tmp_path, 200)


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
    names = ("lm_head.weight", "language_model.lm_head.weight")
    edit_tensors(
        path,
        lambda tensors: tensors.update(
            dict.fromkeys(names, tensors["model.embed_tokens.weight"].copy())
        ),
    )
    llm = load_llm(path)
    assert isinstance(llm, Decoder)
    assert llm.head is None


def test_a_head_that_differs_is_used_whatever_the_config_says(path: Path) -> None:
    untied = load_llm(path, dtype="float32")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert_same_weights(load_llm(path, dtype="float32"), untied)
    assert abstract_llm(path, dtype="float32", quantize=None).head is not None
    if torch is None:
        return
    model = transformers.LlamaForCausalLM.from_pretrained(path)
    np.testing.assert_array_equal(model.lm_head.weight.detach(), untied.head[...][:320])


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_alone_is_the_embedding_too(path: Path, tied: bool) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": tied}))
    head = load_file(path / "model.safetensors")["lm_head.weight"]
    edit_tensors(path, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    if tied:
        llm = load_llm(path, dtype="float32")
        assert llm.head is None
        np.testing.assert_array_equal(llm.embedding[...][:320], head)
    else:
        with pytest.raises(ValueError, match=r"lacks the tensor model\.embed_tokens\.weight"):
            load_llm(path)
