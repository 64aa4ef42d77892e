"""What `.ci/run` installs for the tests, on machines of several kinds."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.environment import ROOT

BASH = shutil.which("bash")


@pytest.mark.parametrize(
    ("user", "apt", "told"),
    [
        (0, 'echo "$@" >> "$0.calls"', "installed: "),
        (0, "exit 100", "not installed, so that tests skip: "),
        (1000, "exit 0", "not installed, so that tests skip: "),
        (0, None, "not installed, so that tests skip: "),
    ],
)
def test_debians_packages_are_installed_where_they_may(
    tmp_path: Path, user: int, apt: str | None, told: str
) -> None:
    programs = {"id": f"echo {user}", "timeout": 'shift; "$@"', "apt-get": apt}
    for name, lines in programs.items():
        if lines is not None:
            (tmp_path / name).write_text(f"#!{BASH}\n{lines}\n")
            (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        [BASH, ".ci/install_debian"],
        check=True,
        cwd=ROOT,
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith(told) and done.stdout.endswith("chromium\n")
    calls = tmp_path / "apt-get.calls"
    if calls.exists():
        update, install = calls.read_text().splitlines()
        assert update.endswith(" update")
        assert " install --yes " in install and install.endswith(" chromium")
    assert calls.exists() == told.startswith("installed")
