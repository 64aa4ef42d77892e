"""metrics.jsonl over restarts, and TensorBoard events."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from etils import epath

from pplug_jax.storage import scalars
from pplug_jax.storage.scalars import Writer


def write(workdir: Path, name: str, steps: list[int], start: int = 0) -> None:
    writer = Writer(workdir, name, start)
    for step in steps:
        writer.write(step, loss=step / 2, lr=0.1)
    writer.close()


def records(workdir: Path) -> list[dict[str, Any]]:
    text = (workdir / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def steps(workdir: Path, name: str) -> list[int]:
    return [record["step"] for record in records(workdir) if record["name"] == name]


def test_one_object_a_line(tmp_path: Path):
    write(tmp_path, "pplug", [1])
    assert records(tmp_path) == [
        {"step": 1, "name": "pplug/loss", "value": 0.5},
        {"step": 1, "name": "pplug/lr", "value": 0.1},
    ]


def test_every_line_is_on_disk_when_written(tmp_path: Path):
    writer = Writer(tmp_path, "pplug", 0)
    writer.write(1, loss=2.0)
    assert steps(tmp_path, "pplug/loss") == [1]
    writer.close()


def test_a_restart_takes_back_its_own_lines_beyond_the_start(tmp_path: Path):
    write(tmp_path, "pplug", [1, 2, 3, 4])
    write(tmp_path, "pplug_two", [1, 2, 3, 4])  # another method, though its name begins alike
    write(tmp_path, "pplug", [3, 4, 5], start=2)
    assert steps(tmp_path, "pplug/loss") == steps(tmp_path, "pplug/lr") == [1, 2, 3, 4, 5]
    assert steps(tmp_path, "pplug_two/loss") == [1, 2, 3, 4]


@pytest.mark.parametrize("cut", range(1, 42))
def test_a_line_cut_anywhere_harms_no_other(tmp_path: Path, cut: int):
    write(tmp_path, "pplug", [1, 2])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-cut])
    write(tmp_path, "pplug", [2], start=1)
    assert steps(tmp_path, "pplug/loss") == steps(tmp_path, "pplug/lr") == [1, 2]


def test_tensorboard_events_are_written_for_each_method(tmp_path: Path):
    write(tmp_path, "pplug", [1])
    write(tmp_path, "instruction_only", [1])
    for name in ("pplug", "instruction_only"):
        (events,) = (tmp_path / "tensorboard" / name).glob("events.out.tfevents.*")
        assert b"loss" in events.read_bytes()


def test_in_a_bucket_all_is_there_with_each_checkpoint(
    bucket: str, monkeypatch: pytest.MonkeyPatch
):
    events = Mock()
    monkeypatch.setattr(scalars, "SummaryWriter", events)
    workdir = epath.Path(bucket) / "run"
    write(workdir, "pplug", [1, 2])
    writer = Writer(workdir, "pplug", 1)  # it goes on from the checkpoint of step 1
    assert steps(workdir, "pplug/loss") == [1]
    writer.write(2, loss=7.0)
    assert steps(workdir, "pplug/loss") == [1]
    writer.flush()
    assert records(workdir)[-1] == {"step": 2, "name": "pplug/loss", "value": 7.0}
    writer.close()
    assert events.call_args.args == (f"{bucket}/run/tensorboard/pplug",)
