"""T5 against transformers: relative positions, logits, gradients and generations."""

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

from configs import lamp5
from pplug_jax.errors import ConfigError
from pplug_jax.llm import load_llm
from pplug_jax.llm.generate import generate
from pplug_jax.llm.t5 import T5, relative_buckets
from pplug_jax.run import run
from pplug_jax.runtime.mesh import make_mesh
from pplug_jax.session import Models
from pplug_jax.settings import Settings
from scripts.pretrain.bpe import train_bpe
from tests.support.parity import assert_close, needs_torch, torch

V = 24  # so few tokens that generations meet the one that ends them
LENGTHS = (37, 20, 1, 8)  # of the prompts; beyond the largest distance below
VARIANTS = {
    "t5": {},
    "few buckets": {"relative_attention_num_buckets": 4, "relative_attention_max_distance": 7},
}


@pytest.fixture(scope="module", params=VARIANTS)
def path(request: pytest.FixtureRequest, make_t5: Callable[..., Path]) -> Path:
    return make_t5(**VARIANTS[request.param])


def torch_t5(path: Path, dtype: str = "float32") -> transformers.PreTrainedModel:
    return transformers.T5ForConditionalGeneration.from_pretrained(
        path, dtype=dtype, attn_implementation="eager"
    ).eval()


def batch(side: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prompts of LENGTHS padded on `side`, (B, L) and (B, L) bool, and decoder inputs (B, T)."""
    random = np.random.default_rng(0)
    mask = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
    if side == "left":
        mask = mask[:, ::-1].copy()
    tokens = np.zeros(mask.shape, np.int32)
    tokens[mask] = random.integers(2, V, mask.sum())
    return tokens, mask, random.integers(2, V, (len(LENGTHS), 23), dtype=np.int32)


def torch_logits(
    model: transformers.PreTrainedModel, mask: np.ndarray, targets: np.ndarray, **inputs: Any
) -> "torch.Tensor":
    return model(
        attention_mask=torch.tensor(mask).long(),
        decoder_input_ids=torch.tensor(targets).long(),
        **inputs,
    ).logits


logits = jax.jit(T5.logits)


@needs_torch
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 16), (4, 7)])
def test_relative_buckets(bidirectional: bool, buckets: int, max_distance: int) -> None:
    distance = np.arange(-300, 301)
    from transformers.models.t5.modeling_t5 import T5Attention

    expected = T5Attention._relative_position_bucket(
        torch.tensor(distance), bidirectional, buckets, max_distance
    )
    ours = relative_buckets(jnp.array(distance), buckets, max_distance, bidirectional)
    np.testing.assert_array_equal(ours, expected.numpy())


@pytest.mark.slow
@needs_torch
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_and_gradient(path: Path, side: str) -> None:
    llm, model = load_llm(path, dtype="float32"), torch_t5(path)
    assert not torch.equal(model.lm_head.weight, model.shared.weight)
    tokens, mask, targets = batch(side)
    with torch.no_grad():
        theirs = torch_logits(model, mask, targets, input_ids=torch.tensor(tokens).long())
    assert_close(logits(llm, llm.embed(tokens), mask, targets), theirs.numpy())

    random = np.random.default_rng(1)
    embeds = random.normal(size=(*mask.shape, 32)).astype(np.float32)
    weight = random.normal(size=(*targets.shape, V)).astype(np.float32)
    inputs = torch.tensor(embeds, requires_grad=True)
    theirs = torch_logits(model, mask, targets, inputs_embeds=inputs)
    (theirs * torch.tensor(weight)).sum().backward()
    assert_close(logits(llm, embeds, mask, targets), theirs.detach().numpy())
    ours = jax.jit(jax.grad(lambda x, llm: jnp.sum(llm.logits(x, mask, targets) * weight)))
    assert_close(ours(embeds, llm), inputs.grad.numpy())


@pytest.mark.slow
@needs_torch
@pytest.mark.parametrize("remat", [False, True])
def test_target_hidden_shifts_the_targets(make_t5: Callable[..., Path], remat: bool) -> None:
    path = make_t5()
    llm, model = load_llm(path, dtype="float32"), torch_t5(path)
    tokens, mask, targets = batch("right")
    with torch.no_grad():
        theirs = model(
            input_ids=torch.tensor(tokens).long(),
            attention_mask=torch.tensor(mask).long(),
            labels=torch.tensor(targets).long(),
        ).logits.numpy()
    there = np.ones(targets.shape, bool)
    hidden = llm.target_hidden(llm.embed(tokens), mask, targets, there, remat)
    assert_close(llm.unembed(hidden)[..., : theirs.shape[-1]], theirs)


@pytest.mark.slow
@needs_torch
@pytest.mark.parametrize(("num_beams", "length_penalty"), [(1, 1.0), (4, 1.0), (4, 0.6), (3, -1)])
def test_generations(path: Path, num_beams: int, length_penalty: float) -> None:
    T = 20
    llm, model = load_llm(path, dtype="float32"), torch_t5(path)
    decoding = {"num_beams": num_beams, "length_penalty": length_penalty}
    for side in ("left", "right"):
        tokens, mask, _ = batch(side)
        embeds = np.array(llm.embed(tokens))
        expected = model.generate(
            inputs_embeds=torch.tensor(embeds),
            attention_mask=torch.tensor(mask).long(),
            max_new_tokens=T,
            do_sample=False,
            early_stopping=False,
            **decoding,
        )[:, 1:].numpy()
        expected = np.pad(expected, ((0, 0), (0, T - expected.shape[1])))
        # Its beam search takes padding with id 0 for none at all, and repeats the end instead.
        ended = np.cumsum(expected == 1, axis=1) - (expected == 1) > 0
        expected = np.where(ended, 0, expected)
        ours = generate(llm, embeds, mask, max_new_tokens=T, **decoding)
        np.testing.assert_array_equal(ours, expected)


def test_padding_may_hold_anything(make_t5: Callable[..., Path]) -> None:
    llm = load_llm(make_t5(), dtype="float32")
    for side in ("left", "right"):
        tokens, mask, targets = batch(side)
        other = np.where(mask, tokens, 5)
        first, second = (logits(llm, llm.embed(t), mask, targets) for t in (tokens, other))
        np.testing.assert_array_equal(first, second)


@pytest.mark.slow
@needs_torch
def test_bfloat16_is_as_exact_as_torchs(make_t5: Callable[..., Path]) -> None:
    path = make_t5()
    llm = load_llm(path)
    tokens, mask, targets = batch("right")
    ids = torch.tensor(tokens).long()
    with torch.no_grad():
        exact, rough = (
            torch_logits(torch_t5(path, dtype), mask, targets, input_ids=ids).float().numpy()
            for dtype in ("float32", "bfloat16")
        )
    ours = np.asarray(logits(llm, llm.embed(tokens), mask, targets))
    our_error, their_error = (np.sqrt(np.mean((x - exact) ** 2)) for x in (ours, rough))
    assert 0 < our_error <= 2 * their_error


def test_sharded_over_eight_devices(make_t5: Callable[..., Path]) -> None:
    path = make_t5()
    one = load_llm(path, dtype="float32")
    eight = load_llm(path, mesh=make_mesh(2, 2, 2), dtype="float32")
    tokens, mask, targets = batch("right")
    ours, theirs = (logits(llm, llm.embed(tokens), mask, targets) for llm in (eight, one))
    assert_close(ours, np.asarray(theirs), 1e-5)
    query = eight.decoder.cross.query[...]
    assert {shard.data.shape for shard in query.addressable_shards} == {(2, 16, 24)}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"feed_forward_proj": "relu"}, "feed_forward_proj='relu' is not supported"),
        ({"scale_decoder_outputs": True}, "scale_decoder_outputs=True is not supported"),
    ],
)
def test_the_first_t5_is_refused(
    make_t5: Callable[..., Path], tmp_path: Path, setting: dict[str, Any], message: str
) -> None:
    shutil.copytree(make_t5(), tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | setting))
    with pytest.raises(ValueError, match=message):
        load_llm(tmp_path)


@pytest.mark.slow
def test_a_whole_run(make_t5: Callable[..., Path], tmp_path: Path) -> None:
    path = make_t5(vocab_size=320)
    special = {"pad_token": "<pad>", "eos_token": "</s>"}
    train_bpe(["a title and its abstract"], 320, special).save_pretrained(path)
    config = lamp5.get_config()
    config.methods = ("none", "pplug")
    config.llm.path, config.llm.separator = str(path), ""
    config.data.sample_train_users, config.data.sample_eval_users = 16, 8
    config.plug.num_persona_tokens, config.plug.projector_size = 2, 16
    config.train.batch_size = config.eval.batch_size = 8
    config.eval.max_new_tokens = 8
    config.eval.bootstrap_samples = 100
    run(config, tmp_path, "train_and_evaluate")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["methods"].keys() == {"none", "pplug"}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["value"] for line in lines if line["name"] == "pplug/loss"]
    assert losses and np.isfinite(losses).all()
    tokenizer = Models(Settings.of(config), tmp_path).tokenizer
    assert tokenizer.prompt("a title", 99).tolist() == [*tokenizer.ids("a title"), 1]
    assert tokenizer.prefix == []
    config.plug.place = "behind"
    with pytest.raises(ConfigError, match=r"config\.plug\.place 'behind': an LLM with an encoder"):
        Models(Settings.of(config), tmp_path)
