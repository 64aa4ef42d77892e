"""Every family of decoders against transformers: logits, gradients and generations."""

import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pplug_jax.llm import load_llm
from pplug_jax.llm.decoder import Decoder
from pplug_jax.llm.generate import generate
from pplug_jax.llm.load import FAMILIES
from scripts.pretrain.initialise import initialise
from tests.support.families import ALTERNATING, GEMMA3_ROPES, SHAPE
from tests.support.parity import assert_close, needs_torch, save_random, torch

V = SHAPE["vocab_size"]
LENGTHS = (19, 11, 1, 6)  # of a batch's rows; longer than the windows below
BASE = SHAPE | {"initializer_range": 0.3}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
}
CASES: dict[str, tuple[type[transformers.PreTrainedConfig], dict[str, Any]]] = {
    "gemma": (transformers.GemmaConfig, {"num_key_value_heads": 1}),
    "gemma2": (transformers.Gemma2Config, {"sliding_window": 5, "query_pre_attn_scalar": 7}),
    "gemma2, tight caps": (
        transformers.Gemma2Config,
        {"sliding_window": 3, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5},
    ),
    "gemma3": (
        transformers.Gemma3TextConfig,
        {
            "sliding_window": 5,
            "query_pre_attn_scalar": 7,
            "layer_types": ALTERNATING,
            "rope_parameters": GEMMA3_ROPES,
        },
    ),
    "qwen2, tied, late windows": (
        transformers.Qwen2Config,
        {
            "head_dim": 8,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 2,
        },
    ),
    "qwen3": (transformers.Qwen3Config, {}),
    "qwen3, yarn": (
        transformers.Qwen3Config,
        {"rope_parameters": YARN},
    ),
}


class Pair(NamedTuple):
    """One checkpoint in both implementations."""

    path: Path
    model: transformers.PreTrainedModel
    llm: Decoder


def make_pair(config: transformers.PreTrainedConfig, path: Path) -> Pair:
    torch.manual_seed(0)
    save_random(transformers.AutoModelForCausalLM.from_config(config), path)
    return Pair(path, torch_model(path), load_llm(path, dtype="float32"))


def torch_model(path: Path, dtype: str = "float32") -> transformers.PreTrainedModel:
    # The other implementations of attention leave out Gemma 2's cap.
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    kind, differences = CASES[request.param]
    return make_pair(kind(**(BASE | differences)), tmp_path_factory.mktemp("llm"))


def batch(side: str) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens of LENGTHS, padded on `side`: (B, L) int32 and (B, L) bool."""
    mask = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
    if side == "left":
        mask = mask[:, ::-1].copy()
    tokens = np.full(mask.shape, 2, np.int32)
    tokens[mask] = np.random.default_rng(0).integers(3, V, mask.sum())
    return tokens, mask


def torch_logits(
    model: transformers.PreTrainedModel, mask: np.ndarray, **inputs: Any
) -> "torch.Tensor":
    mask = torch.tensor(mask).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return model(attention_mask=mask, position_ids=positions, **inputs).logits


logits = jax.jit(lambda llm, embeds, mask: llm.logits(embeds, mask))


def assert_same_logits(pair: Pair) -> None:
    random = np.random.default_rng(1)
    for side in ("right", "left"):
        tokens, mask = batch(side)
        with torch.no_grad():
            theirs = torch_logits(pair.model, mask, input_ids=torch.tensor(tokens).long()).numpy()
        assert_close(logits(pair.llm, pair.llm.embed(tokens), mask)[mask], theirs[mask])
        embeds = random.normal(size=(*mask.shape, pair.llm.config.hidden_size)).astype(np.float32)
        with torch.no_grad():
            theirs = torch_logits(pair.model, mask, inputs_embeds=torch.tensor(embeds)).numpy()
        assert_close(logits(pair.llm, embeds, mask)[mask], theirs[mask])


@pytest.mark.slow
@needs_torch
def test_logits(pair: Pair) -> None:
    assert_same_logits(pair)


@pytest.mark.slow
@needs_torch
def test_gradient_of_the_inputs(pair: Pair) -> None:
    random = np.random.default_rng(2)
    _, mask = batch("left")
    embeds = random.normal(size=(*mask.shape, 32)).astype(np.float32)
    weight = random.normal(size=(*mask.shape, V)).astype(np.float32) * mask[..., None]
    inputs = torch.tensor(embeds, requires_grad=True)
    (torch_logits(pair.model, mask, inputs_embeds=inputs) * torch.tensor(weight)).sum().backward()
    ours = jax.jit(jax.grad(lambda x, llm: jnp.sum(llm.logits(x, mask) * weight)))(embeds, pair.llm)
    assert_close(ours[mask], inputs.grad.numpy()[mask])


@pytest.mark.slow
@needs_torch
@pytest.mark.parametrize(("num_beams", "length_penalty"), [(1, 1.0), (4, 0.6)])
def test_generations(pair: Pair, num_beams: int, length_penalty: float) -> None:
    T = 12
    decoding = {"num_beams": num_beams, "length_penalty": length_penalty}
    tokens, mask = batch("left")
    embeds = np.array(pair.llm.embed(tokens))
    expected = pair.model.generate(
        inputs_embeds=torch.tensor(embeds),
        attention_mask=torch.tensor(mask).long(),
        max_new_tokens=T,
        do_sample=False,
        early_stopping=False,
        **decoding,
    ).numpy()
    expected = np.pad(expected, ((0, 0), (0, T - expected.shape[1])), constant_values=2)
    for side in ("left", "right"):
        tokens, mask = batch(side)
        ours = generate(pair.llm, pair.llm.embed(tokens), mask, max_new_tokens=T, **decoding)
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.slow
@needs_torch
def test_targets_behind_a_gap_of_padding(pair: Pair) -> None:
    """Windows count a row's tokens, not its slots."""
    prompt, mask = batch("right")
    targets = np.random.default_rng(3).integers(3, V, (len(LENGTHS), 5), dtype=np.int32)
    ours = jax.jit(Decoder.logits)(pair.llm, pair.llm.embed(prompt), mask, targets)
    for row, length in enumerate(LENGTHS):
        ids = np.concatenate([prompt[row, :length], targets[row]])[None]
        with torch.no_grad():
            theirs = pair.model(input_ids=torch.tensor(ids).long()).logits[0].numpy()
        assert_close(ours[row], theirs[length:])


@pytest.mark.slow
@needs_torch
def test_bfloat16_is_as_exact_as_torchs(pair: Pair) -> None:
    llm = load_llm(pair.path)
    tokens, mask = batch("right")
    ids = torch.tensor(tokens).long()
    with torch.no_grad():
        exact = torch_logits(pair.model, mask, input_ids=ids)[mask].numpy()
        rough = torch_logits(torch_model(pair.path, "bfloat16"), mask, input_ids=ids)[mask]
    ours = np.asarray(logits(llm, llm.embed(tokens), mask))[mask]
    our_error, their_error = (
        np.sqrt(np.mean((x - exact) ** 2)) for x in (ours, rough.float().numpy())
    )
    assert 0 < our_error <= 2 * their_error


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_soft_tokens_have_the_embeddings_scale(case: str) -> None:
    kind, differences = CASES[case]
    config = kind(**(BASE | differences))
    shapes = Decoder(FAMILIES[config.model_type].config_from_hf(config, (1,)), "float32")
    llm = initialise(shapes, jax.random.key(0))
    every = llm.embed(np.arange(V, dtype=np.int32)[None])
    norm = np.linalg.norm(every, axis=-1).mean()
    np.testing.assert_allclose(llm.embedding_norm(), norm, rtol=1e-5)


@st.composite
def configs(draw: st.DrawFn) -> transformers.PreTrainedConfig:
    kinds = (
        transformers.LlamaConfig,
        transformers.GemmaConfig,
        transformers.Gemma2Config,
        transformers.Gemma3TextConfig,
        transformers.Qwen2Config,
        transformers.Qwen3Config,
    )
    kind = draw(st.sampled_from(kinds))
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    head_dim = 2 * draw(st.integers(1, 8))
    layers = draw(st.integers(1, 3))
    drawn = {
        "num_attention_heads": kv_heads * group,
        "num_key_value_heads": kv_heads,
        # Qwen 2 has no head_dim of its own; transformers asks for a multiple everywhere.
        "hidden_size": kv_heads * group * (head_dim if kind is transformers.Qwen2Config else 4),
        "head_dim": head_dim,
        "intermediate_size": draw(st.integers(1, 40)),
        "num_hidden_layers": layers,
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-3])),
        "tie_word_embeddings": draw(st.booleans()) or "Gemma" in kind.__name__,
    }
    if kind in (transformers.Gemma2Config, transformers.Gemma3TextConfig):
        types = st.sampled_from(["sliding_attention", "full_attention"])
        drawn |= {
            "layer_types": draw(st.lists(types, min_size=layers, max_size=layers)),
            "sliding_window": draw(st.integers(1, 24)),
            "query_pre_attn_scalar": draw(st.integers(1, 64)),
            "final_logit_softcapping": draw(st.none() | st.floats(1, 50)),
        }
    if kind is transformers.Gemma2Config:
        drawn["attn_logit_softcapping"] = draw(st.none() | st.floats(1, 50))
    return kind(**(BASE | drawn))


@pytest.mark.slow
@needs_torch
@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(config=configs())
def test_logits_of_drawn_configs(config: transformers.PreTrainedConfig) -> None:
    with tempfile.TemporaryDirectory() as directory:
        assert_same_logits(make_pair(config, Path(directory)))


@needs_torch
def test_the_text_part_of_a_multimodal_gemma3(tmp_path: Path) -> None:
    kind, differences = CASES["gemma3"]
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(
        text_config=kind(**(BASE | differences)), vision_config=vision, mm_tokens_per_image=4
    )
    save_random(transformers.Gemma3ForConditionalGeneration(config), tmp_path)
    model = transformers.Gemma3ForConditionalGeneration.from_pretrained(
        tmp_path, attn_implementation="eager"
    ).eval()
    llm = load_llm(tmp_path, dtype="float32")
    tokens, mask = batch("right")
    row = tokens[:1]
    with torch.no_grad():
        theirs = model(
            input_ids=torch.tensor(row).long(),
            token_type_ids=torch.zeros(row.shape, dtype=torch.long),
        ).logits.numpy()
    assert_close(logits(llm, llm.embed(row), mask[:1]), theirs)


@pytest.mark.parametrize(
    ("case", "setting", "message"),
    [
        ("gemma2", {"hidden_activation": "silu"}, "hidden_activation='silu' is not supported"),
        ("gemma2", {"attention_bias": True}, "attention_bias=True is not supported"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma3", {"attn_logit_softcapping": 5.0}, "attn_logit_softcapping=5.0 is not supported"),
        ("qwen3", {"attention_bias": True}, "attention_bias=True is not supported"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 4}, "chunked_attention"),
        (
            "gemma3",
            {"rope_parameters": GEMMA3_ROPES | {"full_attention": YARN}},
            "rope type 'yarn' is not supported for gemma3",
        ),
        ("qwen3", {"hidden_size": "wide"}, r"config\.json: .*hidden_size"),
        ("qwen3", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ],
)
def test_settings_that_are_not_implemented_are_refused(
    case: str, setting: dict[str, Any], message: str, tmp_path: Path
) -> None:
    kind, differences = CASES[case]
    config = kind(**(BASE | differences)).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config | setting))
    with pytest.raises(ValueError, match=message):
        load_llm(tmp_path)
