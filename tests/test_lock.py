"""One job a workdir: who has it is told, and however it ends the next one may begin."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from etils import epath

from pplug_jax.errors import InputError
from pplug_jax.storage import lock
from pplug_jax.storage.files import write_json
from pplug_jax.storage.lock import WorkdirInUse, locked
from tests.support.environment import AS_USERS

HOLD = """
import sys, time
from pathlib import Path
from pplug_jax.storage.lock import locked

with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """Another process that has `tmp_path / "run"`."""
    env = os.environ | {"PYTHONPATH": AS_USERS}
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_a_second_job_is_told_who_has_the_workdir(tmp_path: Path, holder: subprocess.Popen) -> None:
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    message = f"in use by process {holder.pid} on {socket.gethostname()}, since 20"
    for _ in range(2):
        with pytest.raises(WorkdirInUse, match=message), locked(tmp_path / "run"):
            raise AssertionError
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    with locked(tmp_path / "another"):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_the_next_job_begins_however_the_one_before_ended(
    tmp_path: Path, holder: subprocess.Popen, end: signal.Signals
) -> None:
    holder.send_signal(end)
    holder.wait()
    with locked(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / lock.OWNER).read_text())["process"] == os.getpid()
    assert not (tmp_path / "run" / lock.OWNER).exists()


def test_a_workdir_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    run = tmp_path / "file" / "run"
    with pytest.raises(InputError, match=f"{run} cannot be written: "), locked(run):
        raise AssertionError


def test_a_job_that_is_refused_at_once_leaves_no_workdir(tmp_path: Path) -> None:
    with pytest.raises(InputError), locked(tmp_path / "run"):
        raise InputError
    assert not (tmp_path / "run").exists()
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    with locked(tmp_path / "kept"):
        pass
    assert (tmp_path / "kept" / "file").exists()


@pytest.fixture
def workdir(bucket: str, monkeypatch: pytest.MonkeyPatch) -> epath.Path:
    """A workdir in a bucket, where the waiting is short."""
    for name, seconds in (("BEAT", 0.02), ("PATIENCE", 0.2), ("SETTLING", 0.0)):
        monkeypatch.setattr(lock, name, seconds)
    return epath.Path(bucket) / "locked"


def test_in_a_bucket_a_job_shows_that_it_lives(workdir: epath.Path) -> None:
    with locked(workdir):
        with pytest.raises(WorkdirInUse, match=f"process {os.getpid()} on"), locked(workdir):
            raise AssertionError
        assert json.loads((workdir / lock.OWNER).read_text())["process"] == os.getpid()
    assert not (workdir / lock.OWNER).exists()


def test_in_a_bucket_a_killed_job_is_found_dead(
    workdir: epath.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with locked(workdir):
        left = (workdir / lock.OWNER).read_text()
    (workdir / lock.OWNER).write_text(left)
    with locked(workdir):
        pass
    assert "or was killed" in capsys.readouterr().out


def test_of_two_that_begin_at_once_in_a_bucket_one_gets_it(
    workdir: epath.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_writes(seconds: float) -> None:
        (workdir / lock.OWNER).write_text('{"process": 1, "host": "other", "token": "else"}')

    monkeypatch.setattr(time, "sleep", other_writes)
    with pytest.raises(WorkdirInUse, match="process 1 on other"), locked(workdir):
        raise AssertionError
    assert "other" in (workdir / lock.OWNER).read_text()


def test_in_a_bucket_a_sign_of_life_that_fails_is_not_the_last(
    workdir: epath.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = iter([OSError(), KeyError(), RuntimeError("Event loop is closed")])
    lives = threading.Event()

    def write(path: Path, content: dict[str, Any]) -> None:
        if "beats" in content:
            if error := next(errors, None):
                raise error
            lives.set()
        write_json(path, content)

    monkeypatch.setattr(lock, "write_json", write)
    with locked(workdir):
        assert lives.wait(20)


def test_in_a_bucket_who_was_taken_for_dead_leaves_the_others_file(
    workdir: epath.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "BEAT", 600.0)
    other = '{"process": 1, "host": "other", "token": "else"}'
    with locked(workdir):
        (workdir / lock.OWNER).write_text(other)
    assert (workdir / lock.OWNER).read_text() == other
