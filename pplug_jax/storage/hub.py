"""Find a model's files: in a directory, a .gguf file, at a URL, or on the hub.

A URL is such as gs://bucket/dir or gs://bucket/dir/model.gguf. A hub id is org/name or, if a
repository holds several LLMs as .gguf files, org/name/file.gguf.
"""

import functools
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import fsspec
import huggingface_hub
from huggingface_hub.errors import DryRunError

from pplug_jax.errors import InputError
from pplug_jax.runtime.retry import retrying
from pplug_jax.storage import gguf
from pplug_jax.storage.files import whole

# What is read of a model: config, tokenizer, weights.
FILES = ("*.json", "*.model", "*.txt", "*.jinja")
WEIGHTS = (("*.safetensors",), ("pytorch_model*.bin",))  # the same in several formats; the best
HUB_ID = re.compile(r"([\w-][\w.-]*/[\w.-]+?)(?:/(.+\.(?i:gguf)))?")


def local_directory(path: str | Path) -> Path:
    """Return the model directory `path` on this machine; fetch it once if it is elsewhere.

    URLs are kept beside the hub's cache, under HF_HOME.

    Raises:
        InputError: nothing is there, or there is no room for it; the message says what to do.
    """
    name = str(path)
    if name and Path(name).is_dir():
        return Path(name)
    try:
        if Path(name).is_file() and gguf.is_gguf(name):
            return gguf.directory_of(Path(name))
        if "://" in name:
            return _from_url(name)
        if match := HUB_ID.fullmatch(name):
            return _from_hub(*match.groups())
    except OSError as error:
        raise InputError(
            f"{name} cannot be had: {error} (what is fetched or made of it goes to HF_HOME, "
            f"{huggingface_hub.constants.HF_HOME})"
        ) from error
    what = "file" if gguf.is_gguf(name) else "directory"
    raise InputError(
        f"there is no {what} {name!r}; give a model in Hugging Face format (config.json, "
        "*.safetensors, a tokenizer) as a directory, a URL (gs://bucket/dir) or a hub id "
        "(org/name), or a .gguf file"
    )


def chosen(names: Iterable[str]) -> list[str]:
    """Return which of a repository's files are read: weights once, in the format we prefer."""
    names = list(names)
    weights: Sequence[str] = ()
    for patterns in WEIGHTS:
        # Below the top lie other forms of the same: original/, onnx/, an adapter's.
        weights = weights or [n for n in names if "/" not in n and _matches(n, patterns)]
    return [*(name for name in names if _matches(name, FILES)), *weights]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def check_room(what: str, need: int, directory: Path) -> None:
    """Compare what is about to be fetched with the room left on the disk.

    Args:
        what: names it in messages.
        need: bytes.
        directory: where the bytes go; it need not exist yet.

    Raises:
        InputError: they do not fit.
    """
    disk = next(parent for parent in (directory, *directory.parents) if parent.is_dir())
    free = shutil.disk_usage(disk).free
    if need > free:
        raise InputError(
            f"{what} needs {need / 1e9:.1f} GB, but {disk} has {free / 1e9:.1f} GB left: name a "
            "directory on a larger disk in HF_HOME (on a TPU VM, add a disk when you create it)"
        )


def _from_hub(repository: str, file: str | None) -> Path:
    try:
        directory = retrying(f"fetching {repository}", lambda: _snapshot(repository, file))
    except InputError:
        raise
    except (OSError, ValueError) as error:  # the hub's errors are both kinds
        name = f"{repository}/{file}" if file else repository
        raise InputError(
            f"there is no {'file' if file else 'directory'} {name!r}, and the hub gave none: "
            f"{error} (where a licence must be accepted, do so on its page and `hf auth login`; "
            f"without network, `hf download {repository} --local-dir DIR` elsewhere and give DIR)"
        ) from error
    return gguf.directory_of(directory / file) if file else directory


def _snapshot(repository: str, file: str | None) -> Path:
    """Fetch the repository's files that are read, or the parts of one .gguf file."""
    fetch: Callable[..., Any] = functools.partial(huggingface_hub.snapshot_download, repository)
    try:
        files = {entry.filename: entry for entry in fetch(dry_run=True)}
    except DryRunError:  # no network, or no such model; what was fetched before will do
        return Path(fetch(allow_patterns=[file or "config.json"]))
    names = _parts(file, files) if file else chosen(files)
    if not names:
        raise InputError(f"{repository} has no {file or 'model files'}")
    need = sum(files[name].file_size or 0 for name in names if files[name].will_download)
    check_room(repository, need, Path(huggingface_hub.constants.HF_HUB_CACHE))
    return Path(fetch(allow_patterns=names))


def _parts(file: str, names: Iterable[str]) -> list[str]:
    """Return the names of a .gguf file and of the parts that continue it."""
    return [name for name in names if fnmatch(name, file.replace("-00001-of-", "-?????-of-"))]


def _from_url(url: str) -> Path:
    try:
        remote, root = fsspec.url_to_fs(url)
        files = retrying(f"listing {url}", lambda: _files_at(remote, root))
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"{url} cannot be read: {error}") from error
    if not files:
        raise InputError(f"{url}: there are no model files ({', '.join(FILES)}, weights)")
    # Another name for other contents: what was fetched is never stale.
    version = fsspec.utils.tokenize(url, [checksum for checksum, _ in files.values()])
    directory = Path(huggingface_hub.constants.HF_HOME) / "urls" / version
    wanted = {file: directory / name for name, file in _below(root, files).items()}
    lacking = {file: target for file, target in wanted.items() if not target.is_file()}
    check_room(url, sum(files[file][1] for file in lacking), directory)
    for file, target in lacking.items():
        with whole(target) as made:
            try:
                retrying(f"fetching {file}", functools.partial(remote.get_file, file, str(made)))
            except OSError as error:
                raise InputError(f"{url} cannot be read: {file}: {error}") from error
    single = gguf.is_gguf(root)
    return gguf.directory_of(directory / Path(root).name) if single else directory


def _below(root: str, files: Iterable[str]) -> dict[str, str]:
    """Return the files by their names below `root`, which may be a file itself."""
    top = Path(root).parent if gguf.is_gguf(root) else Path(root)
    return {Path(file).relative_to(top).as_posix(): file for file in files}


def _files_at(remote: fsspec.AbstractFileSystem, root: str) -> dict[str, tuple[Any, int]]:
    """Return the model's files, each with what changes with its content, and its bytes."""
    if gguf.is_gguf(root):
        files = _parts(root, remote.find(root.rpartition("/")[0], maxdepth=1))
    else:
        below = _below(root, remote.find(root))
        files = [below[name] for name in chosen(below)]
    return {file: (remote.checksum(file), remote.size(file) or 0) for file in files}
