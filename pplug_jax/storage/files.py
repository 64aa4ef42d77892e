"""Write files whole or not at all, and once however many processes run."""

import contextlib
import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from etils import epath
from etils.epath import PathLike

from pplug_jax.errors import InputError
from pplug_jax.runtime.primary import is_primary
from pplug_jax.runtime.retry import retrying


def is_remote(path: PathLike) -> bool:
    """Return whether the path is in a bucket (gs://..), where nothing can be appended or mapped."""
    return "://" in str(path)


def absolute(path: PathLike) -> epath.Path:
    """Return the path from the root, as Orbax wants it; epath would do so with gs:// too."""
    return epath.Path(path) if is_remote(path) else epath.Path(path).absolute()


def read_text(path: Path) -> str:
    """Return the file's text in UTF-8; try again what fails only for a moment."""
    return retrying(f"reading {path}", lambda: path.read_text(encoding="utf-8"))


def read_json(path: Path) -> Any:
    """Return the file's content.

    Raises:
        InputError: it is not JSON.
    """
    try:
        return json.loads(read_text(path).removeprefix("\ufeff"))  # editors add this mark
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from error


def read_object(path: Path) -> dict[str, Any]:
    """Return the content of a file that must hold a JSON object.

    Raises:
        InputError: it is not JSON, or another value.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected an object, found {type(content).__name__}")
    return content


@contextlib.contextmanager
def whole(target: Path) -> Iterator[Path]:
    """Yield where to write a file or a directory that becomes `target` as a whole or not at all.

    It stays whole if a process is killed, or if two do this at once.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{target.name}.", dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        yield made
        try:
            made.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was first
                raise


def write_text(path: Path, parts: Iterable[str]) -> None:
    """Write the parts one after the other, in UTF-8.

    What fails only for a moment is tried again, unless `parts` is an iterator.
    """
    if not is_primary():
        return

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(parts)
        partial.replace(path)

    write() if isinstance(parts, Iterator) else retrying(f"writing {path}", write)


def write_json(path: Path, content: Any) -> None:
    write_text(path, [json.dumps(content, indent=1, ensure_ascii=False), "\n"])


def write_json_lines(path: Path, records: Iterable[Any]) -> None:
    write_text(path, (json.dumps(record, ensure_ascii=False) + "\n" for record in records))
