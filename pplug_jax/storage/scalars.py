"""Write scalars to `metrics.jsonl` and TensorBoard events."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from etils import epath
from tensorboardX import SummaryWriter

from pplug_jax.runtime.primary import is_primary
from pplug_jax.storage.files import is_remote, read_text, write_text
from pplug_jax.storage.workdir import EVENTS, METRICS


class Writer:
    """Write the scalars of a method to files that all methods of a workdir share.

    Only the first of several processes writes. In a bucket, metrics.jsonl appears anew at each
    `flush`. A run that continues from step `start` removes what a killed one had written beyond it.

    Args:
        workdir: the run's directory.
        name: the method.
        start: the step that the run continues from.
    """

    def __init__(self, workdir: epath.PathLike, name: str, start: int):
        self.name, self.active = name, is_primary()
        if not self.active:
            return
        directory = epath.Path(workdir)
        self.path = directory / METRICS
        lines = read_text(self.path).splitlines() if self.path.exists() else []
        self.lines = [f"{line}\n" for line in lines if self._stays(line, name, start)]
        write_text(self.path, self.lines)
        self.file = None if is_remote(directory) else self.path.open("a")
        self.events = SummaryWriter(str(directory / EVENTS / name), purge_step=start + 1)

    @staticmethod
    def _stays(line: str, name: str, start: int) -> bool:
        record = _parsed(line)
        if record is None:
            return False
        return not record["name"].startswith(f"{name}/") or record["step"] <= start

    def write(self, step: int, **values: float) -> None:
        if not self.active:
            return
        for key, value in values.items():
            record = {"step": step, "name": f"{self.name}/{key}", "value": value}
            self.lines.append(json.dumps(record) + "\n")
            if self.file:
                self.file.write(self.lines[-1])
            self.events.add_scalar(key, value, step)
        if self.file:
            self.file.flush()

    def flush(self) -> None:
        """Make sure that everything is written; call it when a checkpoint is saved."""
        if self.active and not self.file:
            write_text(self.path, self.lines)

    def close(self) -> None:
        self.flush()
        if self.active:
            if self.file:
                self.file.close()
            self.events.close()


def _parsed(line: str) -> dict[str, Any] | None:
    """Return the line's record, or None for a line that is being written or was left unfinished."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def read_scalars(path: Path, key: str) -> dict[str, dict[int, float]]:
    """Return {method: {step: value}} of a `metrics.jsonl`; a step's later value counts."""
    series: dict[str, dict[int, float]] = defaultdict(dict)
    for record in map(_parsed, read_text(path).splitlines()):
        if record is None:
            continue
        method, _, name = record["name"].rpartition("/")
        if name == key:
            series[method][record["step"]] = record["value"]
    return series
