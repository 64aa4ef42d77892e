"""A feature of one number is one entry of the table: trained, evaluated, served and planned."""

import math
from pathlib import Path

import jax
import numpy as np
import pytest

from pplug_jax import Personalizer
from pplug_jax.config import checked
from pplug_jax.data.lamp import Item
from pplug_jax.data.sources import read_split
from pplug_jax.data.tasks import Task
from pplug_jax.errors import ConfigError
from pplug_jax.feed.features import FEATURES, Feature
from pplug_jax.plan.programs import Programs
from pplug_jax.run import run
from pplug_jax.runtime.mesh import make_mesh
from pplug_jax.settings import Settings
from tests.support.runs import small_config


def word_counts(task: Task, profile: list[Item]) -> np.ndarray:
    counts = [math.log1p(len(item[task.answer].split())) for item in profile]
    return np.array(counts, np.float32).reshape(-1, 1)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(FEATURES, "words", Feature(lambda size: 1, of_items=word_counts))
    return "words"


@pytest.mark.slow
def test_a_feature_of_one_number(toy: str, tmp_path: Path) -> None:
    config = small_config(methods=("pplug",), plug__features=(toy,), train__epochs=1.0)
    run(config, tmp_path, "train_and_evaluate")
    assert (tmp_path / "results.json").is_file()

    example = read_split(Settings.of(config), "eval")[0]
    personalizer = Personalizer.from_checkpoint(tmp_path)
    soft = personalizer.soft_prompt(example.input, example.profile)
    assert len(soft) == 1 + 2 * config.plug.num_persona_tokens
    longer = [item | {"title": f"{item['title']} and more words"} for item in example.profile]
    changed = personalizer.soft_prompt(example.input, longer)
    assert np.abs(changed - soft)[-config.plug.num_persona_tokens :].max() > 1e-4

    programs = Programs(Settings.of(config), make_mesh(devices=jax.devices()[:1]))
    assert programs.batch(4).features[toy].shape[2:] == (1,)
    assert programs.train()


def test_an_unknown_feature_is_named() -> None:
    with pytest.raises(ConfigError, match=r"features: 'from' is unknown \(did you mean 'form'"):
        checked(small_config(plug__features=("from",)))
