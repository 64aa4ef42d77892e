"""Several true processes on loopback against one with as many devices."""

import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import Mock

import jax
import pytest

from pplug_jax.errors import InputError
from pplug_jax.runtime import distributed
from pplug_jax.storage.files import read_json
from tests.support.environment import ROOT
from tests.support.forks import Fork
from tests.support.once import Once
from tests.support.runs import SMALL, losses_of, steps_done

DEVICES = 4  # of all processes together
SETTINGS = SMALL | {
    "data.sample_train_users": 16,
    "data.sample_eval_users": 10,  # the last batch of 8 is not full
    "methods": "('bm25','pplug')",
}


@pytest.mark.parametrize(
    ("environment", "detection"),
    [
        ({}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "deactivate"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, None),
    ],
)
def test_a_process_without_a_job_is_alone(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], detection: str | None
) -> None:
    initialize = Mock(side_effect=ValueError("coordinator_address should be defined."))
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    distributed.start()
    assert initialize.call_args.kwargs["cluster_detection_method"] == detection


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({"JAX_PROCESS_ID": "1"}, "coordinator_address should be defined"),
        ({"JAX_NUM_PROCESSES": "two"}, "invalid literal"),
    ],
)
def test_half_a_description_of_a_job(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], problem: str
) -> None:
    initialize = Mock(side_effect=ValueError("coordinator_address should be defined."))
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"could not join the others: {problem}"):
        distributed.start()


def start_all(commands: Sequence[Sequence[str]], cwd: Sequence[Path] = ()) -> list[Fork]:
    """A job of these commands, which share DEVICES."""
    count = len(commands)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = []
    for process, command in enumerate(commands):
        env = dict(os.environ)
        env["JAX_COMPILATION_CACHE_DIR"] += f"_{count}_{process}"
        env["XLA_FLAGS"] = env["XLA_FLAGS"].replace("count=8", f"count={DEVICES // count}")
        if count > 1:
            env |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
            env["JAX_PROCESS_ID"] = str(process)
        processes.append(Fork(*command, cwd=cwd[process] if cwd else ROOT, env=env))
    return processes


def start(
    workdir: Path,
    count: int,
    cwd: Sequence[Path] = (),
    mode: str = "train_and_evaluate",
    **settings: object,
) -> list[Fork]:
    """The command in `count` processes, each in its directory of `cwd`, if any."""
    flags = [f"--config.{field}={value}" for field, value in (SETTINGS | settings).items()]
    config = f"--config={ROOT}/configs/lamp5.py"
    command = ["pplug_jax.main", f"--workdir={workdir}", f"--mode={mode}", config, *flags]
    return start_all([command] * count, cwd)


def ends(processes: Sequence[Fork]) -> tuple[list[int], list[str]]:
    outputs = ["".join(process.communicate(timeout=300)) for process in processes]
    return [process.returncode for process in processes], outputs


def assert_same_run(one: Path, other: Path) -> None:
    curve, expected = losses_of(one), losses_of(other)
    assert [step for step, _ in curve] == [step for step, _ in expected]
    assert [loss for _, loss in curve] == pytest.approx([loss for _, loss in expected], rel=1e-5)
    for method in ("bm25", "pplug"):
        name = Path("predictions") / f"dev.{method}.json"
        assert json.loads((one / name).read_text()) == json.loads((other / name).read_text())
    tables = [json.loads((path / "results.json").read_text())["methods"] for path in (one, other)]
    for name, entry in tables[0].items():
        assert entry["loss"]["value"] == pytest.approx(tables[1][name]["loss"]["value"], rel=1e-5)


@pytest.fixture(scope="module")
def alone(once: Once) -> Path:
    """The workdir of one process with all the devices."""

    def make(workdir: Path) -> None:
        codes, outputs = ends(start(workdir, 1))
        assert codes == [0], outputs

    return once("alone", make)


def items_in(host: Path) -> int:
    """The items of the host's history store."""
    commits = map(read_json, (host / "history").glob("*/*.json"))
    return sum(shard["items"] for commit in commits for shard in commit["shards"])


@pytest.mark.slow
def test_processes_together_do_what_one_does(alone: Path, tmp_path: Path) -> None:
    """Two of them share a history store, the others have one each."""
    names = ("host_0", "host_0", "host_1", "host_2")
    hosts = [tmp_path / name for name in names]
    for host in set(hosts):
        host.mkdir()
    codes, outputs = ends(
        start(tmp_path / "run", len(hosts), hosts, **{"data.history_store": "history"})
    )
    assert codes == [0] * len(hosts), outputs
    assert_same_run(tmp_path / "run", alone)
    # The first alone speaks.
    assert "rouge1" in outputs[0]
    assert not any("rouge1" in output or "workdir" in output for output in outputs[1:])
    items = items_in(alone)
    assert items > 0
    for host in hosts:
        assert items_in(host) == items


@pytest.mark.slow
def test_stopped_and_lost_processes(alone: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    longer = {"mode": "train", "train.epochs": 10.0, "train.checkpoint_every": 4}

    def started(until: int) -> list[Fork]:
        processes = start(workdir, 2, **longer)
        while steps_done(workdir) < until:
            assert all(process.poll() is None for process in processes), ends(processes)
            time.sleep(0.01)
        return processes

    # A notice to one stops both behind the same step.
    processes = started(3)
    processes[1].send_signal(signal.SIGTERM)
    codes, outputs = ends(processes)
    assert codes == [128 + signal.SIGTERM] * 2, outputs
    assert "SIGTERM: saved step" in outputs[0]
    step = max(int(p.name) for p in (workdir / "checkpoints" / "pplug").iterdir())
    assert step >= 3

    # One that is killed ends the other, which says so.
    processes = started(step + 7)
    processes[1].kill()
    codes, outputs = ends(processes)
    assert codes[0] not in (0, None)
    assert "lost" in outputs[0] or "distributed service detected fatal errors" in outputs[0]

    # One process, with another number of devices each, goes on from their checkpoint.
    saved = max(int(p.name) for p in (workdir / "checkpoints" / "pplug").iterdir())
    assert saved > step
    codes, outputs = ends(start(workdir, 1, **longer))
    assert codes == [0], outputs
    undisturbed = tmp_path / "undisturbed"
    shutil.copytree(alone / "history", undisturbed / "history")
    codes, more = ends(start(undisturbed, 1, **longer))
    assert codes == [0], more
    curve, expected = losses_of(workdir), losses_of(undisturbed)
    assert [step for step, _ in curve] == [step for step, _ in expected] == list(range(1, 21))
    assert [loss for _, loss in curve] == pytest.approx([loss for _, loss in expected], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("failures", [1, 99])
def test_all_restore_the_same_step_or_none_does(tmp_path: Path, failures: int) -> None:
    script = ["tests.support.restoring", str(tmp_path / "kept"), str(failures)]
    codes, outputs = ends(start_all([script] * 2))
    assert codes == [0, 0], outputs
    if failures == 1:
        assert all("step 2, values {2.0}" in output for output in outputs), outputs
    else:
        assert all("step 2 could not be read" in output for output in outputs), outputs
        assert "another process could not read it" in outputs[0]
        assert "503 Service Unavailable" in outputs[1]
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["1", "2"]
