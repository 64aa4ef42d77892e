"""A plug is a file with its kind and a line in the registry: here k tokens, shared by all."""

from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import nnx

from pplug_jax.methods.table import METHODS, Method
from pplug_jax.plan.programs import Programs
from pplug_jax.plugs.base import Kind, Plug, parameter_count
from pplug_jax.plugs.reading import Reading
from pplug_jax.plugs.registry import PLUGS
from pplug_jax.run import run
from pplug_jax.runtime.mesh import make_mesh
from pplug_jax.session import Models
from pplug_jax.session.weights import new_weights, restore_weights
from pplug_jax.settings import Settings
from tests.support.runs import results_of, small_config


class SharedPrompt(Plug):
    def __init__(self, tokens: int, size: int, scale: jax.Array, *, rngs: nnx.Rngs):
        drawn = jax.random.normal(rngs.params(), (tokens, size)) * scale / size**0.5
        self.prompt = nnx.Param(drawn, axes=("tokens", "llm"))

    def adapt(self, llm: nnx.Module, batch: object, reading: Reading, remat: bool) -> tuple:
        prompt = self.prompt[...]
        return llm, jnp.broadcast_to(prompt, (len(batch.prompt), *prompt.shape))

    def trained(self, reading: Reading) -> int:
        return parameter_count(self, nnx.Param)


def build(
    config: ml_collections.ConfigDict, llm: nnx.Module, encoder: None, scale: jax.Array, key: object
) -> SharedPrompt:
    tokens = config.plug.num_persona_tokens
    return SharedPrompt(tokens, llm.config.hidden_size, scale, rngs=nnx.Rngs(key))


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> str:
    kind = Kind(build, soft_tokens=lambda config, reading: config.plug.num_persona_tokens)
    method = Method("shared_prompt", "the same k tokens for all", plug="shared_prompt", kind="toy")
    monkeypatch.setitem(PLUGS, "toy", kind)
    monkeypatch.setitem(METHODS, "shared_prompt", method)
    return method.name


@pytest.mark.slow
def test_a_plug_of_another_kind(toy: str, tmp_path: Path) -> None:
    config = small_config(methods=("none", toy), train__learning_rate=0.1)
    run(config, tmp_path, "train_and_evaluate")
    entry = results_of(tmp_path)["methods"][toy]
    config = Settings.of(config)
    size = config.plug.num_persona_tokens * 128  # the bundled LLM's width
    assert entry["trainable"] == size
    assert entry["bytes_per_user"] == 0
    assert entry["loss"]["value"] != results_of(tmp_path)["methods"]["none"]["loss"]["value"]

    models = Models(config, tmp_path)
    before = new_weights(models, METHODS[toy], config).prompt[...]
    after = restore_weights(models, METHODS[toy], config, tmp_path).prompt[...]
    assert np.abs(after - before).max() > 0.01

    programs = Programs(config, make_mesh(devices=jax.devices()[:1]))
    assert programs.lengths.soft == config.plug.num_persona_tokens
    assert programs.train()
