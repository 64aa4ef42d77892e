"""Small runs of the command, and what they leave."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_collections

from configs import lamp5
from pplug_jax.run import run

SMALL = {
    "data.sample_train_users": 24,
    "data.sample_eval_users": 8,
    "data.max_input_length": 96,
    "plug.num_persona_tokens": 4,
    "plug.projector_size": 128,
    "train.batch_size": 8,
    "train.epochs": 2.0,
    "train.log_every": 1,
    "train.checkpoint_every": 2,
    "eval.batch_size": 8,
    "eval.max_new_tokens": 8,
    "eval.bootstrap_samples": 100,
}


def small_config(**overrides: object) -> ml_collections.ConfigDict:
    config = lamp5.get_config()
    config.update_from_flattened_dict(
        SMALL | {k.replace("__", "."): v for k, v in overrides.items()}
    )
    return config


@contextlib.contextmanager
def noting_compiled() -> Iterator[list[str]]:
    """The names of what is compiled meanwhile, a list that grows."""
    compiled = []

    def note(event: str, duration: float, **kwargs: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(kwargs["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


def finish(workdir: Path) -> None:
    """Runs it, and notes what is compiled."""
    jax.clear_caches()
    with noting_compiled() as compiled:
        run(small_config(), workdir, "train_and_evaluate")
    (workdir / "compiled").write_text("\n".join(compiled))


def results_of(workdir: Path) -> dict[str, Any]:
    return json.loads((workdir / "results.json").read_text())


def losses_of(workdir: Path, method: str = "pplug") -> list[tuple[int, float]]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["value"]) for line in lines if line["name"] == f"{method}/loss"]


def steps_done(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)
