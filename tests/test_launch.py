"""The launchers against a cloud that is a directory, by a `gcloud` and a `kubectl` of our own."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from ast import literal_eval
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from pplug_jax.serve.__main__ import server_parser

pytestmark = pytest.mark.slow

LAUNCH = Path(__file__).parents[1] / "launch"
SUPPORT = Path(__file__).parent / "support"
WORKERS = 2  # of every TPU VM, as in support/fake_cloud.py
UV = """#!/usr/bin/env bash
case $1 in
  venv) mkdir .venv && mkdir .venv/bin && ln -sf "$PYTHON" .venv/bin/python ;;
  pip) echo "${@: -3}" >>~/installed ;;
esac
"""

PIP = """#!/usr/bin/env bash
[[ $* == "-m pip install --quiet --user uv" ]] || exit 1
mkdir -p ~/.local/bin && cp "$CLOUD/uv" ~/.local/bin/
"""

RUN = ["run", "--name=plug", "--project=some-project", "--zone=us-west4-a"]
RUN += ["--accelerator=v5litepod-16"]
NAMED = ["--name=plug", "--project=some-project", "--zone=us-west4-a"]
TUNNEL = ["--tunnel-through-iap"]
ARGUMENTS = [
    "--config=configs/lamp5.py:llama3_8b@v5e-8",
    "--workdir=gs://bucket/runs/lamp5",
    "--config.methods=('none','pplug')",
    '--config.llm.separator=  a "b" $HOME `c` \\ *\nd\t;',
]


class Cloud:
    """The fake cloud, and a repository whose launchers run against it."""

    def __init__(self, path: Path):
        self.path = path
        self.repo = path / "repo"
        shutil.copytree(LAUNCH, self.repo / "launch")
        (self.repo / "pplug_jax").mkdir()
        shutil.copy(SUPPORT / "fake_job.py", self.repo / "pplug_jax" / "main.py")
        (self.repo / "requirements.txt").write_text("jax\n")
        self.git("init", "--quiet")
        self.git("add", ".")
        self.git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "a")
        programs = path / "bin"
        programs.mkdir()
        (path / "uv").write_text(UV)
        fake = f"#!{sys.executable} -IS\n{(SUPPORT / 'fake_cloud.py').read_text()}"
        for name, text in {"gcloud": fake, "kubectl": fake, "python3": PIP}.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        (path / "uv").chmod(0o755)
        self.env = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "CLOUD": str(path),
            "PYTHON": sys.executable,
            "POLL_SECONDS": "0",
            "HOME": str(path),
        }
        self.write(rules=[], exits={}, world={"nodes": {}, "queued": {}}, states=["Completed"])

    def git(self, *arguments: str) -> None:
        subprocess.run(["git", *arguments], cwd=self.repo, check=True)

    def write(self, **contents: Any) -> None:
        for name, content in contents.items():
            (self.path / name).write_text(repr(content))

    def seed(self, *, queued: bool) -> None:
        """There is a plug already, without a job."""
        node = {"state": "READY", "owner": "plug", "queued": queued}
        self.write(
            world={"nodes": {"plug": node}, "queued": {"plug": ["ACTIVE"]} if queued else {}}
        )

    def read(self, name: str) -> list[Any]:
        path = self.path / name
        return list(map(literal_eval, path.read_text().splitlines())) if path.exists() else []

    def command(self, *arguments: str, script: str = "tpu.sh") -> list[str]:
        return ["bash", str(self.repo / "launch" / script), *arguments]

    def run(
        self, *arguments: str, script: str = "tpu.sh", stdin: str = ""
    ) -> subprocess.CompletedProcess:
        done = subprocess.run(
            self.command(*arguments, script=script),
            env=self.env,
            check=False,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=300,  # of a hang; a busy machine may be slow
            start_new_session=True,  # as the fake Ctrl-C reaches the whole group
        )
        print(done.stdout, done.stderr, f"status {done.returncode}", sep="\n")
        return done

    def run_told(self, what: str, done: subprocess.CompletedProcess, stdin: str = "") -> None:
        """Runs a command that a launcher has told of, as in "To delete it:"."""
        command = ["bash", "-c", re.search(f"{what}: +(.*)", done.stderr).group(1)]
        subprocess.run(command, env=self.env, input=stdin, text=True, check=True, timeout=300)

    @property
    def calls(self) -> list[list[str]]:
        return self.read("calls")

    @property
    def steps(self) -> list[str]:
        """The calls in short, as "create" or "ssh follow", those that only ask left out."""
        steps = []
        for call in tpu_calls(self.calls):
            if verb_of(call) in ("list", "describe"):
                continue
            remote = [a.split()[2] for a in call if a.startswith("--command=")]
            steps.append(" ".join([verb_of(call), *remote]))
        return steps

    @property
    def started(self) -> list[Any]:
        """[worker, arguments] of every start of the job."""
        return self.read("started")

    @property
    def nodes(self) -> dict[str, Any]:
        return self.read("world")[0]["nodes"]


def tpu_calls(calls: list[list[str]]) -> list[list[str]]:
    """Those of `gcloud [alpha] compute tpus`, the archive's temporary directory left out."""
    calls = [call for call in calls if "tpus" in call[:4]]
    return [[re.sub(r".*/(pplug.tar.gz)$", r"\1", word) for word in call] for call in calls]


def verb_of(call: list[str]) -> str:
    return call[call.index("tpus") + 2]


def printed(dry: subprocess.CompletedProcess) -> list[list[str]]:
    """The commands of gcloud that a dry run has printed."""
    commands = re.split(r"^\+ ", dry.stderr, flags=re.MULTILINE)[1:]
    return [shlex.split(each.partition("--quiet\n")[0] + "--quiet") for each in commands]


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    cloud = Cloud(tmp_path)
    yield cloud
    for pid in tmp_path.glob("homes/*/*/job/pid"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(pid.read_text()), signal.SIGTERM)


ATTEMPT = ["scp", "ssh install", "ssh start", "ssh follow"]
WHOLE = ["create", *ATTEMPT, "ssh wait_for_end"]


@pytest.mark.parametrize("script", ["tpu.sh", "jobset.sh"])
@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["delete", "--help"]])
def test_help(cloud: Cloud, script: str, arguments: list[str]) -> None:
    done = cloud.run(*arguments, script=script)
    assert done.returncode == 0
    assert "usage:" in done.stdout and "--dry-run" in done.stdout
    assert not cloud.calls


def test_scripts_are_clean() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:/usr/bin")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (requirements-dev.txt)")
    scripts = sorted(LAUNCH.glob("*.sh"))
    assert len(scripts) >= 4
    done = subprocess.run([shellcheck, "-x", *scripts], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    for script in scripts:
        if script.name != "common.sh":  # which is sourced
            assert "\nset -euo pipefail\n" in script.read_text()
            assert os.access(script, os.X_OK)


@pytest.mark.parametrize("arguments", [["attach"], ["stop", "--queued"], ["delete", "--queued"]])
def test_dry_run_of_the_rest(cloud: Cloud, arguments: list[str]) -> None:
    done = cloud.run(*arguments, *NAMED, "--dry-run")
    assert done.returncode == 0
    assert not cloud.calls
    assert f"{arguments[0] if arguments[0] != 'attach' else 'follow'}" in done.stderr


JOBSET = ["run", "--name=plug", "--image=us-docker.pkg.dev/some-project/a/b:1"]
JOBSET += ["--accelerator=tpu-v5-lite-podslice", "--topology=4x4"]


@pytest.mark.parametrize(
    ("flag", "instead"),
    [
        ("--name", ""),
        ("--name", "--name="),
        ("--name", "--name=Plug"),
        ("--name", "--name=a;ls"),
        ("--project", ""),
        ("--project", "--project=Some Project"),
        ("--zone", ""),
        ("--zone", "--zone=us-west4"),
        ("--accelerator", ""),
        ("--accelerator", "--accelerator=v5e-8"),
        ("--accelerator", "--accelerator=v5litepod-"),
        ("--slices", "--slices=0"),
        ("--slices", "--slices=two"),
        ("--data", "--data=/data"),
        ("--runtime-version", "--runtime-version=a b"),
        ("--network", "--network=My Network"),
        ("--subnetwork", "--subnetwork="),
        ("--service-account", "--service-account=pplug"),
        ("--data-disk", "--data-disk=my-disk"),
        ("--data-disk", "--data-disk=source=my-disk,mode=fast"),
        ("--labels", "--labels=team"),
        ("--labels", "--labels=team=a,,user=b"),
        ("--gcloud-create", "--gcloud-create="),
        ("--gcloud-create=--scopes", "--gcloud-create=--scopes a"),
        ("--gcloud-ssh", "--gcloud-ssh=-v"),
        ("--gcloud-scp", "--gcloud-scp=compress"),
    ],
)
def test_bad_flags_are_refused(cloud: Cloud, flag: str, instead: str) -> None:
    flags = [each for each in RUN if not each.startswith(flag)]
    done = cloud.run(*flags, *filter(None, [instead]), "--", *ARGUMENTS)
    assert done.returncode == 2
    assert flag in done.stderr and "unknown" not in done.stderr
    assert not cloud.calls


@pytest.mark.parametrize("argument", ["--nmae=a", "plug", "--reserved=yes", "--gcloud-create"])
def test_unknown_arguments_are_refused(cloud: Cloud, argument: str) -> None:
    done = cloud.run(*RUN, argument, "--", *ARGUMENTS)
    assert done.returncode == 2
    assert f"unknown argument {argument} " in done.stderr
    assert not cloud.calls


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "run, attach, stop or delete"),
        (["rnu", *RUN[1:]], "rnu"),
        (RUN, "--config"),
        ([*RUN, "--", "--workdir=gs://b/w"], "--config"),
        ([*RUN, "--spot", "--", "--config=a", "--workdir=runs/a"], "--workdir=gs://"),
        ([*RUN, "--spot", "--", "--config=a"], "--workdir=gs://"),
        (["delete", *NAMED[1:]], "--name"),
        ([*RUN, "--spot", "--reserved", "--", *ARGUMENTS], "--spot and --reserved"),
        (["attach", *NAMED, *TUNNEL, "--gcloud-ssh=--internal-ip"], "and --internal-ip exclude"),
        (["attach", *NAMED, "--gcloud-scp=--internal-ip", *TUNNEL], "and --internal-ip exclude"),
    ],
)
def test_bad_commands_are_refused(cloud: Cloud, arguments: list[str], told: str) -> None:
    done = cloud.run(*arguments)
    assert done.returncode == 2
    assert told in done.stderr
    assert not cloud.calls


def test_a_workdir_on_the_machines_is_told_of(cloud: Cloud) -> None:
    done = cloud.run("run", "--dry-run", *RUN[1:], "--", "--config=a")
    assert done.returncode == 0
    assert "results lie on the machines" in done.stderr


def test_slices_that_the_job_does_not_know_of_are_told(cloud: Cloud) -> None:
    command = [*RUN, "--dry-run", "--slices=2", "--", *ARGUMENTS]
    assert "--config.mesh.slices=2" in cloud.run(*command).stderr
    done = cloud.run(*command, "--config.mesh.slices=2")
    assert "note" not in done.stderr


def test_uncommitted_changes_are_refused(cloud: Cloud) -> None:
    (cloud.repo / "requirements.txt").write_text("jax\nflax\n")
    done = cloud.run(*RUN, "--", *ARGUMENTS)
    assert done.returncode == 1
    assert "M requirements.txt" in done.stderr
    assert not cloud.calls


@pytest.mark.parametrize(
    ("flags", "workers"),
    [
        ([], ["plug/w0", "plug/w1"]),
        (["--queued"], ["plug/w0", "plug/w1"]),
        (["--spot"], ["plug/w0", "plug/w1"]),
        (["--slices=2"], ["plug-0/w0", "plug-0/w1", "plug-1/w0", "plug-1/w1"]),
    ],
)
def test_a_job(cloud: Cloud, flags: list[str], workers: list[str]) -> None:
    data = cloud.path / "bucket/bucket/all data"
    data.mkdir(parents=True)
    (data / "train.jsonl").touch()
    arguments = [*flags, "--data=gs://bucket/all data", "--", *ARGUMENTS]

    dry = cloud.run(*RUN, "--dry-run", *arguments)
    assert dry.returncode == 0
    assert not cloud.calls

    cloud.write(rules=[{"on": "create", "do": "states", "states": ["ACTIVE"]}])
    done = cloud.run(*RUN, *arguments, stdin="y")
    assert done.returncode == 0
    assert cloud.steps == [*WHOLE, "delete"]
    assert done.stdout == "began\nstep 1: loss 2\n  step 2:\n"
    # On every worker, with the data, and its arguments whole.
    assert sorted(cloud.started) == [[worker, [*ARGUMENTS]] for worker in workers]
    create = next(call for call in cloud.calls if "create" in call)
    assert ("--spot" in create) == (flags == ["--spot"])
    assert ("--node-count=2" in create) == (flags == ["--slices=2"])
    # What the dry run has printed is what was called.
    assert tpu_calls(printed(dry)) == tpu_calls(cloud.calls)


HOSTILE = """it's "b", c=$HOME `d` \\ * %h"""
# Flags that are passed on to gcloud: what becomes of them, and in which of its commands.
PASSED = [
    *(
        (flag, flag, "create")
        for flag in [
            "--reserved",
            "--internal-ips",
            "--network=projects/a/global/networks/b",
            "--subnetwork=my-subnetwork",
            "--service-account=a@b.c.com",
            "--data-disk=source=a/b,mode=read-only",
            "--data-disk=source=c",
            "--labels=a=b,c_d=",
        ]
    ),
    ("--gcloud-create=--tags=a,b", "--tags=a,b", "create"),
    (f"--gcloud-create=--metadata=a={HOSTILE}", f"--metadata=a={HOSTILE}", "create"),
    ("--tunnel-through-iap", "--tunnel-through-iap", "ssh scp"),
    ("--gcloud-ssh=--ssh-key-file=my key", "--ssh-key-file=my key", "ssh"),
    (f"--gcloud-ssh=--ssh-flag=-o{HOSTILE}", f"--ssh-flag=-o{HOSTILE}", "ssh"),
    ("--gcloud-scp=--ssh-key-file=a, b", "--ssh-key-file=a, b", "scp"),
    (f"--gcloud-scp=--scp-flag=-o{HOSTILE}", f"--scp-flag=-o{HOSTILE}", "scp"),
]
FLAGS = [flag for flag, _, _ in PASSED]


def check_passed(calls: list[list[str]], without: str = "") -> None:
    """That every call has the flags that concern it, and no others of them."""
    passed = [(become, verbs.split()) for flag, become, verbs in PASSED if flag != without]
    for call in calls:
        had = [word for word in call if word in [become for become, _ in passed]]
        assert had == [become for become, verbs in passed if verb_of(call) in verbs]


@pytest.mark.parametrize("kind", [[], ["--queued"], ["--slices=2"]])
def test_flags_are_passed_on(cloud: Cloud, kind: list[str]) -> None:
    for verb, steps in [
        ("run", WHOLE),
        ("attach", ["ssh follow", "ssh wait_for_end"]),
        ("stop", ["ssh stop", "ssh follow", "ssh wait_for_end"]),
        ("delete", ["delete"]),
    ]:
        command = [verb, *kind, *FLAGS, *RUN[1:]]
        dry = tpu_calls(printed(cloud.run(*command, "--dry-run", "--", *ARGUMENTS)))
        calls, before = len(cloud.calls), len(cloud.steps)
        done = cloud.run(*command, "--", *ARGUMENTS, stdin="y" if verb == "delete" else "")
        assert done.returncode == 0
        assert cloud.steps[before:] == steps
        called = tpu_calls(cloud.calls[calls:])
        check_passed(called)
        passed = [call for call in called if verb_of(call) in ("create", "ssh", "scp")]
        assert passed == [call for call in dry if verb_of(call) in ("create", "ssh", "scp")]
    assert not cloud.nodes


def test_flags_are_passed_on_after_preemption(cloud: Cloud) -> None:
    cloud.write(rules=[{"on": "worker.sh follow", "do": "preempt", "states": ["FAILED"]}])
    flags = [flag for flag in FLAGS if flag != "--reserved"]
    done = cloud.run("run", *flags, *SPOT[1:])
    assert done.returncode == 0
    assert cloud.steps == [*WHOLE[:-1], "delete", *WHOLE]
    check_passed(tpu_calls(cloud.calls), without="--reserved")


@pytest.mark.parametrize("kind", [[], ["--queued"]])
def test_what_is_left_is_reached_by_the_same_connection(cloud: Cloud, kind: list[str]) -> None:
    done = cloud.run("run", *kind, *FLAGS, *RUN[1:], "--", *ARGUMENTS)
    assert done.returncode == 0
    before = len(cloud.steps)
    cloud.run_told("To follow the job", done)
    cloud.run_told("To delete it", done, "y")
    assert cloud.steps[before:] == ["ssh follow", "ssh wait_for_end", "delete"]
    check_passed(tpu_calls(cloud.calls))


@pytest.mark.parametrize("script", ["tpu.sh", "jobset.sh"])
def test_every_flag_is_told_of_and_tested(cloud: Cloud, script: str) -> None:
    told = re.findall(r"^  (--[a-z-]+)", cloud.run("--help", script=script).stdout, re.MULTILINE)
    source = (LAUNCH / "common.sh").read_text() + (LAUNCH / script).read_text()
    cases = " | ".join(re.findall(r"^ +(--[a-z-][-a-z=*| ]*)\)", source, re.MULTILINE))
    accepted = {each.removesuffix("=*") for each in cases.split(" | ")}
    assert sorted(told) == sorted(accepted - {"--help"})
    tested = {each.partition("=")[0] for each in [*RUN, *FLAGS, *JOBSET, *KUBECTL, *PODS]}
    others = "--dry-run --yes --queued --spot --slices --runtime-version --data"
    assert set(told) <= tested.union(others.split())


def test_what_is_installed_and_left(cloud: Cloud) -> None:
    data = cloud.path / "bucket/bucket/data"
    data.mkdir(parents=True)
    (data / "train.jsonl").touch()
    done = cloud.run(*RUN, "--data=gs://bucket/data", "--", *ARGUMENTS)
    assert done.returncode == 0
    for worker in range(WORKERS):
        home = cloud.path / f"homes/plug/w{worker}"
        assert (home / "installed").read_text() == "requirements.txt jax[tpu] gcsfs\n"
        assert (home / "pplug/data/train.jsonl").exists()
    # Nobody has said that it may be deleted; how to do it is said.
    assert cloud.nodes
    assert re.search(r"charged for.*\n.*tpu.sh attach .*\n.*tpu.sh delete .*\n", done.stderr)


@pytest.mark.parametrize(
    ("accelerator", "image"),
    [
        ("v4-8", "tpu-ubuntu2204-base"),
        ("v5p-16", "v2-alpha-tpuv5"),
        ("v6e-8", "v2-alpha-tpuv6e"),
        ("v6e-8 --runtime-version=own", "own"),
    ],
)
def test_images(cloud: Cloud, accelerator: str, image: str) -> None:
    flags = f"--dry-run --accelerator={accelerator}".split()
    done = cloud.run(*RUN, *flags, "--", *ARGUMENTS)
    assert f" --version={image} " in done.stderr


@pytest.mark.parametrize("exits", [{"w0": 3}, {"w1": 3}, {"w0": 3, "w1": 3}])
def test_the_status_of_any_worker_is_returned(cloud: Cloud, exits: dict[str, int]) -> None:
    cloud.write(exits=exits)
    done = cloud.run(*RUN, "--", *ARGUMENTS)
    assert done.returncode == 3
    assert "the job ended with status 3" in done.stderr
    assert ":   step 2:" in done.stderr  # the end of its log
    assert cloud.nodes


def test_quota(cloud: Cloud) -> None:
    rules = [{"on": "create", "do": "fail", "text": "RESOURCE_EXHAUSTED: Quota limit 'TPUV5s'"}]
    cloud.write(rules=rules)
    done = cloud.run(*RUN, "--", *ARGUMENTS)
    assert done.returncode == 1
    assert "Quota limit" in done.stderr and "Nothing is left of plug" in done.stderr
    assert cloud.steps == ["create"]


def test_quota_of_a_queued_resource(cloud: Cloud) -> None:
    rules = [{"on": "create", "do": "states", "states": ["ACCEPTED", "PROVISIONING", "FAILED"]}]
    cloud.write(rules=rules)
    done = cloud.run(*RUN, "--spot", "--", *ARGUMENTS)
    assert done.returncode == 1
    assert "Quota TPUS exceeded" in done.stderr
    # It holds no machines, but would count against the quota.
    assert cloud.steps == ["create", "delete"]


def test_a_failed_creation_that_leaves_something(cloud: Cloud) -> None:
    cloud.write(rules=[{"on": "create", "do": "fail late"}])
    done = cloud.run(*RUN, "--", *ARGUMENTS)
    assert done.returncode == 1
    assert cloud.steps == ["create"]
    cloud.run_told("To delete it", done, "y")
    assert not cloud.nodes


def test_a_failed_installation(cloud: Cloud) -> None:
    cloud.write(rules=[{"on": "worker.sh install", "do": "fail", "times": 9}])
    done = cloud.run(*RUN, "--spot", "--", *ARGUMENTS)
    assert done.returncode == 1
    assert cloud.steps == ["create", "scp", *["ssh install"] * 3]
    assert "could not be started" in done.stderr
    assert "plug (state: ACTIVE) is left" in done.stderr and "tpu.sh delete" in done.stderr
    assert "attach" not in done.stderr


def test_broken_connections(cloud: Cloud) -> None:
    rules = [
        {"on": " scp ", "do": "fail", "status": 255},
        {"on": "worker.sh install", "do": "fail", "status": 255, "times": 2},
        {"on": "worker.sh follow", "do": "drop", "times": 2},
        {"on": "worker.sh wait", "do": "fail", "status": 255},
        {"on": " list ", "do": "fail", "after": 1},
        {"on": " list ", "do": "fail", "after": 2},
    ]
    cloud.write(rules=rules)
    done = cloud.run(*RUN, "--spot", "--", *ARGUMENTS)
    assert done.returncode == 0
    # Each line once, nothing started or created twice.
    assert done.stdout == "began\nstep 1: loss 2\n  step 2:\n"
    assert len(cloud.started) == WORKERS
    assert cloud.steps.count("create") == 1
    assert "the connection broke, the job goes on" in done.stderr


SPOT = [*RUN, "--spot", "--", *ARGUMENTS, "--endless"]


@pytest.mark.parametrize(
    "states",
    [["SUSPENDING", "SUSPENDING", "SUSPENDED"], ["FAILED"], ["ACTIVE"]],
    ids=lambda states: "-".join(states),
)
def test_spot_goes_on_after_preemption(cloud: Cloud, states: list[str]) -> None:
    cloud.write(rules=[{"on": "worker.sh follow", "do": "preempt", "states": states}])
    done = cloud.run(*SPOT)
    assert done.returncode == 0
    assert cloud.steps == [*WHOLE[:-1], "delete", *WHOLE]
    assert done.stdout == "began\nstep 1: loss 2\nresumed\nstep 1: loss 2\n  step 2:\n"
    assert [each for each in cloud.started if each[0] == "plug/w0"] == [
        ["plug/w0", [*ARGUMENTS, "--endless"]]
    ] * 2


def test_spot_goes_on_after_preemptions_of_one_slice(cloud: Cloud) -> None:
    preempt = {"on": "worker.sh follow", "do": "preempt", "states": ["ACTIVE"], "times": 2}
    cloud.write(rules=[preempt], exits={"w1": 4})
    done = cloud.run("run", "--slices=2", *SPOT[1:])
    assert done.returncode == 4
    assert cloud.steps == [*WHOLE[:-1], "delete", *WHOLE[:-1], "delete", *WHOLE]


def test_spot_asks_again_where_that_fails(cloud: Cloud) -> None:
    rules = [{"on": "worker.sh follow", "do": "preempt", "states": ["ACTIVE"]}]
    rules += [{"on": " delete ", "do": "fail"}, {"on": " create ", "do": "fail", "after": 1}]
    cloud.write(rules=rules)
    done = cloud.run(*SPOT)
    assert done.returncode == 0
    assert cloud.steps == [*WHOLE[:-1], "delete", "delete", "create", *WHOLE]


def test_spot_preempted_before_it_runs(cloud: Cloud) -> None:
    states = ["PROVISIONING", "SUSPENDING", "SUSPENDED"]
    cloud.write(rules=[{"on": "create", "do": "states", "states": states}])
    done = cloud.run(*RUN, "--spot", "--", *ARGUMENTS)
    assert done.returncode == 0
    assert cloud.steps == ["create", "delete", *WHOLE]


def test_spot_preempted_while_it_is_installed(cloud: Cloud) -> None:
    rules = [{"on": "worker.sh install", "do": "suspend"}]
    rules += [{"on": "worker.sh install", "do": "fail", "times": 2}]
    cloud.write(rules=rules)
    done = cloud.run(*RUN, "--spot", "--", *ARGUMENTS)
    assert done.returncode == 0
    assert cloud.steps == ["create", "scp", *["ssh install"] * 3, "delete", *WHOLE]


def test_spot_returns_the_status_of_a_job_that_fails_by_itself(cloud: Cloud) -> None:
    cloud.write(exits={"w0": 3})
    done = cloud.run(*RUN, "--spot", "--", *ARGUMENTS)
    assert done.returncode == 3
    assert cloud.steps == WHOLE


def test_spot_job_that_fails_before_the_preemption_shows(cloud: Cloud) -> None:
    # As a job does whose other host was taken away.
    cloud.write(
        exits={"w0": 1}, rules=[{"on": "queued-resources list", "after": 4, "do": "suspend"}]
    )
    done = cloud.run(*RUN, "--spot", "--", *ARGUMENTS)
    assert done.returncode == 1
    assert cloud.steps == [*WHOLE, "delete", *WHOLE]


@pytest.mark.parametrize("flags", [[], ["--queued"]])
def test_machines_that_are_not_spot_are_not_replaced(cloud: Cloud, flags: list[str]) -> None:
    rules = [{"on": "worker.sh follow", "do": "preempt", "states": ["ACTIVE"]}]
    cloud.write(rules=rules)
    done = cloud.run("run", *flags, *RUN[1:], "--", *ARGUMENTS, "--endless")
    assert done.returncode == 1
    assert cloud.steps == WHOLE[:-1]
    assert "plug has lost the job" in done.stderr and "tpu.sh delete" in done.stderr


def test_what_somebody_deleted_is_not_created_again(cloud: Cloud) -> None:
    cloud.write(rules=[{"on": "worker.sh follow", "do": "preempt", "states": []}])
    done = cloud.run(*SPOT)
    assert done.returncode == 1
    assert "plug was deleted" in done.stderr
    assert cloud.steps == WHOLE[:-1]


def test_a_request_that_somebody_deleted_is_not_made_again(cloud: Cloud) -> None:
    cloud.write(rules=[{"on": "create", "do": "states", "states": ["ACCEPTED", ""]}])
    done = cloud.run(*SPOT)
    assert done.returncode == 1
    assert "plug was deleted" in done.stderr
    assert cloud.steps == ["create"]


@pytest.mark.parametrize("flags", [[], ["--spot"]])
def test_a_machine_started_anew_does_not_know_the_job(cloud: Cloud, flags: list[str]) -> None:
    cloud.write(rules=[{"on": "worker.sh wait", "do": "lose"}])
    done = cloud.run(*RUN, *flags, "--", *ARGUMENTS)
    again = ["ssh follow", "ssh wait_for_end"] * 5
    if flags:
        assert done.returncode == 0
        assert cloud.steps == [*WHOLE[:-2], *again, "delete", *WHOLE]
    else:
        assert done.returncode == 1
        assert cloud.steps == [*WHOLE[:-2], *again]


@pytest.mark.parametrize("kind", [[], ["--queued"]])
@pytest.mark.parametrize("answer", ["n\n", "", "\n", "yes please\n", "y\n", "--yes"])
def test_delete_asks(cloud: Cloud, kind: list[str], answer: str) -> None:
    cloud.seed(queued=bool(kind))
    yes = ["--yes"] if answer == "--yes" else []
    done = cloud.run("delete", *NAMED, *kind, *yes, stdin=answer)
    if answer in ("y\n", "--yes"):
        assert done.returncode == 0
        assert not cloud.nodes
    else:
        assert done.returncode == 1
        assert cloud.nodes and "delete" not in cloud.steps
        assert "plug (state: " in done.stderr


def test_run_offers_to_delete(cloud: Cloud) -> None:
    cloud.write(exits={"w0": 3})
    done = cloud.run(*RUN, "--yes", "--", *ARGUMENTS)
    assert done.returncode == 3
    assert cloud.steps == [*WHOLE, "delete"]
    assert not cloud.nodes
    assert "is left" not in done.stderr


@pytest.mark.parametrize("verb", ["attach", "stop", "delete"])
def test_what_is_not_there(cloud: Cloud, verb: str) -> None:
    cloud.seed(queued=True)
    done = cloud.run(verb, *NAMED, "--yes")  # it is there, but as a queued resource
    assert done.returncode == 1
    assert "there is no plug in us-west4-a of some-project" in done.stderr
    assert not cloud.steps


def test_run_uses_what_is_there(cloud: Cloud) -> None:
    assert cloud.run(*RUN, "--", *ARGUMENTS).returncode == 0
    (cloud.path / "homes/plug/w0/pplug/runs").mkdir()
    (cloud.path / "homes/plug/w0/pplug/pplug_jax/old.py").touch()
    done = cloud.run(*RUN, "--", *ARGUMENTS, "--config.seed=1")
    assert done.returncode == 0
    assert cloud.steps == [*WHOLE, *WHOLE[1:]]
    assert done.stdout.startswith("resumed")
    # The commit's code and no other, and what an earlier job left.
    assert (cloud.path / "homes/plug/w0/pplug/runs").exists()
    assert not (cloud.path / "homes/plug/w0/pplug/pplug_jax/old.py").exists()


def test_a_killed_job_has_no_earlier_status(cloud: Cloud) -> None:
    assert cloud.run(*RUN, "--", *ARGUMENTS).returncode == 0
    cloud.write(rules=[{"on": "worker.sh follow", "do": "signal", "number": 9}])
    assert cloud.run(*RUN, "--", *ARGUMENTS, "--endless").returncode == 137


def test_interrupted_then_stopped_then_attached(cloud: Cloud) -> None:
    cloud.write(rules=[{"on": "worker.sh follow", "do": "interrupt"}])
    done = cloud.run(*SPOT)
    assert done.returncode == 130
    assert cloud.steps == WHOLE[:-1]
    assert "plug (state: ACTIVE) is left" in done.stderr
    for verb in ("attach", "delete"):
        flags = "--name=plug --project=some-project --zone=us-west4-a --queued"
        assert f"tpu.sh {verb} {flags}\n" in done.stderr

    other = cloud.run(*SPOT[:-1])
    assert other.returncode == 1
    assert "another job is running here" in other.stderr
    assert "could not be started" in other.stderr

    stopped = cloud.run("stop", *NAMED, "--queued")
    assert stopped.returncode == 143
    assert stopped.stdout == "began\nstep 1: loss 2\nwaiting\n"

    attached = cloud.run("attach", *NAMED, "--queued")
    assert attached.returncode == 143
    assert attached.stdout == stopped.stdout
    assert len(cloud.started) == WORKERS


def test_the_same_run_follows_a_running_job(cloud: Cloud) -> None:
    cloud.write(rules=[{"on": "worker.sh follow", "do": "interrupt"}])
    assert cloud.run(*SPOT).returncode == 130
    cloud.write(rules=[{"on": "worker.sh follow", "do": "signal", "number": 15}])
    done = cloud.run(*SPOT)
    assert done.returncode == 143
    assert done.stdout == "began\nstep 1: loss 2\nwaiting\n"
    assert len(cloud.started) == WORKERS
    assert cloud.steps.count("create") == 1


def expanded(value: str) -> str:
    """As Kubernetes reads an argument or a variable's value."""
    assert "$(" not in value.replace("$$", "")
    return value.replace("$$", "$")


def test_jobset(cloud: Cloud) -> None:
    arguments = [*ARGUMENTS, """--config.llm.separator=  it's "b" $HOME $(HOME) $$ `c` \\ & #: ,"""]
    cloud.write(states=["Pending", "Running", "", "Completed"])
    done = cloud.run(*JOBSET, "--slices=2", "--spot", "--", *arguments, script="jobset.sh")
    assert done.returncode == 0
    assert done.stdout == "step 1\n"
    first = "jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    assert cloud.calls[1][1:5] == [
        "get",
        "pods",
        f"--selector=jobset.sigs.k8s.io/jobset-name=plug,{first}",
        "--field-selector=status.phase=Running",
    ]
    manifest = yaml.safe_load((cloud.path / "manifest").read_text())
    assert manifest["kind"] == "JobSet"
    assert manifest["metadata"]["name"] == "plug"
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] > 0
    (slices,) = manifest["spec"]["replicatedJobs"]
    assert slices["replicas"] == 2
    hosts = slices["template"]["spec"]
    assert hosts["completions"] == hosts["parallelism"] == 4
    assert hosts["backoffLimit"] == 0
    pod = hosts["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    assert pod["terminationGracePeriodSeconds"] >= 60
    (container,) = pod["containers"]
    assert container["image"] == "us-docker.pkg.dev/some-project/a/b:1"
    assert list(map(expanded, container["args"])) == arguments
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert manifest["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "multislice-queue"
    assert pod["serviceAccountName"] == "default"  # as it is without
    assert not pod["priorityClassName"] and not pod["volumes"]
    assert not container["env"] and not container["envFrom"] and not container["volumeMounts"]

    dry = cloud.run(
        "run",
        "--dry-run",
        "--slices=2",
        "--spot",
        *JOBSET[1:],
        "--",
        *arguments,
        script="jobset.sh",
    )
    assert yaml.safe_load(dry.stdout) == manifest
    assert "kubectl create --filename=-" in dry.stderr
    assert len([call for call in cloud.calls if "create" in call]) == 1


KUBECTL = ["--namespace=my-team", "--context=a b", "--kubectl=--kubeconfig=it's $HOME"]
VALUE = f"{HOSTILE}\r\n\t$(A) $$ # :,"
PODS = ["--reservation=on", "--node-selector=a.b/c=1,d=true", "--node-selector=e="]
PODS += ["--queue=no", "--priority-class=high", "--service-account=null"]
PODS += ["--labels=team=yes,a.b/c=0x1", "--labels=d=", f"--env=A={VALUE}", "--env=b="]
PODS += ["--secret=hugging-face", "--secret=true", "--volume=data:/home/data:ro", "--volume=1:/b"]


def test_flags_of_jobset_are_passed_on(cloud: Cloud) -> None:
    command = [*JOBSET, *KUBECTL, *PODS, "--", *ARGUMENTS]
    dry = cloud.run(command[0], "--dry-run", *command[1:], script="jobset.sh")
    cloud.write(states=["Running", "Completed"])
    done = cloud.run(*command, script="jobset.sh")
    assert done.returncode == 0
    manifest = yaml.safe_load((cloud.path / "manifest").read_text())
    assert yaml.safe_load(dry.stdout) == manifest
    labels = {"xpk.google.com/workload": "plug", "team": "yes", "a.b/c": "0x1", "d": ""}
    queue = {"kueue.x-k8s.io/queue-name": "no"}
    assert manifest["metadata"]["labels"] == queue | labels
    (slices,) = manifest["spec"]["replicatedJobs"]
    template = slices["template"]["spec"]["template"]
    assert template["metadata"]["labels"] == labels
    pod = template["spec"]
    selector = {"a.b/c": "1", "d": "true", "e": "", "cloud.google.com/reservation-name": "on"}
    assert selector.items() <= pod["nodeSelector"].items()
    assert (pod["priorityClassName"], pod["serviceAccountName"]) == ("high", "null")
    (container,) = pod["containers"]
    variables = {each["name"]: expanded(each["value"]) for each in container["env"]}
    assert variables == {"A": VALUE, "b": ""}
    secrets = [each["secretRef"]["name"] for each in container["envFrom"]]
    assert secrets == ["hugging-face", "true"]
    assert [(each["name"], each["persistentVolumeClaim"]) for each in pod["volumes"]] == [
        ("data", {"claimName": "data", "readOnly": True}),
        ("1", {"claimName": "1", "readOnly": False}),
    ]
    assert container["volumeMounts"] == [
        {"name": "data", "mountPath": "/home/data", "readOnly": True},
        {"name": "1", "mountPath": "/b", "readOnly": False},
    ]

    # What is told then reaches the same cluster.
    cloud.write(states=["Completed"])
    cloud.run_told("To follow the job", done)
    cloud.run_told("To delete it", done, "y")
    flags = [*KUBECTL[:2], KUBECTL[2].removeprefix("--kubectl=")]
    assert all(call[1:4] == flags for call in cloud.calls)
    assert [call[4] for call in cloud.calls] == ["create", "get", "logs", *["get"] * 5, "delete"]
    commands = re.split(r"^\+ ", dry.stderr, flags=re.MULTILINE)[1:]
    assert [shlex.split(each)[1:4] for each in commands] == [flags] * 4


@pytest.mark.parametrize(
    ("topology", "hosts", "chips"),
    [("1x1", 1, 1), ("2x4", 2, 4), ("2x2x1", 1, 4), ("4x4x4", 16, 4)],
)
def test_jobset_topologies(cloud: Cloud, topology: str, hosts: int, chips: int) -> None:
    flags = ["--dry-run", f"--topology={topology}"]
    done = cloud.run(*JOBSET, *flags, "--", *ARGUMENTS[:2], script="jobset.sh")
    (slices,) = yaml.safe_load(done.stdout)["spec"]["replicatedJobs"]
    assert slices["template"]["spec"]["completions"] == hosts
    (container,) = slices["template"]["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    assert not cloud.calls


def test_jobset_that_fails(cloud: Cloud) -> None:
    rules = [{"on": "kubectl logs", "do": "fail"}, {"on": "get jobset", "do": "fail"}]
    cloud.write(states=["Running", "Running", "Failed"], rules=rules)
    done = cloud.run(*JOBSET, "--", *ARGUMENTS[:2], script="jobset.sh")
    assert done.returncode == 1
    assert [call[1:3] for call in cloud.calls].count(["get", "jobset"]) == 4
    assert "the connection broke, the job goes on" in done.stderr
    assert "jobset.sh delete --name=plug" in done.stderr


def test_jobset_that_cannot_be_created(cloud: Cloud) -> None:
    cloud.write(rules=[{"on": "kubectl create", "do": "fail", "text": "AlreadyExists"}])
    done = cloud.run(*JOBSET, "--", *ARGUMENTS[:2], script="jobset.sh")
    assert done.returncode == 1
    assert "AlreadyExists" in done.stderr
    assert len(cloud.calls) == 1


@pytest.mark.parametrize(
    ("flag", "instead"),
    [
        ("--name", ""),
        ("--image", ""),
        ("--image", "--image=A B"),
        ("--accelerator", "--accelerator=v5litepod-16"),
        ("--topology", ""),
        ("--topology", "--topology=16"),
        ("--slices", "--slices=x"),
        ("--workdir", "--"),
        ("--namespace", "--namespace=My_Team"),
        ("--context", "--context="),
        ("--kubectl", "--kubectl=-n=a"),
        ("--reservation", "--reservation=a/b"),
        ("--node-selector", "--node-selector=a"),
        ("--node-selector", "--node-selector=a=b c"),
        ("--queue", "--queue=a: b"),
        ("--priority-class", "--priority-class=High"),
        ("--service-account", "--service-account=a@b.c"),
        ("--labels", "--labels=a=b,c"),
        ("--labels", '--labels=a="b"'),
        ("--env", "--env=A"),
        ("--env", "--env=A-B=c"),
        ("--secret", "--secret=a=b"),
        ("--volume", "--volume=data"),
        ("--volume", "--volume=data:data"),
        ("--volume", "--volume=data:/data:rw"),
    ],
)
def test_bad_flags_of_jobset_are_refused(cloud: Cloud, flag: str, instead: str) -> None:
    flags = [each for each in JOBSET if not each.startswith(flag)]
    done = cloud.run(*flags, instead or "--dry-run", "--", "--config=a", script="jobset.sh")
    assert done.returncode == 2
    assert flag in done.stderr and "unknown" not in done.stderr
    assert not cloud.calls


def test_spot_and_a_reservation_exclude_each_other(cloud: Cloud) -> None:
    flags = ["--spot", "--reservation=a", "--", *ARGUMENTS]
    done = cloud.run(*JOBSET, *flags, script="jobset.sh")
    assert done.returncode == 2
    assert "--spot and --reservation exclude" in done.stderr
    assert not cloud.calls


@pytest.mark.parametrize("answer", ["n\n", "", "y\n"])
def test_delete_of_jobset_asks(cloud: Cloud, answer: str) -> None:
    done = cloud.run("delete", "--name=plug", script="jobset.sh", stdin=answer)
    deleted = [["kubectl", "delete", "jobset", "plug"]] if answer == "y\n" else []
    assert cloud.calls == deleted
    assert done.returncode == (0 if deleted else 1)


def test_the_servers_manifest() -> None:
    """It fits the schemas; its parts fit each other, the server's command line and its routes."""
    manifest = (LAUNCH / "serve.yaml").read_text()
    deployment, service = yaml.safe_load_all(manifest)
    for resource in (deployment, service):
        kubernetes_validate.validate(resource, kubernetes_validate.latest_version(), strict=True)
    assert (deployment["kind"], service["kind"]) == ("Deployment", "Service")
    pods = deployment["spec"]["template"]
    labels = pods["metadata"]["labels"]
    assert labels == deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"]
    (container,) = pods["spec"]["containers"]
    assert container["command"] == ["python", "-m", "pplug_jax.serve"]
    arguments = server_parser().parse_args(container["args"])
    assert arguments.store == "$(STORE)"  # which Kubernetes puts in, from a secret
    assert "valueFrom" in next(env for env in container["env"] if env["name"] == "STORE")
    assert "postgres" not in manifest.lower().replace("one postgresql", "")
    assert arguments.host == "0.0.0.0"
    (port,), (outer,) = container["ports"], service["spec"]["ports"]
    assert (port["containerPort"], port["name"]) == (arguments.port, outer["targetPort"])
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": port["name"]}
    resources = container["resources"]
    assert resources["requests"] == resources["limits"] == {"google.com/tpu": 1}


def test_the_image_has_what_its_commands_need(tmp_path: Path) -> None:
    """As far as can be seen without building it."""
    root, statements = LAUNCH.parent, {}
    for line in (LAUNCH / "Dockerfile").read_text().splitlines():
        name, _, rest = line.partition(" ")
        statements[name] = rest
        if name == "COPY":
            *sources, target = rest.split()
            for source in sources:
                copy = shutil.copytree if (root / source).is_dir() else shutil.copy
                copy(root / source, tmp_path / target)
        elif "pip install" in rest:
            needed = re.findall(r"--requirement=(\S+)", rest)
            for file in needed:  # each names others
                needed += re.findall(r"(?m)^-r (\S+)", (tmp_path / file).read_text())
            assert "requirements-serve.txt" in needed
    assert json.loads(statements["ENTRYPOINT"]) == ["python", "-m", "pplug_jax.main"]
    assert (tmp_path / "pplug_jax/main.py").is_file()
    command = [sys.executable, "-m", "pplug_jax.serve", "--help"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
