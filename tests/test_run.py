"""The command as its user meets it.

A whole run, a second start, every way to be interrupted, and bad input.
"""

import functools
import json
import os
import resource
import shutil
import signal
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath

from configs import lamp5, llms
from pplug_jax import Personalizer
from pplug_jax.config import ABOVE_ZERO, FROM_ONE, SHARES, check_batches, checked
from pplug_jax.data.lamp import DataError
from pplug_jax.data.sources import read_split
from pplug_jax.errors import CheckpointError, ConfigError, InputError
from pplug_jax.evaluate import predict as answers
from pplug_jax.llm import LLM
from pplug_jax.main import default_workdir
from pplug_jax.methods.table import METHODS
from pplug_jax.plugs.persona import UserEmbedder
from pplug_jax.run import run
from pplug_jax.session import Models
from pplug_jax.session.weights import abstract_weights
from pplug_jax.settings import Settings
from pplug_jax.storage import lock
from pplug_jax.storage.checkpoint import Checkpoints
from pplug_jax.storage.lock import locked
from pplug_jax.train import step as train
from tests.support.environment import QUICK_TO_COMPILE
from tests.support.forks import Fork
from tests.support.lamp_files import write_split
from tests.support.runs import SMALL, losses_of, small_config, steps_done


@pytest.mark.slow
def test_a_run_leaves_its_files(finished: Path) -> None:
    config = small_config()
    assert json.loads((finished / "config.json").read_text()) == json.loads(
        json.dumps(config.to_dict())
    )
    results = json.loads((finished / "results.json").read_text())
    assert results["task"] == "LaMP_5" and results["split"] == "dev" and results["n"] == 8
    ids = [example.id for example in read_split(Settings.of(config), "eval")]
    for method in config.methods:
        entry = results["methods"][method]
        for metric in ("rouge1", "rougeL"):
            value = entry[metric]
            assert 0 <= value["low"] <= value["value"] <= value["high"] <= 1
        submission = json.loads((finished / "predictions" / f"dev.{method}.json").read_text())
        assert submission["task"] == "LaMP_5"
        assert [gold["id"] for gold in submission["golds"]] == ids
        assert f"| {method} |" in (finished / "results.md").read_text()
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    for method in ("pplug", "instruction_only"):
        losses = {line["step"]: line["value"] for line in lines if line["name"] == f"{method}/loss"}
        assert sorted(losses) == list(range(1, 7))
        assert Checkpoints(finished / "checkpoints" / method).latest == 6
        assert list((finished / "tensorboard" / method).iterdir())
    for plot in ("results", "loss"):
        assert (finished / "plots" / f"{plot}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_step_is_compiled_once_a_bucket_and_reading(finished: Path) -> None:
    compiled = (finished / "compiled").read_text().splitlines()
    assert 0 < compiled.count("jit(train_step)") <= 2 * small_config().data.buckets


def abstract_plug(models: Models) -> UserEmbedder:
    return abstract_weights(models, METHODS["pplug"], models.config)


@pytest.mark.slow
def test_a_checkpoint_holds_the_plug_and_never_the_llm(finished: Path) -> None:
    models = Models(Settings.of(small_config()), finished)
    size = sum(f.stat().st_size for f in (finished / "checkpoints").rglob("*") if f.is_file())
    plug = sum(4 * x.size for x in jax.tree.leaves(abstract_plug(models)))
    # Two plugs, two checkpoints each, parameters and Adam's two moments.
    assert size < 1.2 * 2 * 2 * 3 * plug


@pytest.mark.slow
def test_a_second_start_does_nothing_again(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    workdir = shutil.copytree(finished, tmp_path / "run")

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("was run again")

    before = (workdir / "results.json").read_text()
    monkeypatch.setattr(answers, "predict", never)
    monkeypatch.setattr("pplug_jax.train.step.train_step", never)
    monkeypatch.setattr("pplug_jax.encoder.Encoder.encode", never)
    monkeypatch.setattr(Models, "llm", property(never))
    run(small_config(), workdir, "train_and_evaluate")
    assert (workdir / "results.json").read_text() == before
    assert " 0 were encoded now" in capsys.readouterr().out


@pytest.mark.slow
def test_another_config_is_refused_and_the_fields_named(finished: Path, tmp_path: Path) -> None:
    workdir = shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"config\.train\.learning_rate: 0\.01 there, 0\.5 now"):
        run(small_config(train__learning_rate=0.5), workdir, "train")


@pytest.mark.slow
def test_the_personalizer_answers_as_the_evaluation(finished: Path) -> None:
    personalizer = Personalizer.from_checkpoint(finished)
    golds = json.loads((finished / "predictions" / "dev.pplug.json").read_text())["golds"]
    for example, gold in list(
        zip(read_split(Settings.of(small_config()), "eval"), golds, strict=True)
    )[:3]:
        assert personalizer.generate(example.input, example.profile) == gold["output"]
    texts = [personalizer.models.task.item_text(item) for item in example.profile]
    soft = personalizer.soft_prompt(example.input, texts)
    assert (
        soft.shape == (1 + small_config().plug.num_persona_tokens, 128) and soft.dtype == np.float32
    )
    np.testing.assert_array_equal(soft, personalizer.soft_prompt(example.input, example.profile))
    null = personalizer.soft_prompt(example.input)
    assert np.isfinite(null).all() and np.any(null[1:] != soft[1:])


@pytest.mark.slow
def test_modes_stop_where_they_say(tmp_path: Path) -> None:
    config = small_config(methods=("none", "pplug"))
    run(config, tmp_path, "encode")
    assert not (tmp_path / "checkpoints").exists()
    with pytest.raises(CheckpointError, match="no checkpoint; train first"):
        run(config, tmp_path, "evaluate")
    with pytest.raises(InputError, match=r"'pplug' was not trained here .*\); train it"):
        Personalizer.from_checkpoint(tmp_path)
    with pytest.raises(InputError, match="not the workdir of a run"):
        Personalizer.from_checkpoint(tmp_path / "nowhere")


@pytest.mark.slow
def test_the_step_is_compiled_while_the_llm_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, step, llm = threading.Event(), train.train_step, Models.llm

    @functools.wraps(step)
    def noted(*args: Any, **settings: Any) -> Any:
        begun.set()
        return step(*args, **settings)

    def slow(models: Models) -> LLM:
        assert begun.wait(120)
        return llm.func(models)

    slow_llm = functools.cached_property(slow)
    slow_llm.__set_name__(Models, "llm")
    monkeypatch.setattr(train, "train_step", noted)
    monkeypatch.setattr(Models, "llm", slow_llm)
    run(small_config(methods=("pplug",)), tmp_path, "train")
    assert begun.is_set()


def test_the_default_workdir_is_named_after_the_config() -> None:
    assert default_workdir("configs/lamp5.py:llama3_1b") == Path("runs/lamp5-llama3_1b")
    assert default_workdir("configs/lamp5.py:llama3_1b@v5e-8") == Path("runs/lamp5-llama3_1b")
    assert default_workdir("configs/lamp5.py") == Path("runs/lamp5")
    assert default_workdir("configs/best.py:lamp4:llama3_1b@v5e-8") == Path(
        "runs/best-lamp4-llama3_1b"
    )


ENVIRONMENT = os.environ | {"XLA_FLAGS": QUICK_TO_COMPILE}


def start(workdir: Path, env: Mapping[str, str] = ENVIRONMENT, **settings: object) -> Fork:
    flags = [f"--config.{name}={value}" for name, value in (SMALL | settings).items()]
    command = ["pplug_jax.main", "--config=configs/lamp5.py", f"--workdir={workdir}"]
    return Fork(*command, "--mode=train", *flags, env=env)


@pytest.mark.slow
def test_killed_interrupted_and_started_again_ends_bit_identical(tmp_path: Path) -> None:
    settings = {
        "methods": "('pplug',)",
        "data.sample_train_users": 12,
        "data.sample_eval_users": 1,
        "train.batch_size": 4,
        "train.epochs": 8.0,
        "train.checkpoint_every": 3,
    }
    undisturbed = start(tmp_path / "a", **settings)
    output = "".join(undisturbed.communicate(timeout=300))
    assert undisturbed.returncode == 0, output

    for sent, moment in (
        (signal.SIGINT, 2),
        (signal.SIGKILL, 7),
        (signal.SIGTERM, 11),
    ):
        process = start(tmp_path / "b", **settings)
        while steps_done(tmp_path / "b") < moment and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(sent)
        output = "".join(process.communicate(timeout=300))
        if sent == signal.SIGKILL:
            assert process.returncode == -signal.SIGKILL, output
        else:
            assert process.returncode == 128 + sent, output
            assert f"{sent.name}: saved step" in output
            assert "Traceback" not in output
    last = start(tmp_path / "b", **settings)
    output = "".join(last.communicate(timeout=300))
    assert last.returncode == 0, output

    models = Models(Settings.of(small_config()), tmp_path / "a")
    checkpoints = [Checkpoints(tmp_path / name / "checkpoints" / "pplug") for name in "ab"]
    assert [c.latest for c in checkpoints] == [24, 24]
    plugs = [c.restore_weights(abstract_plug(models)) for c in checkpoints]
    for a, b in zip(*map(jax.tree.leaves, plugs), strict=True):
        np.testing.assert_array_equal(a, b)
    curves = [losses_of(tmp_path / name) for name in "ab"]
    assert len(curves[0]) == 24
    assert curves[0] == curves[1]


@pytest.mark.slow
def test_a_full_disk_while_checkpointing_is_one_clear_line(tmp_path: Path) -> None:
    process = start(
        tmp_path / "run",
        ENVIRONMENT | {"JAX_COMPILATION_CACHE_DIR": ""},
        **{
            "methods": "('pplug',)",
            "data.sample_train_users": 8,
            "data.sample_eval_users": 1,
        },
    )
    # Files may not grow beyond 64 KiB: as on a full disk, writing the plug fails in the middle.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (65536, 65536))
    _, error = process.communicate(timeout=300)
    assert process.returncode == 1
    lines = error.splitlines()
    assert len(lines) == 1, error
    assert lines[0].startswith("error: ") and "could not be written" in lines[0]
    assert "make room" in lines[0]


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (
            {"data__path": "/nowhere"},
            ConfigError,
            r"config\.data\.path: there is no directory '/nowhere'",
        ),
        (
            {"llm__path": "/nowhere"},
            ConfigError,
            r"config\.llm\.path: there is no directory '/nowhere'",
        ),
        (
            {"encoder__path": "/nowhere"},
            ConfigError,
            r"config\.encoder\.path: there is no directory",
        ),
        ({"task": "LaMP_99"}, ConfigError, r"config\.task 'LaMP_99' is unknown"),
        ({"methods": ("none", "magic")}, ConfigError, "'magic' is unknown; known: none, random"),
        (
            {"methods": ("shuffled_user",)},
            ConfigError,
            "uses what 'pplug' trains, which is missing",
        ),
        ({"train__batch_size": 6}, ConfigError, r"config\.train\.batch_size .*: 6 rows .* 8 parts"),
        ({"eval__batch_size": 3}, ConfigError, r"config\.eval\.batch_size: 3 rows .* 8 parts"),
        (
            {"train__accumulation": 3},
            ConfigError,
            "does not divide into config.train.accumulation 3",
        ),
        ({"mesh__tensor": 3}, InputError, "tensor=3 needs"),
        ({"data__max_input_length": 5000}, ConfigError, "the LLM was made for 2048"),
        ({"encoder__pooling": "max"}, ConfigError, r"config\.encoder\.pooling 'max' is unknown"),
        ({"plug__dtype": "float31"}, ConfigError, r"config\.plug\.dtype .*did you mean 'float32'"),
        ({"llm__quantize": "int3"}, ConfigError, "'int3' is unknown .*; known: '', 'int8', 'int4'"),
        *(
            ({field.replace(".", "__"): 0}, ConfigError, rf"{field} 0 must be at least 1")
            for field in FROM_ONE
        ),
        *(
            ({field.replace(".", "__"): value}, ConfigError, rf"{field} .* must be above 0")
            for field in ABOVE_ZERO
            for value in (0.0, float("nan"), float("inf"))
        ),
        *(
            ({field.replace(".", "__"): 1.5}, ConfigError, rf"{field} 1\.5 is a share")
            for field in SHARES
        ),
    ],
)
def test_a_setting_that_cannot_work_is_named(
    overrides: dict, error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        run(small_config(**overrides), tmp_path, "encode")
    assert not (
        tmp_path / "config.json"
    ).exists()  # so that the corrected command can use the workdir


def test_a_preset_says_what_it_needs(tmp_path: Path) -> None:
    config = lamp5.get_config("llama3_1b")
    with pytest.raises(ConfigError, match="questions.json"):
        run(config, tmp_path, "encode")
    config.data.path = ""
    config.data.sample_train_users = config.data.sample_eval_users = 1
    with pytest.raises(
        ConfigError, match=r"(?s)config\.llm\.path: .*hf download meta-llama/Llama-3.2-1B-Instruct"
    ):
        run(config, tmp_path, "encode")


@pytest.mark.parametrize("machine", ["", *llms.SLICES])
@pytest.mark.parametrize("name", llms.PRESETS)
def test_presets(name: str, machine: str) -> None:
    if machine and getattr(llms.PRESETS[name], llms.SLICES[machine]) is None:
        with pytest.raises(ValueError, match=f"{name} does not fit a {machine}"):
            lamp5.get_config(f"{name}@{machine}")
        return
    config = lamp5.get_config(f"{name}@{machine}" if machine else name)
    settings = checked(config)
    assert 8 % config.mesh.fsdp == 0 and config.mesh.tensor == 1
    check_batches(settings, 8)
    assert config.llm.chat != name.startswith("flan")
    assert config.to_dict().keys() == lamp5.get_config().to_dict().keys()


def test_a_laptop_reads_less_in_full_precision() -> None:
    config, plain = lamp5.get_config("smollm2_135m@cpu"), lamp5.get_config("smollm2_135m")
    checked(config)
    assert (config.llm.path, config.llm.chat) == (plain.llm.path, True)
    assert {config.llm.dtype, config.plug.dtype, config.encoder.dtype} == {"float32"}
    assert config.encoder.path.endswith("all-MiniLM-L6-v2")
    assert config.encoder.query_prefix is None  # MiniLM has none, BGE has
    assert default_workdir("configs/best.py:lamp4:smollm2_135m@cpu") == Path(
        "runs/best-lamp4-smollm2_135m"
    )


def test_unknown_presets() -> None:
    with pytest.raises(ValueError, match="'gpt5' is unknown; known: embedded, smollm2_135m"):
        lamp5.get_config("gpt5")
    with pytest.raises(ValueError, match="'v9' is unknown; known: v5e-8, v5p-16, cpu"):
        lamp5.get_config("llama3_1b@v9")


@pytest.mark.slow
def test_files_in_lamps_format_with_empty_profiles_and_withheld_outputs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An empty profile gets the null persona; a test split without outputs is only answered."""
    prompt = "Generate a title for the following abstract of a paper: We measure {}."
    item = {"id": "x", "title": "Tides", "abstract": "Tides were measured. " * 200}
    questions = [
        {"id": str(i), "input": prompt.format(f"river {i}"), "profile": [item] * (i % 3)}
        for i in range(8)
    ]
    golds = [{"id": str(i), "output": f"River {i}"} for i in range(8)]
    outputs = {"task": "LaMP_5", "golds": golds}
    write_split(tmp_path / "data", "train", questions, outputs)
    write_split(tmp_path / "data", "test", questions, None)
    config = small_config(
        data__path=str(tmp_path / "data"), data__eval_split="test", methods=("bm25", "pplug")
    )
    run(config, tmp_path / "run", "train_and_evaluate")
    submission = json.loads((tmp_path / "run" / "predictions" / "test.pplug.json").read_text())
    assert [gold["id"] for gold in submission["golds"]] == [str(i) for i in range(8)]
    output = capsys.readouterr().out
    assert "nothing is scored" in output
    assert "no user has a history" not in output
    assert "1 of them reach the encoder's 64 tokens" in output
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert all(np.isfinite(line["value"]) for line in lines)

    write_split(tmp_path / "data", "train", questions, outputs | {"golds": golds[:-1]})
    with pytest.raises(
        DataError, match=r"train_questions\.json: id '7': it has no output in train"
    ):
        run(config, tmp_path / "other", "encode")


@pytest.mark.slow
def test_the_command_shows_bad_input_as_one_line(tmp_path: Path) -> None:
    process = start(tmp_path / "run", **{"llm.path": "/nowhere"})
    output = "".join(process.communicate(timeout=120))
    assert process.returncode == 1
    assert "error: config.llm.path: there is no directory '/nowhere'" in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_a_start_beside_another_does_nothing(tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        process = start(tmp_path / "run")
        output = "".join(process.communicate(timeout=120))
        assert process.returncode == 1
        assert f"run is in use by process {os.getpid()} on {socket.gethostname()}" in output
        assert "Traceback" not in output
        assert {path.name for path in (tmp_path / "run").iterdir()} == {lock.LOCK, lock.OWNER}


@pytest.mark.slow
def test_a_workdir_in_a_bucket(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lock, "SETTLING", 0.0)
    workdir = epath.Path(bucket) / "run"
    config = small_config(methods=("none", "bm25"))
    for _ in range(2):  # the second start finds what the first one left
        run(config, workdir, "train_and_evaluate")
        results = json.loads((workdir / "results.json").read_text())
        assert list(results["methods"]) == ["none", "bm25"]
    assert (workdir / "plots" / "results.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (workdir / "predictions").iterdir()]
    # Vectors are mapped into memory, which wants a disk.
    assert [path.name for path in tmp_path.iterdir()] == ["history"]
