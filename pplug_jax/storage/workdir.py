"""The files of a workdir, by name.

A comparison has a directory like a workdir for each seed.
"""

import re
from pathlib import Path

CONFIG = "config.json"
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


def about_path(predictions: Path) -> Path:
    """Where losses and facts of the answers in `predictions` lie."""
    return predictions.with_suffix(".about.json")


def judged_path(predictions: Path) -> Path:
    """Where answers lie as a judge reads them."""
    return predictions.with_suffix(".judge.jsonl")


def personas_path(directory: Path, split: str, method: str) -> Path:
    return directory / "personas" / f"{split}.{method}.npz"


def plot_path(directory: Path, name: str) -> Path:
    return directory / "plots" / f"{name}.png"


def results_path(workdir: Path, split: str = "") -> Path:
    """Where scores lie; `split` is given if it is another than the config's."""
    return workdir / (f"results.{split}.json" if split else "results.json")


def table_path(results: Path) -> Path:
    """Where the table of these results lies."""
    return results.with_suffix(".md")


def seed_path(workdir: Path, seed: int) -> Path:
    return workdir / f"seed_{seed}"


def run_path(directory: Path) -> Path:
    """Return the workdir that a directory is, or that it is a seed's directory of."""
    of_seed = re.fullmatch(r"seed_\d+", directory.name) and not (directory / CONFIG).is_file()
    return directory.parent if of_seed else directory


def trial_path(workdir: Path, learning_rate: float) -> Path:
    return workdir / "tune" / str(learning_rate)
