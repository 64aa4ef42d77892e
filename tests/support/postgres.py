"""A PostgreSQL on loopback, from the programs that are installed."""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa

ACCOUNT = "nobody"  # PostgreSQL refuses to run as root


def programs() -> Path | None:
    """Where `postgres` and `initdb` lie; Debian keeps them off the PATH."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    places = [Path(found).parent for found in [shutil.which("initdb")] if found] + debian[-1:]
    return next((place for place in places if (place / "postgres").exists()), None)


class Postgres:
    """A server of its own, which can be stopped and started again."""

    def __init__(self, bin: Path, directory: Path):
        self.bin, self.data = bin, directory / "data"
        self.as_whom: dict[str, Any] = {}
        if os.geteuid() == 0:
            shutil.chown(directory, ACCOUNT)
            self.as_whom = {"user": ACCOUNT, "extra_groups": []}
        self.process: subprocess.Popen | None = None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        initdb = [
            "initdb",
            "-D",
            self.data,
            "-A",
            "trust",
            "-U",
            "pplug",
            "--no-sync",
            "-E",
            "UTF8",
        ]
        self._program(subprocess.run, *initdb, check=True, stdout=subprocess.DEVNULL)

    def _program(self, how: Any, name: str, *arguments: Any, **settings: Any) -> Any:
        return how([self.bin / name, *arguments], cwd=self.data.parent, **self.as_whom, **settings)

    def url(self, database: str = "postgres") -> str:
        return f"postgresql+psycopg://pplug@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        settings = {"listen_addresses": "127.0.0.1", "port": self.port, "fsync": "off"}
        settings |= {"unix_socket_directories": "", "max_connections": "60"}
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        with open(self.data.parent / "log", "ab") as log:
            self.process = self._program(
                subprocess.Popen, "postgres", "-D", self.data, *options, stderr=log, stdout=log
            )
        for _ in range(200):
            with contextlib.suppress(sa.exc.OperationalError):
                self.execute("SELECT 1")
                return
            time.sleep(0.05)
        raise RuntimeError((self.data.parent / "log").read_text())

    def stop(self) -> None:
        if self.process:
            self.process.send_signal(2)  # ends connections, and writes what it holds
            self.process.wait(30)
            self.process = None

    def execute(self, statement: str, database: str = "postgres") -> None:
        engine = sa.create_engine(self.url(database), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.exec_driver_sql(statement)
        engine.dispose()


@contextlib.contextmanager
def running(bin: Path) -> Iterator[Postgres]:
    directory = Path(tempfile.mkdtemp(prefix="pplug-postgres-"))
    server = Postgres(bin, directory)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(directory)
