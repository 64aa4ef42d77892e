"""The files of a workdir, by name.

A comparison has a directory like a workdir for each seed.
"""

from pathlib import Path

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
