"""Part 4: the comparison of all methods with real LLMs, by the package's own command.

SmolLM2-135M-Instruct and Gemma 3 270M on three data sets of real texts, three seeds each, as
`benchmarks.accelerator.bring` has put them there. The command is stopped before the deadline as
anybody would stop it, and the same part goes on from there if the folder is still there. Of each
run comes back an archive: predictions, metrics, results and the plug of the first seed.
"""

import json
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.accelerator.bring import DATA, ENCODER, HOME, LLMS
from benchmarks.accelerator.record import Record
from benchmarks.accelerator.shapes import free
from pplug_jax.methods.table import METHODS, configured
from pplug_jax.session import Models
from pplug_jax.session.weights import restore_weights
from pplug_jax.settings import Settings

SEEDS = (0, 1, 2)
# The best method, its parts and their controls, and then the rivals, which take as long again.
MAIN = (
    "none",
    "bm25",
    "answers",
    "pplug",
    "instruction_only",
    "shuffled_user",
    "pplug+answers",
    "instruction_only+answers",
    "task_lora+pplug",
    "task_lora+pplug+answers",
    "task_lora+instruction_only+answers",
    "task_lora+shuffled_user+answers",
)
ALL = (*MAIN, "recency", "mean_persona", "task_lora", "task_lora+answers", "pplug_paper")
COLLECTING = 25  # seconds: what stopping and packing take
LEFT_OUT = ("checkpoints", "history", "tensorboard", "llm")


class Run(NamedTuple):
    """name: of the folder. settings: fields of the config. needs: seconds worth beginning with."""

    name: str
    config: str
    methods: tuple[str, ...]
    settings: dict[str, Any]
    needs: float = 60


def real(llm: str, data: str, methods: tuple[str, ...]) -> Run:
    """The settings of docs/results.md, with the LLM's own form of prompt and learning rate."""
    task, epochs = {
        "commit_subjects": ("custom", 4.0),
        "debian_synopses": ("lamp4", 2.0),
        "anthology_titles": ("lamp5", 2.0),
    }[data]
    instructed = llm == "smollm2_135m_instruct"
    settings = {
        "llm.path": LLMS / llm,
        "llm.chat": instructed,
        "encoder.path": ENCODER,
        "encoder.max_length": 128,
        "data.path": DATA / data,
        "data.max_target_length": 32,
        "data.buckets": 2,
        "train.batch_size": 16,
        "train.epochs": epochs,
        "train.learning_rate": 3e-3 if instructed else 3e-4,
        "train.validation": 0.1,
        "train.checkpoint_every": 100,
        "train.keep": 1,
        "eval.max_new_tokens": 32,
        "eval.num_beams": 1,
        "eval.top_k": 4,
        "seeds": SEEDS,
    }
    return Run(f"{llm}.{data}", f"configs/best.py:{task}", methods, settings)


REAL = [
    real(llm, data, methods)
    for llm in ("smollm2_135m_instruct", "gemma3_270m")
    for methods in (MAIN, ALL)
    for data in ("commit_subjects", "debian_synopses", "anthology_titles")
]
TINY = [
    Run(
        "tiny",
        "configs/best.py:lamp5",
        ("none", "pplug"),
        {
            "data.sample_train_users": 16,
            "data.sample_eval_users": 4,
            "data.buckets": 1,
            "train.epochs": 1.0,
            "eval.num_beams": 1,
            "eval.max_new_tokens": 4,
            "seeds": (0,),
        },
        0,
    )
]


def command(run: Run, workdir: Path) -> list[str]:
    fields = run.settings | {"methods": run.methods}
    return [
        *(sys.executable, "-m", "pplug_jax.main", f"--config={run.config}", "--mode=compare"),
        f"--workdir={workdir}",
        *(f"--config.{field}={value}" for field, value in fields.items()),
    ]


def results_of(workdir: Path) -> dict[str, Any]:
    file = workdir / "results.json"
    return json.loads(file.read_text())["methods"] if file.is_file() else {}


def save_plug(workdir: Path, file: Path) -> None:
    """The first seed's plug in float16, without Enc_inp, which stayed as it was."""
    config = Settings.of(json.loads((workdir / "config.json").read_text()))
    assert config.plug.encoder_rate == 0.0
    models, method, seed = Models(config, workdir), METHODS["pplug"], config.seeds[0]
    settings = configured(config, method, seed)
    weights = restore_weights(models, method, settings, workdir / f"seed_{seed}")
    named = {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(weights)
    }
    own = {name: x for name, x in named.items() if not name.startswith(".input_encoder")}
    np.savez(file, **{name: np.asarray(x, np.float16) for name, x in own.items()})


def pack(workdir: Path, archive: Path) -> None:
    with tarfile.open(archive, "w:gz") as packed:
        for path in sorted(workdir.rglob("*")):
            inside = path.relative_to(workdir)
            if path.is_file() and not set(LEFT_OUT) & set(inside.parts):
                packed.add(path, Path(workdir.name, inside))


def compare(record: Record, run: Run, workdir: Path) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    start, stopped = time.monotonic(), False
    with open(workdir / "log.txt", "a") as log:
        process = subprocess.Popen(command(run, workdir), stdout=log, stderr=subprocess.STDOUT)
        try:
            code = process.wait(max(1.0, record.left - COLLECTING))
        except subprocess.TimeoutExpired:
            stopped = True
            process.send_signal(signal.SIGTERM)
            try:
                code = process.wait(COLLECTING / 2)
            except subprocess.TimeoutExpired:
                process.kill()
                code = process.wait()
    found = results_of(workdir)
    name = f"{run.name}, {len(run.methods)} methods"
    record.note(name, seconds=time.monotonic() - start, stopped=stopped, code=code, results=found)
    if code and not stopped:
        record.note(name, error=(workdir / "log.txt").read_text()[-1500:])
    if "pplug" in found:
        record.attempt(name, lambda: save_plug(workdir, workdir / "plug.npz"))
        free()
    archive = record.path.parent / f"{run.name}.tar.gz"
    pack(workdir, archive)
    record.note(name, archive=archive.name, archive_bytes=archive.stat().st_size)


def run(record: Record, rehearse: bool) -> None:
    for each in TINY if rehearse else REAL:
        workdir = (record.path.parent if rehearse else HOME) / "compare" / each.name
        name = f"{each.name}, {len(each.methods)} methods"
        paths = [value for value in each.settings.values() if isinstance(value, Path)]
        if missing := [str(path) for path in paths if not path.exists()]:
            record.note(name, skipped=f"{', '.join(missing)}: not brought")
            continue
        if set(each.methods) <= set(results_of(workdir)):
            record.note(name, done_before=True)
            continue
        record.attempt(name, lambda each=each, to=workdir: compare(record, each, to), each.needs)
