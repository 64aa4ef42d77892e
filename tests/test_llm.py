"""The decoder against transformers' Llama: the same weights, the same logits."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx
from safetensors.numpy import load_file

from pplug_jax.llm import load_llm
from pplug_jax.llm.decoder import Decoder, DecoderConfig, Llama3Stretch, Rope
from pplug_jax.llm.generate import generate
from pplug_jax.llm.llama import config_from_hf
from pplug_jax.nn.variables import Frozen
from pplug_jax.runtime.mesh import make_mesh
from tests.support.parity import assert_close, needs_torch, torch
from tests.support.tiny import joined

LENGTHS = (37, 20, 1, 8)  # of a batch's rows: full, padded, one token, odd
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,  # less than the rows' 37 tokens
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
VARIANTS = {
    "gqa": {},
    "mha tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "mqa wide heads": {"num_key_value_heads": 1, "head_dim": 16, "num_hidden_layers": 1},
    "narrow heads tied": {"num_attention_heads": 2, "head_dim": 6, "tie_word_embeddings": True},
    "odd sizes": {
        "hidden_size": 30,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "intermediate_size": 51,
        "num_hidden_layers": 3,
        "vocab_size": 331,
        "rms_norm_eps": 1e-3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
    "linear": {"rope_parameters": LINEAR, "head_dim": 16},
    "llama3": {"rope_parameters": LLAMA3, "head_dim": 16},
    "yarn": {"rope_parameters": YARN, "head_dim": 16},
    "yarn, other turns": {
        "rope_parameters": YARN | {"beta_fast": 4.0, "beta_slow": 0.5, "truncate": False},
        "head_dim": 16,
    },
    "yarn, own factor": {"rope_parameters": YARN | {"attention_factor": 0.7}, "head_dim": 16},
    "yarn, as DeepSeek": {
        "rope_parameters": YARN | {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7},
        "head_dim": 16,
    },
    "llama3 tied": {
        "rope_parameters": LLAMA3 | {"factor": 32.0, "high_freq_factor": 2.0},
        "head_dim": 16,
        "tie_word_embeddings": True,
        "num_key_value_heads": 1,
    },
}

logits = jax.jit(lambda llm, embeds, mask: llm.logits(embeds, mask))
hidden = jax.jit(lambda llm, embeds, mask: llm.hidden(embeds, mask))
target_hidden = jax.jit(Decoder.target_hidden, static_argnames="remat")


def torch_llama(path: Path, dtype: str = "float32") -> transformers.LlamaForCausalLM:
    return transformers.LlamaForCausalLM.from_pretrained(path, dtype=dtype).eval()


def masks(lengths: tuple[int, ...] = LENGTHS) -> dict[str, np.ndarray]:
    """Rows of `lengths` tokens, padded on either side and in the middle, each (B, L) bool."""
    right = np.arange(max(lengths)) < np.array(lengths)[:, None]
    return {"right": right, "left": right[:, ::-1].copy(), "middle": np.roll(right, 5, axis=1)}


def random_tokens(llm: Decoder, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).integers(3, llm.config.vocab_size, shape, dtype=np.int32)


def torch_logits(model: transformers.LlamaForCausalLM, mask: np.ndarray, **inputs) -> np.ndarray:
    """transformers' logits; its positions do not follow the mask by themselves."""
    mask = torch.tensor(mask)
    with torch.no_grad():
        output = model(
            attention_mask=mask.long(),
            position_ids=(mask.long().cumsum(1) - 1).clamp(min=0),
            **{name: torch.tensor(np.asarray(value)) for name, value in inputs.items()},
        )
    return output.logits.float().numpy()


@pytest.fixture(scope="module")
def llm(tiny_llama: Path) -> Decoder:
    return load_llm(tiny_llama, dtype="float32")


@pytest.mark.slow
@needs_torch
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(make_llama: Callable[..., Path], variant: str) -> None:
    path = make_llama(**VARIANTS[variant])
    llm, model = load_llm(path, dtype="float32"), torch_llama(path)
    assert (llm.head is None) == VARIANTS[variant].get("tie_word_embeddings", False)
    shape = (len(LENGTHS), max(LENGTHS))
    tokens = random_tokens(llm, shape)
    embeds = np.random.default_rng(1).normal(size=(*shape, llm.config.hidden_size))
    embeds = embeds.astype(np.float32)
    for mask in masks().values():
        ours = logits(llm, llm.embed(tokens), mask)
        theirs = torch_logits(model, mask, input_ids=tokens.astype(np.int64))
        assert ours.dtype == jnp.float32
        assert_close(ours[mask], theirs[mask], 1e-4)
        ours = logits(llm, embeds, mask)
        assert_close(ours[mask], torch_logits(model, mask, inputs_embeds=embeds)[mask], 1e-4)


def test_padding_may_hold_anything(llm: Decoder) -> None:
    for mask in masks().values():
        tokens = random_tokens(llm, mask.shape)
        other = np.where(mask, tokens, 5)
        first, second = (logits(llm, llm.embed(t), mask) for t in (tokens, other))
        np.testing.assert_array_equal(first[mask], second[mask])


def test_target_hidden_is_a_slice_of_the_full_forward(llm: Decoder) -> None:
    prompt_mask, target_mask = masks((9, 4, 1))["right"], masks((3, 5, 1))["right"]
    targets = random_tokens(llm, target_mask.shape)
    text, mask = joined(random_tokens(llm, prompt_mask.shape), prompt_mask, targets, target_mask)
    embeds = llm.embed(text)
    ours = target_hidden(llm, embeds, mask, targets, target_mask)
    assert ours.shape[:2] == targets.shape
    assert np.isfinite(ours).all()  # padding too, or its gradients are not 0

    full = hidden(llm, embeds, mask)
    for row in range(3):
        start, count = prompt_mask[row].sum() - 1, target_mask[row].sum()
        assert_close(ours[row, :count], np.asarray(full[row, start : start + count]), 1e-5)

    again = target_hidden(llm, embeds, mask, targets, target_mask, remat=True)
    np.testing.assert_allclose(again, ours, rtol=1e-5, atol=1e-5)


@needs_torch
def test_bfloat16_is_as_exact_as_torchs(tiny_llama: Path) -> None:
    llm = load_llm(tiny_llama)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(llm))} == {jnp.dtype("bfloat16")}
    mask = masks()["right"]
    tokens = random_tokens(llm, mask.shape)

    def theirs(dtype: str) -> np.ndarray:
        model = torch_llama(tiny_llama, dtype)
        return torch_logits(model, mask, input_ids=tokens.astype(np.int64))[mask]

    exact = theirs("float32")
    ours = np.asarray(logits(llm, llm.embed(tokens), mask))[mask]
    our_error, their_error = (
        np.sqrt(np.mean((x - exact) ** 2)) for x in (ours, theirs("bfloat16"))
    )
    assert 0 < our_error <= 2 * their_error


@needs_torch
@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_weights_stored_in_half_precision(tiny_llama: Path, tmp_path: Path, stored: str) -> None:
    torch_llama(tiny_llama, stored).save_pretrained(tmp_path)
    llm, model = load_llm(tmp_path, dtype="float32"), torch_llama(tmp_path)
    mask = masks()["right"]
    tokens = random_tokens(llm, mask.shape)
    theirs = torch_logits(model, mask, input_ids=tokens.astype(np.int64))
    assert_close(logits(llm, llm.embed(tokens), mask)[mask], theirs[mask], 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("vocab", "rows"), [(320, 160), (331, 192)])
def test_sharded_over_eight_devices(make_llama: Callable[..., Path], vocab: int, rows: int) -> None:
    path = make_llama(vocab_size=vocab)
    llm = load_llm(path, dtype="float32")
    sharded = load_llm(path, mesh=make_mesh(2, 2, 2), dtype="float32")
    mask = masks()["left"]
    tokens = random_tokens(llm, mask.shape)
    theirs = np.asarray(logits(llm, llm.embed(tokens), mask))
    assert_close(logits(sharded, sharded.embed(tokens), mask)[mask], theirs[mask], 1e-5)

    # Embedding rows, padded, over "tensor", columns over "fsdp"; layers are never cut.
    for array, piece in (
        (sharded.embedding, (rows, 16)),
        (sharded.head, (rows, 16)),
        (sharded.layers.query, (2, 16, 16)),
        (sharded.layers.key, (2, 16, 8)),
        (sharded.layers.output, (2, 16, 16)),
        (sharded.layers.down, (2, 32, 16)),
        (sharded.norm, (32,)),
    ):
        assert len(array[...].sharding.device_set) == 8
        assert {shard.data.shape for shard in array[...].addressable_shards} == {piece}
    for ours, one in zip(
        jax.tree.leaves(nnx.state(sharded)), jax.tree.leaves(nnx.state(llm)), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(one))


def test_no_filter_for_trained_weights_sees_the_llm(llm: Decoder) -> None:
    variables = nnx.to_flat_state(nnx.state(llm, nnx.Variable))
    assert len(variables) == 12
    assert all(type(variable) is Frozen for _, variable in variables)
    assert not nnx.to_flat_state(nnx.state(llm, nnx.Param))


def test_embedding_norm(tiny_llama: Path, llm: Decoder) -> None:
    table = load_file(tiny_llama / "model.safetensors")["model.embed_tokens.weight"]
    expected = np.linalg.norm(table, axis=1).mean()
    np.testing.assert_allclose(llm.embedding_norm(), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"pretraining_tp": 2}, "pretraining_tp=2 is not supported"),
        (
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "factor": 2.0,
                    "long_factor": [1.0] * 4,
                    "short_factor": [1.0] * 4,
                }
            },
            "rope type 'longrope' is not supported",
        ),
        ({"rope_parameters": YARN | {"finetuned": True}}, "'finetuned', which rope type 'yarn'"),
        ({"rope_scaling": LINEAR | {"low_freq_factor": 1.0}}, "'low_freq_factor', which rope"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported; supported: llama"),
        ({"model_type": None}, "model_type None is not supported"),
    ],
)
def test_settings_that_are_not_implemented_are_refused(
    tiny_llama: Path, tmp_path: Path, setting: dict, message: str
) -> None:
    shutil.copytree(tiny_llama, tmp_path, dirs_exist_ok=True)
    config = json.loads((tiny_llama / "config.json").read_text())
    if "rope_scaling" in setting:  # as written before transformers 5
        del config["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(config | setting))
    with pytest.raises(ValueError, match=message):
        load_llm(tmp_path)


def test_config_written_before_transformers_5() -> None:
    base = {
        "vocab_size": 8,
        "hidden_size": 12,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
    }

    def config(**settings: object) -> DecoderConfig:
        return config_from_hf(transformers.LlamaConfig(**(base | settings)), ())

    old = config()
    assert (old.num_kv_heads, old.head_dim, old.rope) == (3, 4, Rope(10000.0))
    assert not old.tied_head
    scaling = {name: value for name, value in LLAMA3.items() if name != "rope_theta"}
    old = config(rope_theta=5e5, rope_scaling=scaling)
    assert old == config(rope_parameters=scaling | {"rope_theta": 5e5})
    assert old.rope == Rope(5e5, 8.0, Llama3Stretch(1.0, 4.0, 16))


@pytest.mark.parametrize(
    "older",
    [
        {"type": "llama3", "rope_type": None},
        {"type": "llama3", "rope_type": "llama3"},
        {"attention_factor": None, "mscale": None},
    ],
)
def test_every_way_to_write_llama_31s_rope(
    make_llama: Callable[..., Path], tmp_path: Path, older: dict[str, Any]
) -> None:
    path = make_llama(**VARIANTS["llama3"])
    shutil.copytree(path, tmp_path, dirs_exist_ok=True)
    config = json.loads((path / "config.json").read_text())
    theta = config.pop("rope_parameters")["rope_theta"]
    scaling = {k: v for k, v in (LLAMA3 | older).items() if k != "rope_type" or v or not older}
    scaling.pop("rope_theta")
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"rope_theta": theta, "rope_scaling": scaling})
    )
    assert load_llm(tmp_path).config == load_llm(path).config


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [1, 7], "pad_token_id": 5}, {"eos_token_id": 1}, ((1, 7), 5)),
        ({}, {"eos_token_id": 4, "pad_token_id": 2}, ((4,), 2)),
        (None, {"eos_token_id": [4, 3], "pad_token_id": None}, ((4, 3), 4)),
        ({"eos_token_id": None}, {"eos_token_id": None, "pad_token_id": None}, ((), 0)),
    ],
)
def test_special_ids(
    tiny_llama: Path,
    tmp_path: Path,
    generation: dict | None,
    config: dict,
    expected: tuple[tuple[int, ...], int],
) -> None:
    shutil.copytree(tiny_llama, tmp_path, dirs_exist_ok=True)
    whole = json.loads((tiny_llama / "config.json").read_text()) | config
    (tmp_path / "config.json").write_text(json.dumps(whole))
    (tmp_path / "generation_config.json").unlink()
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    loaded = load_llm(tmp_path).config
    assert (loaded.eos_ids, loaded.pad_id) == expected


@needs_torch
@pytest.mark.parametrize("name", ["stories260K", "babyllama105"])
def test_trained_models(real_model: Callable[[str], Path], name: str) -> None:
    path = real_model(name)
    llm, model = load_llm(path, dtype="float32"), torch_llama(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    texts = ["Once upon a time, there was a little girl", "Tom had a big dog.", "The"]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    assert len({len(row) for row in ids}) == 3
    mask = masks(tuple(len(row) for row in ids))["left"]
    tokens = np.full(mask.shape, 3, np.int32)
    for row, sequence in zip(tokens, ids, strict=True):
        row[-len(sequence) :] = sequence
    theirs = torch_logits(model, mask, input_ids=tokens.astype(np.int64))
    assert_close(logits(llm, llm.embed(tokens), mask)[mask], theirs[mask], 1e-4)

    assert llm.config.eos_ids == (1, 2)  # a story ends where the next begins
    ours = np.asarray(generate(llm, llm.embed(tokens), mask, max_new_tokens=200))
    theirs = model.generate(
        input_ids=torch.tensor(tokens).long(),
        attention_mask=torch.tensor(mask).long(),
        max_new_tokens=200,
        do_sample=False,
    )[:, tokens.shape[1] :].numpy()
    np.testing.assert_array_equal(ours[:, : theirs.shape[1]], theirs)
    assert (ours[:, theirs.shape[1] :] == llm.config.pad_id).all()
