"""Scalars to `metrics.jsonl` and TensorBoard events."""

import json
from collections import defaultdict
from pathlib import Path

from tensorboardX import SummaryWriter

from pplug_jax.files import write_text


class Writer:
    """Writes the scalars of `name` (a trained method) to files that all methods of a workdir share.

    A run that goes on from step `start` takes back what a killed one had written beyond it.
    """

    def __init__(self, workdir: str | Path, name: str, start: int):
        path = Path(workdir) / "metrics.jsonl"
        if path.is_file():
            lines = path.read_text().splitlines()
            write_text(path, [f"{line}\n" for line in lines if self._stays(line, name, start)])
        self.file = path.open("a")
        self.events = SummaryWriter(str(Path(workdir) / "tensorboard" / name), purge_step=start + 1)
        self.name = name

    @staticmethod
    def _stays(line: str, name: str, start: int) -> bool:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # the line that a killed process was writing
            return False
        return not record["name"].startswith(f"{name}/") or record["step"] <= start

    def write(self, step: int, **values: float) -> None:
        for key, value in values.items():
            self.file.write(
                json.dumps({"step": step, "name": f"{self.name}/{key}", "value": value}) + "\n"
            )
            self.events.add_scalar(key, value, step)
        self.file.flush()

    def close(self) -> None:
        self.file.close()
        self.events.close()


def read_scalars(path: Path, key: str) -> dict[str, dict[int, float]]:
    """{method: {step: value}} of a `metrics.jsonl`; of a step that was taken twice, the later."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for line in path.read_text().splitlines():
        record = json.loads(line)
        method, _, name = record["name"].rpartition("/")
        if name == key:
            found[method][record["step"]] = record["value"]
    return found
