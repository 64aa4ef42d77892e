"""The text encoder against transformers' BERT, and its batching against one text at a time."""

import gzip
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file

from pplug_jax.encoder import Encoder, load_encoder
from pplug_jax.encoder.encode import load_bert, read_usage
from pplug_jax.nn.variables import Frozen
from pplug_jax.runtime.mesh import make_mesh
from tests.support.models import VOCABULARY
from tests.support.parity import needs_torch, torch

# Of one to a few hundred tokens, in no order, with what may trip a tokenizer.
TEXTS = [
    "A title",
    "What its user has written, and writes as the user would. " * 2,
    "",
    "x",
    "tweets and scores; " * 20,
    "Ünïcödé 文字 🙂",
    "A [SEP] B [CLS] [PAD]",
    "A small model reads its user.",
    "needs no training for new users",
]
BATCH = 4  # of every test, so that compiled functions are shared


def encode(encoder: Encoder, texts: list[str]) -> np.ndarray:
    return encoder.encode(texts, batch_size=BATCH)


def pooled(model: transformers.BertModel, tokens: np.ndarray, mask: np.ndarray, pooling: str):
    """transformers' last hidden states, and the unit vectors made of them."""
    mask = torch.tensor(mask)
    with torch.no_grad():
        states = model(torch.tensor(tokens).long(), mask.long()).last_hidden_state
    if pooling == "cls":
        vectors = states[:, 0]
    else:
        vectors = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return states.numpy(), torch.nn.functional.normalize(vectors, dim=-1).numpy()


@pytest.fixture(scope="module")
def encoder(tiny_bert: Path) -> Encoder:
    return load_encoder(tiny_bert)


@pytest.mark.slow
@needs_torch
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_attention_heads": 2, "hidden_size": 20, "intermediate_size": 33},
        {"num_hidden_layers": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-2},
    ],
)
def test_vectors_are_those_of_transformers(
    make_bert: Callable[..., Path], settings: dict, pooling: str
) -> None:
    path = make_bert(**settings)
    model = load_bert(
        path,
        make_mesh(devices=jax.devices()[:1]),
        pooling=pooling,
        variable=Frozen,
        dtype="float32",
    )
    lengths = np.array([19, 2, 7, 1])
    mask = np.arange(19) < lengths[:, None]
    tokens = np.random.default_rng(0).integers(0, 320, mask.shape, dtype=np.int32)
    states, vectors = pooled(
        transformers.BertModel.from_pretrained(path).eval(), tokens, mask, pooling
    )
    ours = jax.jit(lambda model: (model.hidden(tokens, mask), model(tokens, mask)))(model)
    np.testing.assert_allclose(ours[0][mask], states[mask], atol=1e-5 * np.abs(states).max())
    np.testing.assert_allclose(ours[1], vectors, atol=1e-5)


def test_both_kinds_of_variable(tiny_bert: Path) -> None:
    mesh = make_mesh(devices=jax.devices()[:1])
    for variable in (nnx.Param, Frozen):
        model = load_bert(tiny_bert, mesh, pooling="cls", variable=variable, dtype="float32")
        leaves = nnx.to_flat_state(nnx.state(model))
        assert {type(leaf) for _, leaf in leaves} == {variable}
    assert not nnx.to_flat_state(nnx.state(model, nnx.Param))


@pytest.mark.slow
def test_a_batch_is_its_texts_one_by_one(encoder: Encoder) -> None:
    done = []
    vectors = encoder.encode(TEXTS, batch_size=BATCH, on_batch=done.append)
    assert sum(done) == len(TEXTS)
    assert (vectors.shape, vectors.dtype) == ((len(TEXTS), encoder.size), np.float32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    for text, vector in zip(TEXTS, vectors, strict=True):
        np.testing.assert_allclose(encode(encoder, [text])[0], vector, atol=1e-5)
    # Unlike texts have unlike vectors, or the comparison would say nothing about the order.
    similar = vectors @ vectors.T - 2 * np.eye(len(TEXTS))
    assert similar.max() < 0.999


@needs_torch
def test_vectors_are_those_of_transformers_from_text(encoder: Encoder, tiny_bert: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_bert)
    model = transformers.BertModel.from_pretrained(tiny_bert).eval()
    for text, vector in zip(TEXTS, encode(encoder, TEXTS), strict=True):
        ids = tokenizer(text, split_special_tokens=True, truncation=True, max_length=128)
        tokens = np.array([ids["input_ids"]])
        _, expected = pooled(model, tokens, np.ones(tokens.shape, bool), "cls")
        np.testing.assert_allclose(vector, expected[0], atol=1e-5)


def test_no_texts(encoder: Encoder) -> None:
    vectors = encode(encoder, [])
    assert (vectors.shape, vectors.dtype) == ((0, encoder.size), np.float32)


def test_special_tokens_in_a_text_are_plain_text(encoder: Encoder) -> None:
    cls, sep, pad = (
        encoder.tokenizer.convert_tokens_to_ids(x) for x in ("[CLS]", "[SEP]", "[PAD]")
    )
    (ids,) = encoder.tokenize(["A [SEP] B [CLS] [PAD]"])
    assert (ids[0], ids[-1]) == (cls, sep)
    assert not {cls, sep, pad} & set(ids[1:-1])
    assert encoder.tokenizer.decode(ids[1:-1]) == "A [SEP] B [CLS] [PAD]"


def test_long_texts_are_cut_and_counted(tiny_bert: Path) -> None:
    encoder = load_encoder(tiny_bert, max_length=20)
    long = "tweets and scores; " * 20
    vectors = encode(encoder, [long, "short", long + "more", "x", long])
    assert encoder.cut_texts == 3
    assert len(encoder.tokenize([long])[0]) == 20
    np.testing.assert_allclose(vectors[0], vectors[2], atol=1e-6)
    encode(encoder, ["short"])
    assert encoder.cut_texts == 3


def test_fewer_positions_than_the_next_compiled_length(make_bert: Callable[..., Path]) -> None:
    encoder = load_encoder(make_bert(max_position_embeddings=40))
    assert encoder.max_length == 40
    texts = ["x" * 36, "y" * 100]
    assert [len(ids) for ids in encoder.tokenize(texts)] == [38, 40]
    vectors = encode(encoder, texts)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_the_fingerprint_tells_encoders_apart(tiny_bert: Path, tmp_path: Path) -> None:
    def other(name: str, file: str, old: str, new: str) -> Path:
        path = shutil.copytree(tiny_bert, tmp_path / name)
        text = (path / file).read_text()
        assert old in text
        (path / file).write_text(text.replace(old, new))
        return path

    weights = shutil.copytree(tiny_bert, tmp_path / "weights")
    with open(weights / "model.safetensors", "r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\0\0")
    copy = shutil.copytree(tiny_bert, tmp_path / "copy")
    vocabulary = shutil.copytree(tiny_bert, tmp_path / "vocabulary")
    (vocabulary / "vocab.txt").write_text("[PAD]")
    prints = [
        load_encoder(tiny_bert).fingerprint,
        load_encoder(tiny_bert, pooling="mean").fingerprint,
        load_encoder(tiny_bert, max_length=64).fingerprint,
        load_encoder(tiny_bert, dtype="bfloat16").fingerprint,
        load_encoder(weights).fingerprint,
        load_encoder(vocabulary).fingerprint,
        load_encoder(other("config", "config.json", "1e-12", "1e-05")).fingerprint,
        load_encoder(
            other(
                "tokenizer", "tokenizer.json", '"normalizer": null', '"normalizer": {"type": "NFC"}'
            )
        ).fingerprint,
    ]
    assert len(set(prints)) == len(prints)
    assert load_encoder(copy, pooling="cls").fingerprint == prints[0]


@pytest.mark.parametrize(
    ("modes", "expected"),
    [
        ({"cls_token": True, "mean_tokens": False}, "cls"),
        ({"cls_token": False, "mean_tokens": True, "max_tokens": False}, "mean"),
        (None, "cls"),
    ],
)
def test_pooling_is_read(
    tiny_bert: Path, tmp_path: Path, modes: dict[str, bool] | None, expected: str
) -> None:
    path = shutil.copytree(tiny_bert, tmp_path / "encoder")
    if modes is not None:
        (path / "1_Pooling").mkdir()
        settings = {f"pooling_mode_{mode}": on for mode, on in modes.items()}
        (path / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    assert load_encoder(path).model.pooling == expected
    assert load_encoder(path, pooling="mean").model.pooling == "mean"  # the argument wins


@pytest.mark.parametrize(
    "modes",
    [
        {},
        {"max_tokens": True},
        {"cls_token": True, "mean_tokens": True},
        {"mean_tokens": True, "max_tokens": True},
    ],
)
def test_other_poolings_are_refused(
    tiny_bert: Path, tmp_path: Path, modes: dict[str, bool]
) -> None:
    path = shutil.copytree(tiny_bert, tmp_path / "encoder")
    (path / "1_Pooling").mkdir()
    settings = {f"pooling_mode_{mode}": on for mode, on in modes.items()}
    (path / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"1_Pooling/config\.json: pooling by"):
        load_encoder(path)


@pytest.mark.parametrize(
    ("settings", "pooling"),
    [
        ({"embedding_dimension": 32, "pooling_mode": "mean", "include_prompt": True}, "mean"),
        ({"embedding_dimension": 32, "pooling_mode": "cls", "include_prompt": False}, "cls"),
        ({"pooling_mode": ["mean"]}, "mean"),
        ({"pooling_mode_mean_tokens": True, "include_prompt": True}, "mean"),
    ],
)
def test_pooling_as_every_version_writes_it(
    tiny_bert: Path, tmp_path: Path, settings: dict[str, Any], pooling: str
) -> None:
    path = shutil.copytree(tiny_bert, tmp_path / "encoder")
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    assert load_encoder(path).model.pooling == pooling


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pooling_mode": "lasttoken"}, "pooling by lasttoken is not supported"),
        ({"pooling_mode": ["cls", "mean"]}, "pooling by cls and mean is not supported"),
        ({"embedding_dimension": 32}, "pooling by nothing is not supported"),
        ({"pooling_mode_max_tokens": True}, "pooling by pooling_mode_max_tokens"),
        ({"pooling_mode": "mean", "include_prompt": False}, "include_prompt=false"),
    ],
)
def test_another_pooling_is_refused_by_name_with_a_way_round(
    tiny_bert: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    path = shutil.copytree(tiny_bert, tmp_path / "encoder")
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=rf"{message}.*--config\.encoder\.pooling=cls\|mean"):
        load_encoder(path)
    assert load_encoder(path, pooling="mean").model.pooling == "mean"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"sentence_bert_config.json": {"max_seq_length": 7}}, 7),
        ({"sentence_bert_config.json": {"max_seq_length": None}}, 128),
        (
            {
                "sentence_bert_config.json": {"max_seq_length": None},
                "tokenizer_config.json": {"model_max_length": None},
            },
            128,
        ),
        ({"sentence_bert_config.json": {"max_seq_length": 9999}}, 128),
        ({"tokenizer_config.json": {"model_max_length": 9}}, 9),
        (
            {
                "sentence_bert_config.json": {"max_seq_length": 12},
                "tokenizer_config.json": {"model_max_length": 9},
            },
            12,
        ),
    ],
)
def test_the_directorys_length_is_the_ceiling(
    tiny_bert: Path, tmp_path: Path, files: dict[str, dict[str, Any]], expected: int
) -> None:
    path = shutil.copytree(tiny_bert, tmp_path / "encoder")
    for name, settings in files.items():
        there = json.loads((path / name).read_text()) if (path / name).is_file() else {}
        (path / name).write_text(json.dumps(there | settings))
    assert load_encoder(path).max_length == expected
    assert load_encoder(path, max_length=5).max_length == 5
    assert max(map(len, load_encoder(path).tokenize(["a word " * 99]))) == expected


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("sentence_bert_config.json", "max_seq_length"),
        ("tokenizer_config.json", "model_max_length"),
    ],
)
@pytest.mark.parametrize("length", ["long", 2, [512]])
def test_a_length_that_is_none_is_refused(
    tiny_bert: Path, tmp_path: Path, name: str, key: str, length: Any
) -> None:
    path = shutil.copytree(tiny_bert, tmp_path / "encoder")
    there = json.loads((path / name).read_text()) if (path / name).is_file() else {}
    (path / name).write_text(json.dumps(there | {key: length}))
    with pytest.raises(ValueError, match=f"encoder/{name}: the longest text is"):
        read_usage(path)


@pytest.mark.parametrize(
    ("about", "query", "item"),
    [
        ({}, "", ""),
        ({"prompts": None}, "", ""),
        ({"prompts": {"query": None, "document": "d "}}, "", "d "),
        ({"prompts": {"any": None}, "default_prompt_name": "any"}, "", ""),
        ({"prompts": {"query": "query: ", "document": "passage: "}}, "query: ", "passage: "),
        ({"prompts": {"query": "q ", "passage": "p "}}, "q ", "p "),
        ({"prompts": {"query": "q ", "any": "a "}, "default_prompt_name": "any"}, "q ", "a "),
    ],
)
def test_the_directorys_prompts_are_the_default(
    tiny_bert: Path, tmp_path: Path, about: dict[str, Any], query: str, item: str
) -> None:
    path = shutil.copytree(tiny_bert, tmp_path / "encoder")
    (path / "config_sentence_transformers.json").write_text(json.dumps(about))
    encoder = load_encoder(path)
    assert (encoder.query_prefix, encoder.item_prefix) == (query, item)
    own = load_encoder(path, query_prefix="", item_prefix="own: ")
    assert (own.query_prefix, own.item_prefix) == ("", "own: ")
    assert (own.fingerprint == encoder.fingerprint) == (item == "own: ")


def test_an_encoder_of_small_letters(tiny_bert: Path, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_bert, tmp_path / "encoder")
    (path / "sentence_bert_config.json").write_text(json.dumps({"do_lower_case": True}))
    encoder = load_encoder(path)
    assert encoder.tokenize(["A Small Model"]) == encoder.tokenize(["a small model"])


def test_norms_named_as_tensorflow_does(tiny_bert: Path, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_bert, tmp_path / "encoder")
    tensors = load_file(path / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): array
        for name, array in tensors.items()
    }
    assert old.keys() != tensors.keys()
    save_file(old, path / "model.safetensors")
    np.testing.assert_array_equal(
        encode(load_encoder(path), TEXTS), encode(load_encoder(tiny_bert), TEXTS)
    )


def test_an_unknown_pooling_is_refused(tiny_bert: Path) -> None:
    with pytest.raises(ValueError, match="pooling 'max' is not supported; supported: cls, mean"):
        load_encoder(tiny_bert, pooling="max")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"model_type": "roberta"}, "model_type 'roberta' is not supported as an encoder"),
        ({"hidden_act": "relu"}, "hidden_act='relu' is not supported"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ({"is_decoder": True}, "is_decoder=True is not supported"),
    ],
)
def test_settings_that_are_not_implemented_are_refused(
    tiny_bert: Path, tmp_path: Path, setting: dict, message: str
) -> None:
    path = shutil.copytree(tiny_bert, tmp_path / "encoder")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | setting))
    with pytest.raises(ValueError, match=message):
        load_encoder(path)


def test_a_model_saved_with_a_head(tiny_bert: Path, tmp_path: Path) -> None:
    bare, path = tiny_bert, shutil.copytree(tiny_bert, tmp_path / "with head")
    tensors = load_file(path / "model.safetensors")
    named = {f"bert.{name}": tensor for name, tensor in tensors.items() if "pooler" not in name}
    head = {"cls.predictions.bias": np.zeros(VOCABULARY, np.float32)}
    save_file(named | head, path / "model.safetensors")
    np.testing.assert_array_equal(
        encode(load_encoder(path), TEXTS), encode(load_encoder(bare), TEXTS)
    )


def test_eight_devices_give_the_vectors_of_one(tiny_bert: Path, encoder: Encoder) -> None:
    eight = load_encoder(tiny_bert, mesh=make_mesh(2, 2, 2))
    assert len(eight.model.layers.query[...].sharding.device_set) == 8
    np.testing.assert_allclose(encode(eight, TEXTS), encode(encoder, TEXTS), atol=1e-5)
    # A batch size that the devices do not divide is rounded up.
    np.testing.assert_allclose(eight.encode(TEXTS, batch_size=3), encode(encoder, TEXTS), atol=1e-5)


def test_prefixes_stand_before_inputs_and_items(tiny_bert: Path, encoder: Encoder) -> None:
    prefixed = load_encoder(tiny_bert, query_prefix="query: ", item_prefix="passage: ")
    items, queries = TEXTS, ["query: a", "query: b c"]
    np.testing.assert_array_equal(
        encode(prefixed, items), encode(encoder, [f"passage: {item}" for item in items])
    )
    assert prefixed.queries(["a", "b c"]) == encoder.tokenize(queries) == encoder.queries(queries)
    # Stored vectors depend on the items' prefix alone.
    assert load_encoder(tiny_bert, query_prefix="q").fingerprint == encoder.fingerprint
    assert prefixed.fingerprint != encoder.fingerprint


@pytest.fixture
def modules(tiny_bert: Path, tmp_path: Path) -> Callable[..., Path]:
    """modules(kind=place, ...): a sentence-transformers directory of these modules."""

    def make(**places: str) -> Path:
        path = shutil.copytree(tiny_bert, tmp_path / "encoder")
        listed = [
            {"path": place, "type": f"sentence_transformers.models.{kind}"}
            for kind, place in places.items()
        ]
        (path / "modules.json").write_text(json.dumps(listed))
        return path

    return make


def test_the_pooling_is_where_modules_json_says(modules: Callable[..., Path]) -> None:
    path = modules(Transformer="", Pooling="pool", Normalize="norm")
    (path / "pool").mkdir()
    (path / "pool" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    assert load_encoder(path).model.pooling == "mean"


def test_a_module_that_changes_the_vector_is_refused(modules: Callable[..., Path]) -> None:
    path = modules(Transformer="", Pooling="1_Pooling", Dense="2_Dense")
    with pytest.raises(ValueError, match=r"modules\.json: the module Dense is not supported"):
        load_encoder(path)


def test_an_old_directory_has_the_encoder_in_a_folder(
    modules: Callable[..., Path], tiny_bert: Path
) -> None:
    path = modules(Transformer="0_Transformer", Pooling="1_Pooling")
    (inner := path / "0_Transformer").mkdir()
    for file in [file for file in path.iterdir() if file.is_file() and file.name != "modules.json"]:
        file.rename(inner / file.name)
    (inner / "sentence_bert_config.json").write_text('{"max_seq_length": 20}')
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    old = load_encoder(path)
    assert (old.model.pooling, old.max_length) == ("mean", 20)
    new = load_encoder(tiny_bert, pooling="mean", max_length=20)
    np.testing.assert_array_equal(encode(old, TEXTS), encode(new, TEXTS))
    with open(inner / "model.safetensors", "r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\0\0")
    assert load_encoder(path).fingerprint != old.fingerprint


@pytest.mark.parametrize(
    "listed", [{"0": "Transformer"}, ["Transformer"], [{"type": "Pooling"}], 7]
)
def test_modules_that_are_no_list_of_such(tiny_bert: Path, tmp_path: Path, listed: Any) -> None:
    path = shutil.copytree(tiny_bert, tmp_path / "encoder")
    (path / "modules.json").write_text(json.dumps(listed))
    with pytest.raises(ValueError, match=r"modules\.json: expected a list of modules"):
        load_encoder(path)


def test_an_architecture_that_is_not_told(tiny_bert: Path, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_bert, tmp_path / "encoder")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"architectures": None}))
    assert load_encoder(path).model.pooling == "cls"


def test_contriever_is_pooled_by_the_mean(tiny_bert: Path, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_bert, tmp_path / "contriever")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"architectures": ["Contriever"]}))
    assert load_encoder(path).model.pooling == "mean"


@needs_torch
def test_a_trained_model_on_a_thousand_texts(
    real_model: Callable[[str], Path], real_texts: Path
) -> None:
    """Titles and some abstracts, on eight devices at once, in batches of like lengths."""
    with gzip.open(real_texts / "corpus" / "scholarly_corpus.jsonl.gz", "rt") as file:
        papers = [json.loads(line) for line in itertools.islice(file, 1000)]
    texts = [p["abstract"] if i % 20 == 0 else p["title"] for i, p in enumerate(papers)]
    path = real_model("all-MiniLM-L6-v2")
    encoder = load_encoder(path, mesh=make_mesh(8, 1, 1))
    # sentence_bert_config.json: the positions reach to 512.
    assert (encoder.model.pooling, encoder.size, encoder.max_length) == ("mean", 384, 256)
    vectors = encoder.encode(texts)

    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.BertModel.from_pretrained(path).eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(texts), 50):
        rows = order[start : start + 50]
        inputs = tokenizer([texts[i] for i in rows], padding=True, truncation=True, max_length=256)
        tokens, mask = np.array(inputs["input_ids"]), np.array(inputs["attention_mask"], bool)
        _, expected = pooled(model, tokens, mask, "mean")
        assert np.sum(vectors[rows] * expected, axis=1).min() >= 0.99999
