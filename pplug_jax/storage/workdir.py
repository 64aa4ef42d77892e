"""The files of a workdir, by name.

A comparison has a directory like a workdir for each seed.
"""

from pathlib import Path
from typing import Any

from pplug_jax.errors import ConfigError

CONFIG = "config.json"
RESULTS = "results"  # with .json and .md; of another split than the config's `results.SPLIT`
METRICS = "metrics.jsonl"
EVENTS = "tensorboard"
HISTORY = "history"
CONVERTED = "llm"  # the LLM, as later starts read it fastest
PEERS = "peers.npy"
BAD_RECORDS = "bad_records.jsonl"
TRIALS = "tune.json"
REPORT = "report"
LOCK, OWNER = ".lock", "running.json"


def checkpoints_path(directory: Path, method: str) -> Path:
    return directory / "checkpoints" / method


def predictions_path(directory: Path, split: str, method: str) -> Path:
    return directory / "predictions" / f"{split}.{method}.json"


def personas_path(directory: Path, split: str, method: str) -> Path:
    return directory / "personas" / f"{split}.{method}.npz"


def plot_path(directory: Path, name: str) -> Path:
    return directory / "plots" / f"{name}.png"


def seed_path(workdir: Path, seed: int) -> Path:
    return workdir / f"seed_{seed}"


def trial_path(workdir: Path, learning_rate: float) -> Path:
    return workdir / "tune" / str(learning_rate)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a tree: {"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= (
            flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def upgraded(config: dict[str, Any]) -> dict[str, Any]:
    """Return an older config.json's content in today's form.

    Features had a setting each, there were no variants, and nothing was learnt of a task's data.

    Raises:
        ConfigError: it has a setting that is gone.
    """
    config = {"variants": ""} | config
    config["data"] = {"answer": "", "instruction": ""} | config.get("data", {})
    plug = {"place": "front"} | config.get("plug", {})
    config["plug"] = plug
    if "features" in plug or "form" not in plug:
        return config
    if plug.pop("heads", 0):
        raise ConfigError("config.plug.heads is gone; this workdir was made by an older version")
    plug["features"] = [name for name in ("difference", "form") if plug.pop(name)]
    return config
