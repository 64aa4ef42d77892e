"""Allow one job at a time in a workdir.

On a disk the operating system keeps the lock, and releases it however the process ends. A bucket
knows no locks: there a job shows that it lives by writing its owner file again and again.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from pplug_jax.errors import InputError
from pplug_jax.runtime.console import say
from pplug_jax.runtime.distributed import from_primary
from pplug_jax.runtime.primary import is_primary
from pplug_jax.storage.files import is_remote, read_text, write_json
from pplug_jax.storage.workdir import LOCK, OWNER

BEAT = 20.0  # seconds between two signs of life in a bucket
PATIENCE = 60.0  # seconds without one after which a job in a bucket counts as dead
SETTLING = 2.0  # seconds in which two jobs that began at once see each other's file


class WorkdirInUse(InputError):
    """Another job works in the workdir; the message names its process and host."""

    def __init__(self, workdir: Path, owner: dict[str, Any]):
        process, host = owner.get("process", "unknown"), owner.get("host", "an unknown host")
        super().__init__(
            f"{workdir} is in use by process {process} on {host}, since "
            f"{owner.get('since', 'an unknown time')}; wait for it, stop it, or give another "
            "--workdir"
        )


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Keep `workdir` for this job; the first of several processes does so for all.

    Raises:
        WorkdirInUse: another job has it; on this job's other processes an InputError.
    """
    with contextlib.ExitStack() as stack:
        problem: InputError | None = None
        if is_primary():
            try:
                stack.enter_context(
                    _in_bucket(workdir) if is_remote(workdir) else _on_disk(workdir)
                )
            except InputError as error:
                problem = error
        if from_primary(np.int32(problem is not None)):
            raise problem or InputError("the first process could not have the workdir, see there")
        yield


def _this_job() -> dict[str, Any]:
    return {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "token": secrets.token_hex(8),  # two containers may have the same process id and host
    }


def _owner(workdir: Path) -> dict[str, Any]:
    """Return the owner file's content, or {} if there is none or it is being written."""
    try:
        return json.loads(read_text(workdir / OWNER))
    except (FileNotFoundError, ValueError):
        return {}


@contextlib.contextmanager
def _on_disk(workdir: Path) -> Iterator[None]:
    lock = FileLock(workdir / LOCK)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        write_json(workdir / OWNER, _this_job())
    except Timeout as error:
        raise WorkdirInUse(workdir, _owner(workdir)) from error
    except OSError as error:
        raise InputError(f"{workdir} cannot be written: {error}; name another --workdir") from error
    try:
        yield
    finally:
        (workdir / OWNER).unlink(missing_ok=True)
        if [path.name for path in workdir.iterdir()] == [LOCK]:  # refused before anything was done
            (workdir / LOCK).unlink()
            with contextlib.suppress(OSError):  # another has come
                workdir.rmdir()
        lock.release()


@contextlib.contextmanager
def _in_bucket(workdir: Path) -> Iterator[None]:
    if before := _owner(workdir):
        say(
            f"{workdir}: process {before['process']} on {before['host']} works here, or was killed;"
            f" looking for {PATIENCE:.0f} s whether it lives"
        )
        time.sleep(PATIENCE)
        if (now := _owner(workdir)) and now != before:
            raise WorkdirInUse(workdir, now)
    mine, ended = _this_job(), threading.Event()

    def live() -> None:
        beats = 0
        while not ended.wait(BEAT):
            beats += 1
            with contextlib.suppress(Exception):  # of any kind: the next sign may succeed
                write_json(workdir / OWNER, mine | {"beats": beats})

    write_json(workdir / OWNER, mine)
    time.sleep(SETTLING)
    if (now := _owner(workdir)).get("token") != mine["token"]:
        raise WorkdirInUse(workdir, now)
    living = threading.Thread(target=live, daemon=True)
    living.start()
    try:
        yield
    finally:
        ended.set()
        living.join()
        if _owner(workdir).get("token") == mine["token"]:  # else another took it for abandoned
            (workdir / OWNER).unlink(missing_ok=True)
