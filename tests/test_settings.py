"""The settings of a config, and the config of settings."""

import contextlib
import dataclasses
import json
from pathlib import Path

import pytest

from configs import lamp5
from configs.common import base_config
from pplug_jax.config import claim_workdir
from pplug_jax.errors import ConfigError
from pplug_jax.settings import PlugSettings, Settings


def test_settings_go_through_a_config_and_through_json():
    given = Settings(seed=3, plug=PlugSettings(features=("form",), encoder_rate=0.0))
    assert Settings.of(given.config()) == given
    assert Settings.of(json.loads(json.dumps(dataclasses.asdict(given)))) == given
    assert hash(given) == hash(Settings.of(given.config()))
    assert Settings.of({}) == Settings()


def test_a_change_leaves_the_rest():
    settings = Settings.of(lamp5.get_config())
    changed = settings.changed({"plug.temperature": 2, "encoder.query_prefix": "query: "})
    different = {name: x for name, x in changed.flat().items() if x != settings.flat()[name]}
    assert different == {"plug.temperature": 2.0, "encoder.query_prefix": "query: "}
    assert changed.changed({"encoder.query_prefix": None}).encoder.query_prefix is None


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"plug.num_persona_tokens": "four"}, TypeError),
        ({"plug.recency": 0.5}, TypeError),
        ({"plug.recensy": True}, ConfigError),
    ],
)
def test_a_value_keeps_its_type(changes: dict[str, object], error: type[Exception]):
    with pytest.raises(error):
        Settings().changed(changes)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"plug": {"recensy": True}}, r"config\.plug\.recensy: .*did you mean 'recency'"),
        ({"plugs": {}}, r"config\.plugs: there is no such setting"),
        ({"plug": 3}, r"config\.plug: expected a group of settings, not 3"),
    ],
)
def test_what_is_no_setting_is_named(config: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        Settings.of(config)


@pytest.mark.parametrize(
    ("field", "value", "fits"),
    [
        ("data.history_store", "/another/disk", True),
        ("mesh.fsdp", 2, True),
        ("data.history_numbers", "int8", False),
        ("train.learning_rate", 0.5, False),
    ],
)
def test_what_may_differ_in_a_workdir(tmp_path: Path, field: str, value: object, fits: bool):
    config = base_config()
    claim_workdir(tmp_path, Settings.of(config))
    config.update_from_flattened_dict({field: value})
    problem = rf"made with a different config \(config\.{field}: .* there, .* now\)"
    with contextlib.nullcontext() if fits else pytest.raises(ConfigError, match=problem):
        claim_workdir(tmp_path, Settings.of(config))
