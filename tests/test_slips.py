"""Every slip in a command line is one line that says what is near."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from absl.testing import flagsaver

from pplug_jax import main  # noqa: F401  defines the flags
from pplug_jax.main import _is_needed
from pplug_jax.runtime.slips import near, parse_flags
from tests.support.environment import AS_USERS, ROOT
from tests.support.forks import Fork

AS_A_USER = os.environ | {"PYTHONPATH": AS_USERS}
CONFIG = "--config=configs/lamp5.py"
SLIPS = {
    "a setting": ([CONFIG, "--config.train.learning_rat=3"], "'train.learning_rate'"),
    "a setting before the config": (["--config.train.learning_rat=3", CONFIG], "learning_rate'"),
    "a group": ([CONFIG, "--config.trian.epochs=3"], "'train.epochs'"),
    "a setting of nothing": ([CONFIG, "--config.zzz.yyy=3"], "config.zzz.yyy: there is no such"),
    "a setting below a setting": ([CONFIG, "--config.seed.x=3"], "config.seed.x: there is no such"),
    "a file": (["--config=configs/lamp55.py"], "(did you mean 'configs/lamp5.py'?)"),
    "another file": (["--config=nothere.py"], "--config=nothere.py: there is no such file"),
    "a directory": (["--config=configs"], "--config=configs: there is no such file"),
    "no config": (["--config=configs/common.py"], "no function get_config"),
    "no program": (["--config=README.md"], "--config=README.md: "),
    "an LLM": (["--config=configs/lamp5.py:llama9"], "'llama9' is unknown (did you mean 'llama3_"),
    "a slice": (["--config=configs/lamp5.py:llama3_1b@v5e-9"], "did you mean 'v5e-8'?"),
    "a task": (["--config=configs/best.py:lamp9"], "'lamp9' is unknown (did you mean 'lamp"),
    "one dash": (["-config", "configs/lamp5.py", "-config.sed=1"], "did you mean 'seed'?"),
    "no flag": ([CONFIG, "mode=train"], "'mode=train' is no flag"),
    "nothing": ([], "--config is missing; for example --config=configs/lamp5.py"),
    "a setting alone": (["--config.seed=1"], "--config is missing"),
    "a mode": ([CONFIG, "--mode=trian"], "--mode=trian: value should be one of"),
    "a flag": ([CONFIG, "--workdri=x"], "Unknown command line flag 'workdri'"),
    "a number": ([CONFIG, "--config.train.learning_rate=x"], "could not convert string to float"),
}


@pytest.fixture(autouse=True)
def root(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The repository's root, and flags that stay as they were."""
    monkeypatch.chdir(ROOT)
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # the last one's functions
    with flagsaver.flagsaver():
        yield


@pytest.mark.parametrize("returned", ["None", "{}"])
def test_a_config_that_is_none(returned: str, tmp_path: Path) -> None:
    path = tmp_path / "config.py"
    path.write_text(f"def get_config():\n    return {returned}\n")
    with pytest.raises(SystemExit, match="get_config must return an ml_collections.ConfigDict"):
        parse_flags(["main", f"--config={path}"])


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_is_one_line(slip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, expected = SLIPS[slip]
    monkeypatch.setattr(sys, "argv", ["main", *arguments])  # where config flags look besides
    with pytest.raises(SystemExit) as ended:
        parse_flags(["main", *arguments])
    message = str(ended.value)
    assert message.startswith("error: ")
    assert expected in message
    assert "\n" not in message


def test_where_there_are_no_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = "no such file; work in a clone of the repository, which has configs/, or give"
    with pytest.raises(SystemExit, match=message):
        parse_flags(["main", CONFIG])


@pytest.mark.slow
def test_the_command_prints_it(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pplug_jax.main", CONFIG, "--config.train.learning_rat=3"],
        capture_output=True,
        text=True,
        check=False,
        env=AS_A_USER,
    )
    assert done.returncode == 1
    line = "error: --config.train.learning_rat: there is no such setting (did you mean "
    assert done.stderr == f"{line}'train.learning_rate'?)\n"
    assert done.stdout == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--workdir=memory://x", "--workdir=memory://x: nothing here reads memory://"),
        ("--mode=plan", "--mode=plan and --topology belong together"),
        ("--output=x", "--mode=export and --output belong together"),
        ("--needs=[1]", "--needs=[1]: expected an object of num_cpus, num_gpus (numbers) or"),
        ("--workers=2", "--workers belongs to --engine=ray"),
        ("--config.eval.num_beams=0", "config.eval.num_beams 0 must be at least 1"),
    ],
)
def test_a_flag_that_cannot_work_is_one_line(flag: str, message: str, tmp_path: Path) -> None:
    command = Fork("pplug_jax.main", CONFIG, f"--workdir={tmp_path}", flag)
    _, error = command.communicate(timeout=120)
    assert command.returncode == 1
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("needs", "fits"),
    [
        ({"num_cpus": 1, "num_gpus": 0.5}, True),
        ({"resources": {"TPU": 4}}, True),
        ({}, True),
        ({"num_cpus": "1"}, False),
        ({"gpus": 1}, False),
        ({"resources": 4}, False),
        ({"resources": {"TPU": "v5e"}}, False),
        (3, False),
    ],
)
def test_what_a_worker_may_need(needs: object, fits: bool) -> None:
    assert _is_needed(needs) == fits


def test_what_is_near() -> None:
    assert near("pplugg", ["none", "pplug"]) == " (did you mean 'pplug'?)"
    assert near("entirely else", ["none", "pplug"]) == ""
