"""Soft tokens behind the input: as if all were one text, though the prompt is read apart."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from transformers import LlamaForCausalLM

from configs import lamp5
from pplug_jax.data.lamp import Example
from pplug_jax.evaluate.predict import by_prompt, predict
from pplug_jax.llm import abstract_llm, load_llm
from pplug_jax.llm.decoder import Decoder
from pplug_jax.llm.generate import generate
from pplug_jax.llm.llama import SOURCES
from pplug_jax.llm.prompts import Behind
from pplug_jax.llm.quantize import KINDS, quantize
from pplug_jax.methods.shown import layout_of
from pplug_jax.methods.table import METHODS
from pplug_jax.plan.flops import matmul_flops
from pplug_jax.plugs.forward import answer_tokens, gold_losses, token_losses
from pplug_jax.plugs.lora import Lora
from pplug_jax.plugs.reading import PAPER, Reading
from pplug_jax.runtime.mesh import make_mesh, place
from pplug_jax.session import Models
from pplug_jax.session.inputs import tokenize
from pplug_jax.session.weights import new_weights
from pplug_jax.settings import LoraSettings, Settings
from scripts.pretrain.initialise import initialise
from tests.support.families import ALTERNATING, GEMMA3_ROPES, SHAPE
from tests.support.parity import assert_close, needs_torch, torch

pytestmark = pytest.mark.slow

V, D, B, K, T = SHAPE["vocab_size"], SHAPE["hidden_size"], 8, 3, 6
PLACE = Behind((5, 7))
BASE = SHAPE | {
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 7}
# The windows are shorter than the prompts, and some than what stands behind them.
FAMILIES = {
    "llama": {"model_type": "llama"},
    "gemma": {"model_type": "gemma", "num_key_value_heads": 1, **GEMMA},
    "gemma2": {"model_type": "gemma2", "sliding_window": 5, **GEMMA},
    "gemma3": {
        "model_type": "gemma3_text",
        "sliding_window": 9,
        "layer_types": ALTERNATING,
        **GEMMA,
        "rope_parameters": GEMMA3_ROPES,
    },
    "qwen2": {
        "model_type": "qwen2",
        "head_dim": 8,
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 2,
    },
    "qwen3": {"model_type": "qwen3"},
}


class Given(nnx.Module):
    """A plug that is its soft tokens, and changes the LLM by a LoRA where it has one."""

    def __init__(self, soft: jax.Array, lora: Lora | None = None):
        self.soft, self.lora = nnx.Param(soft, axes=("batch", None, None)), lora

    def adapt(self, llm: Decoder, batch: object, reading: Reading, remat: bool) -> tuple:
        return llm if self.lora is None else self.lora.on(llm), self.soft[...]


class Rows(NamedTuple):
    """What of a batch is read here; the names are `Batch`'s."""

    prompt: np.ndarray
    prompt_mask: np.ndarray
    target: np.ndarray
    target_mask: np.ndarray

    was_read = None

    @property
    def text(self) -> np.ndarray:
        return self.prompt

    @property
    def text_mask(self) -> np.ndarray:
        return self.prompt_mask


def make_llm(path: Path, family: str) -> Decoder:
    (path / "config.json").write_text(json.dumps(BASE | FAMILIES[family]))
    llm = abstract_llm(path, dtype="float32", quantize=None)
    llm = initialise(llm, jax.random.key(0))
    # Larger than usual, so that the logits are not all alike.
    return jax.tree.map(lambda x: x * 2 if x.ndim == 3 else x, llm)


@pytest.fixture(scope="module", params=FAMILIES)
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return make_llm(tmp_path_factory.mktemp("llm"), request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return make_llm(tmp_path_factory.mktemp("llm"), "llama")


def make_rows(count: int = B) -> Rows:
    rng = np.random.default_rng(0)

    def some(width: int) -> tuple[np.ndarray, np.ndarray]:
        lengths = rng.integers(1, width + 1, (count, 1))
        return rng.integers(3, V, (count, width), dtype=np.int32), np.arange(width) < lengths

    return Rows(*some(14), *some(T))


def make_plug(count: int = B) -> Given:
    return Given(jax.random.normal(jax.random.key(1), (count, K, D)))


def one_text(
    llm: Decoder, soft: jax.Array, rows: Rows, answers: bool
) -> tuple[jax.Array, jax.Array]:
    """Everything in its place in one text, padded behind: embeddings (B, S, D) and (B, S)."""
    texts = []
    for i in range(len(rows.prompt)):
        behind = [*PLACE.suffix]
        if answers:
            behind += rows.target[i][rows.target_mask[i]][:-1].tolist()
        prompt = rows.prompt[i][rows.prompt_mask[i]]
        parts = llm.embed(prompt), soft[i], llm.embed(jnp.array(behind, jnp.int32))
        texts.append(jnp.concatenate(parts))
    width = max(map(len, texts))
    embeds = jnp.stack([jnp.pad(x, ((0, width - len(x)), (0, 0))) for x in texts])
    return embeds, np.arange(width) < np.array([[len(x)] for x in texts])


def plainly(plug: Given, llm: Decoder, rows: Rows) -> jax.Array:
    """The targets' losses of one text, everything in it differentiated, (B, T)."""
    llm, soft = plug.adapt(llm, None, PAPER, False)
    embeds, mask = one_text(llm, soft, rows, answers=True)
    logits = llm.logits(embeds, mask)
    first = mask.sum(1) - rows.target_mask.sum(1)
    at = (first[:, None] + np.arange(T))[..., None]
    logits = jnp.take_along_axis(logits, at, axis=1, mode="clip")
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, rows.target)
    return losses * rows.target_mask


def both_gradients(plug: Given, llm: Decoder, rows: Rows, remat: bool = False) -> list[tuple]:
    """Losses and gradients: those of the prompt read apart, and those of one text."""

    def apart(plug: Given) -> tuple[jax.Array, jax.Array]:
        losses = token_losses(plug, llm, rows, PLACE, remat)
        return jnp.sum(losses), losses

    def together(plug: Given) -> tuple[jax.Array, jax.Array]:
        losses = plainly(plug, llm, rows)
        return jnp.sum(losses), losses

    return [jax.jit(jax.grad(f, has_aux=True))(plug) for f in (apart, together)]


def assert_same(plug: Given, llm: Decoder, rows: Rows, remat: bool = False) -> None:
    (ours, our_losses), (theirs, their_losses) = both_gradients(plug, llm, rows, remat)
    assert_close(our_losses, their_losses, 1e-5)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.abs(y).max() > 0
        assert_close(x, np.asarray(y), 1e-4)


def test_losses_and_gradients_are_those_of_one_text(llm: Decoder) -> None:
    assert_same(make_plug(), llm, make_rows())


def test_nor_does_remat_change_them(llama: Decoder) -> None:
    assert_same(make_plug(), llama, make_rows(), remat=True)


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_may_be_integers(llama: Decoder, kind: str) -> None:
    stored = jax.tree.map(lambda x: quantize(x, kind) if x.ndim == 3 else x, llama)
    assert_same(make_plug(), stored, make_rows())


@needs_torch
def test_a_lora_changes_only_what_stands_behind_the_prompt(make_llama: Callable[..., Path]) -> None:
    """Against transformers: its own weights read the prompt, merged ones what follows."""
    path, rows = make_llama(), make_rows()
    llm, model = load_llm(path, dtype="float32"), LlamaForCausalLM.from_pretrained(path).eval()
    soft = jax.random.normal(jax.random.key(1), (B, K, llm.config.hidden_size))
    lora = Lora(llm, LoraSettings(rank=2, alpha=4.0), rngs=nnx.Rngs(0))
    lora = jax.tree.map(lambda x: x + 0.05, lora)
    plug = Given(soft, lora)

    def total(plug: Given) -> tuple[jax.Array, jax.Array]:
        losses = token_losses(plug, llm, rows, PLACE)
        return jnp.sum(losses), losses

    gradient, losses = jax.jit(jax.grad(total, has_aux=True))(plug)
    decoding = {"max_new_tokens": 8, "num_beams": 1, "length_penalty": 1.0}
    answers = answer_tokens(plug, llm, rows, reading=PAPER, place=PLACE, **decoding)
    merged = LlamaForCausalLM.from_pretrained(path).eval()
    for name, down in lora.down.items():
        for i, update in enumerate(np.asarray(down[...] @ lora.up[name][...] * lora.scale)):
            merged.get_parameter(SOURCES[name].name.format(i)).data += torch.tensor(update.T)
    embed = model.get_input_embeddings()
    their_soft = torch.tensor(np.asarray(soft), requires_grad=True)
    for i in range(B):
        prompt, gold = (torch.tensor(x[i][m[i]].tolist())[None] for x, m in (rows[:2], rows[2:]))

        def logits(*tokens: int, i: int = i, prompt: torch.Tensor = prompt) -> torch.Tensor:
            with torch.no_grad():
                past = model(prompt, use_cache=True).past_key_values
            texts = embed(torch.tensor([[*PLACE.suffix, *tokens]])).detach()
            behind = torch.cat([their_soft[i : i + 1], texts], dim=1)
            return merged(inputs_embeds=behind, past_key_values=past).logits[0]

        theirs = logits(*gold[0, :-1].tolist())[-gold.shape[1] :].log_softmax(-1)
        their_losses = -theirs.gather(1, gold.mT)[:, 0]
        assert_close(losses[i, : gold.shape[1]], their_losses.detach().numpy(), 1e-4)
        their_losses.sum().backward()
        greedy: list[int] = []
        while len(greedy) < 8 and greedy[-1:] != [llm.config.eos_ids[0]]:
            greedy.append(int(logits(*greedy)[-1].argmax()))
        assert answers[i, : len(greedy)].tolist() == greedy
    assert_close(gradient.soft[...], their_soft.grad.numpy(), 1e-4)
    for name, down in lora.down.items():
        kernels = (merged.get_parameter(SOURCES[name].name.format(i)) for i in range(len(down)))
        of_kernels = np.stack([kernel.grad.numpy().T for kernel in kernels]) * lora.scale
        down, up = np.asarray(down[...]), np.asarray(lora.up[name][...])
        assert_close(gradient.lora.down[name][...], of_kernels @ up.swapaxes(1, 2), 1e-4)
        assert_close(gradient.lora.up[name][...], down.swapaxes(1, 2) @ of_kernels, 1e-4)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_answers_are_those_of_one_text(llm: Decoder, num_beams: int) -> None:
    rows, plug = make_rows(), make_plug()
    decoding = {"max_new_tokens": 8, "num_beams": num_beams, "length_penalty": 1.0}
    ours = answer_tokens(plug, llm, rows, reading=PAPER, place=PLACE, **decoding)
    theirs = generate(llm, *one_text(llm, plug.soft[...], rows, answers=False), **decoding)
    np.testing.assert_array_equal(ours, theirs)
    assert len(np.unique(ours)) > 3


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_prompt_that_users_share_is_read_once(llm: Decoder, num_beams: int) -> None:
    """Two prompts for four users each, against eight prompts."""
    rows, plug = make_rows(), make_plug()
    shared = rows._replace(prompt=rows.prompt[:2], prompt_mask=rows.prompt_mask[:2])
    each = rows._replace(
        prompt=rows.prompt[:2].repeat(4, axis=0), prompt_mask=rows.prompt_mask[:2].repeat(4, axis=0)
    )
    decoding = {"max_new_tokens": 8, "num_beams": num_beams, "length_penalty": 1.0}
    static = {"reading": PAPER, "place": PLACE}
    np.testing.assert_array_equal(
        answer_tokens(plug, llm, shared, **static, **decoding),
        answer_tokens(plug, llm, each, **static, **decoding),
    )
    assert_close(gold_losses(plug, llm, shared, **static), gold_losses(plug, llm, each, **static))


def test_a_mesh_changes_nothing(llama: Decoder) -> None:
    rows, plug, mesh = make_rows(), make_plug(), make_mesh(2, 2, 2)

    def loss(plug: Given, llm: Decoder, rows: Rows) -> jax.Array:
        return jnp.sum(token_losses(plug, llm, rows, PLACE))

    expected = jax.jit(jax.value_and_grad(loss))(plug, llama, rows)
    with jax.set_mesh(mesh):
        found = jax.jit(jax.value_and_grad(loss))(place(plug, mesh), place(llama, mesh), rows)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_close(x, np.asarray(y), 1e-5)


def test_nothing_of_the_prompt_is_differentiated(llama: Decoder) -> None:
    """A step's FLOPs: 2 for each parameter and token of the prompt, 4 behind it.

    Beside that, attention's scores behind it are made twice, to keep none of them.
    """
    rows, plug = make_rows(), make_plug()

    def loss(plug: Given) -> jax.Array:
        return jnp.sum(token_losses(plug, llama, rows, PLACE))

    def flops(f: object) -> float:
        return matmul_flops(jax.make_jaxpr(f)(plug))

    prompt, c = rows.prompt.shape[1], llama.config
    behind = K + len(PLACE.suffix) + T - 1
    kernels = sum(x.size for x in jax.tree.leaves(llama.layers) if x.ndim == 3)
    channels = c.num_heads * c.head_dim * c.num_layers
    forward = 2 * kernels * prompt + 4 * prompt**2 * channels
    pairs = behind * (prompt + behind)
    # Scores' and values' gradients; nobody asks for those of the prompt's keys and values.
    backward = 4 * kernels * behind + channels * (4 * pairs + 4 * pairs + 4 * behind * behind)
    head = 3 * 2 * T * V * D
    assert flops(jax.grad(loss)) <= 1.05 * B * (forward + backward + head)


def test_an_evaluation_reads_a_prompt_once_for_its_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three prompts for four users each, on eight devices, against every row with its own."""
    config = lamp5.get_config()
    config.plug.update(place="behind", encoder_rate=0.0, num_persona_tokens=2)
    config.eval.update(batch_size=16, max_new_tokens=6, num_beams=2)
    config = Settings.of(config)
    models = Models(config, tmp_path)
    examples = [
        Example(
            f"{i}",
            "Generate a title for the following abstract of a paper: " + "Rivers. " * (1 + i % 3),
            f"A title {i}",
            ({"title": f"On {i}", "abstract": f"Lakes {i}."},),
        )
        for i in range(12)
    ]
    models.store.add(map(models.history_texts, examples))
    method = METHODS["pplug"]
    tokenized = tokenize(models, examples, layout_of(method, config))
    weights = new_weights(models, method, config)
    order, users = by_prompt(tokenized, 2)
    assert users == 2
    prompts = [tokenized[i].prompt.tolist() for i in order]
    assert prompts[::2] == prompts[1::2]
    texts, losses, _ = predict(models, method, config, weights, tokenized)
    monkeypatch.setattr("pplug_jax.evaluate.predict.by_prompt", lambda x, _: (np.arange(12), 1))
    same_texts, same_losses, _ = predict(models, method, config, weights, tokenized)
    assert texts == same_texts
    assert len(set(texts)) > 1
    np.testing.assert_allclose(losses, same_losses, rtol=1e-4)
