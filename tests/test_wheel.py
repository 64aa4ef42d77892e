"""What is installed from a wheel works away from the repository."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.support.environment import ROOT, WITHOUT_TORCH

pytestmark = pytest.mark.slow

PARTS = ("pplug_jax", "LICENSE", "README.md", "pyproject.toml", "requirements.txt")
BUILD = "from setuptools import build_meta; build_meta.build_wheel('.')"
SMALL = (
    "--config=configs/lamp5.py",
    "--config.methods=('none','pplug')",
    "--config.data.sample_train_users=16",
    "--config.data.sample_eval_users=2",
    "--config.train.epochs=1.0",
    "--config.eval.max_new_tokens=2",
)
PPLUG = """
from importlib.metadata import entry_points
(script,) = entry_points(group="console_scripts", name="pplug")
script.load()()
"""
SERVE = """
from pathlib import Path
from pplug_jax import Personalizer
import pplug_jax
personalizer = Personalizer.from_checkpoint("runs/lamp5")
items = [{"title": "On rain", "abstract": "Rain is wet."}]
print(personalizer.soft_prompt("Rain falls.", items).shape[0], Path(pplug_jax.__file__).parent)
"""


@pytest.mark.parametrize("extra", ["dev", "ray", "serve"])
def test_an_extra_is_what_its_file_asks_for(extra: str) -> None:
    lines = (ROOT / f"requirements-{extra}.txt").read_text().splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [line.partition("#")[0].strip() for line in lines if line[:2] not in ("-r", "# ")]
    assert project["optional-dependencies"][extra] == needed


def test_a_wheel_trains_and_serves_a_plug(tmp_path: Path) -> None:
    source, elsewhere = tmp_path / "source", tmp_path / "elsewhere"
    source.mkdir()
    for part in PARTS:  # setuptools leaves its own files where it works
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, source / part)
    shutil.copytree(ROOT / "configs", elsewhere / "configs")

    path = os.pathsep.join([str(tmp_path / "site"), WITHOUT_TORCH])

    def python(*arguments: str, at: Path) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=at,
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    python("-c", BUILD, at=source)
    (wheel,) = source.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    assert (tmp_path / "site" / "pplug_jax" / "py.typed").is_file()
    # -P: as for a script, the working directory is not where modules are looked for.
    assert "pplug" in python("-P", "-c", PPLUG, *SMALL, at=elsewhere)
    k = 16  # configs/lamp5.py's, and the instruction's
    told = python("-c", SERVE, at=elsewhere).split()
    assert told[-2:] == [str(k + 1), str(tmp_path / "site" / "pplug_jax")]
