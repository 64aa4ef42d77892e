"""Processes that are forked from one that has imported what they all do, which takes seconds.

Each is else as `python -m MODULE` would start it: with an environment, a directory, signals and an
end of its own, and without PyTorch.
"""

import functools
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from tests.support.environment import AS_USERS, ROOT


class Start(NamedTuple):
    """What a process is started with."""

    arguments: tuple[str, ...]  # its module's name first
    cwd: Path
    env: dict[str, str]


class Fork:
    """A process, to use as a `subprocess.Popen` whose output is captured."""

    def __init__(self, *arguments: str, cwd: Path = ROOT, env: Mapping[str, str] = os.environ):
        self.returncode: int | None = None
        self._files = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115  kept open
        self._keeper, theirs = socket.socketpair()
        fds = [*(file.fileno() for file in self._files), theirs.fileno()]
        socket.send_fds(_origin(), [pickle.dumps(Start(arguments, cwd, dict(env)))], fds)
        theirs.close()
        self.pid = _received(self._keeper)

    def poll(self) -> int | None:
        if self.returncode is None:
            self._keeper.setblocking(False)
            try:
                self.returncode = _received(self._keeper)
            except BlockingIOError:
                pass
        return self.returncode

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Its stdout and stderr, when it has ended; they are told once."""
        if self.returncode is None:
            self._keeper.settimeout(timeout)
            self.returncode = _received(self._keeper)
        self._keeper.close()
        said = []
        for file in self._files:
            with file:
                file.seek(0)
                said.append(file.read())
        return said[0], said[1]

    def send_signal(self, sent: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, sent)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _received(keeper: socket.socket) -> int:
    told = keeper.recv(4)
    assert told, "who forks has ended"  # and 0 would be the number of a whole group of processes
    return int.from_bytes(told, signed=True)


def _tell(fork: socket.socket, number: int) -> None:
    fork.sendall(number.to_bytes(4, signed=True))


@functools.cache
def _origin() -> socket.socket:
    """Starts what forks, which ends with this process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", __name__, str(theirs.fileno())]
    env = os.environ | {"PYTHONPATH": AS_USERS}
    subprocess.Popen(command, cwd=ROOT, env=env, pass_fds=[theirs.fileno()])
    theirs.close()
    return ours


def _fork() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the threads of imported libraries wait for work
        return os.fork()


def main(starts: socket.socket) -> None:
    """Forks until there is nobody to do it for; returns in each fork."""
    import jax

    import pplug_jax.run  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the keepers
    while True:
        message, fds, _, _ = socket.recv_fds(starts, 1 << 20, 3)
        if not message:
            os._exit(0)
        if _fork() == 0:
            break
        for fd in fds:
            os.close(fd)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    starts.close()
    out, err, teller = fds
    # A keeper waits for the process, as only its parent can.
    with socket.socket(fileno=teller) as fork:
        if (pid := _fork()) != 0:
            _tell(fork, pid)
            _tell(fork, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            os._exit(0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.close(out)
    os.close(err)
    start: Start = pickle.loads(message)
    os.chdir(start.cwd)
    os.environ.clear()
    os.environ.update(start.env)
    jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR"))
    sys.argv = [*start.arguments]
    runpy.run_module(start.arguments[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as starts:
        main(starts)
