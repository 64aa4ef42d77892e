"""Files that are written whole or not at all, and once however many processes run."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from etils.epath import PathLike

from pplug_jax.distributed import is_primary


def is_remote(path: PathLike) -> bool:
    """Whether it lies in a bucket (gs://..), where nothing can be appended to or mapped."""
    return "://" in str(path)


def write_text(path: Path, parts: Iterable[str]) -> None:
    """Writes the parts one after the other, in UTF-8."""
    if not is_primary():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(parts)
    partial.replace(path)


def write_json(path: Path, content: Any) -> None:
    write_text(path, [json.dumps(content, indent=1, ensure_ascii=False), "\n"])


def write_json_lines(path: Path, records: Iterable[Any]) -> None:
    write_text(path, (json.dumps(record, ensure_ascii=False) + "\n" for record in records))
