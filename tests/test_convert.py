"""An LLM written as an Orbax checkpoint is the one that later starts restore."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import ml_collections
import numpy as np
import pytest
from etils import epath

from configs import lamp5
from pplug_jax.errors import CheckpointError
from pplug_jax.run import run
from pplug_jax.session import Models, models
from pplug_jax.settings import Settings
from pplug_jax.storage.checkpoint import is_saved


def small_config(quantize: str, **mesh: int) -> ml_collections.ConfigDict:
    config = lamp5.get_config()
    config.data.sample_train_users = config.data.sample_eval_users = 1
    config.llm.quantize = quantize
    config.mesh.update(mesh)
    return config


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["", "int8", "int4"])
def test_later_starts_restore_it(
    quantize: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    first, second = small_config(quantize, fsdp=4, tensor=2), small_config(quantize, fsdp=2)
    loaded = Models(Settings.of(first), tmp_path).llm
    run(first, tmp_path, "convert")
    assert "the converted LLM is there" in capsys.readouterr().out

    def never(*args: object, **settings: object) -> None:
        raise AssertionError("was loaded again")

    monkeypatch.setattr(models, "llm_loader", never)
    for config in (first, second):  # also onto another mesh
        restored = Models(Settings.of(config), tmp_path).llm
        assert jax.tree.structure(restored) == jax.tree.structure(loaded)
        for ours, theirs in zip(*map(jax.tree.leaves, (restored, loaded)), strict=True):
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)
    kernel = jax.tree.leaves(restored.layers.query)[0]
    assert kernel.addressable_shards[0].data.size * 2 == kernel.size
    run(first, tmp_path, "convert")
    assert "the converted LLM was already there" in capsys.readouterr().out


def test_one_made_with_other_settings_is_refused(tmp_path: Path) -> None:
    config = small_config("")
    config.llm.converted = str(tmp_path / "shared")
    run(config, tmp_path / "a", "convert")
    assert is_saved(epath.Path(tmp_path / "shared"))
    config.llm.quantize = "int8"
    with pytest.raises(
        CheckpointError, match=r"'quantize': None.*not from.*'int8'.*llm\.converted"
    ):
        Models(Settings.of(config), tmp_path / "c")


def test_a_head_that_config_json_does_not_tell_of_is_restored(
    make_llama: Callable[..., Path], tmp_path: Path
) -> None:
    path = shutil.copytree(make_llama(), tmp_path / "llm")
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": True}))
    config = small_config("")
    config.llm.path = str(path)
    loaded = Models(Settings.of(config), tmp_path / "run").llm
    assert loaded.head is not None
    run(config, tmp_path / "run", "convert")
    (path / "model.safetensors").unlink()
    restored = Models(Settings.of(config), tmp_path / "run").llm
    np.testing.assert_array_equal(restored.head[...], loaded.head[...])


def test_a_torn_one_does_not_count(tmp_path: Path) -> None:
    torn = tmp_path / "llm.orbax-checkpoint-tmp-0"
    torn.mkdir()
    assert not is_saved(epath.Path(tmp_path / "llm"))
    assert not is_saved(epath.Path(torn))
