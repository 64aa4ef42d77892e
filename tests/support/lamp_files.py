"""Writes the data files that the tests read."""

import json
from pathlib import Path
from typing import Any


def write_split(directory: Path, split: str, questions: Any, outputs: Any) -> Path:
    """Writes `split`'s two files: content as JSON, bytes as they are, None not at all."""
    directory.mkdir(exist_ok=True)
    for name, content in (("questions", questions), ("outputs", outputs)):
        if content is not None:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            (directory / f"{split}_{name}.json").write_bytes(data)
    return directory
