"""Where a model's files lie: a directory, a URL such as gs://bucket/dir, or a hub id."""

import re
import tempfile
from pathlib import Path

import fsspec
import huggingface_hub

from pplug_jax.errors import InputError

# What is read of a model: config, tokenizer, weights; not the same weights in other formats.
FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def local_directory(path: str | Path) -> Path:
    """The model directory `path` on this machine, fetched once where it is elsewhere.

    URLs are kept beside the hub's cache, under HF_HOME.

    Raises:
        InputError: nothing is there; the message says what to do.
    """
    name = str(path)
    if name and Path(name).is_dir():
        return Path(name)
    if "://" in name:
        return _from_url(name)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        return _from_hub(name)
    raise InputError(
        f"there is no directory {name!r}; give a model in Hugging Face format (config.json, "
        "*.safetensors, a tokenizer) as a directory, a URL (gs://bucket/dir) or a hub id (org/name)"
    )


def _from_hub(name: str) -> Path:
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=FILES))
    except (OSError, ValueError) as error:  # the hub's errors are both kinds
        raise InputError(
            f"there is no directory {name!r}, and the hub gave no model of that name: {error} "
            "(where a licence must be accepted, do so on its page and `hf auth login`; without "
            f"network, `hf download {name} --local-dir DIR` elsewhere and give DIR)"
        ) from error


def _from_url(url: str) -> Path:
    try:
        remote, root = fsspec.url_to_fs(url)
        found = [
            file
            for file in remote.find(root)
            if any(Path(file).match(pattern) for pattern in FILES)
        ]
        # Another name for other contents: what was fetched is never stale.
        version = fsspec.utils.tokenize(url, [remote.checksum(file) for file in found])
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"{url} cannot be read: {error}") from error
    if not found:
        raise InputError(f"{url}: there are no model files ({', '.join(FILES)})")
    directory = Path(huggingface_hub.constants.HF_HOME) / "urls" / version
    for file in found:
        target = directory / Path(file).relative_to(root)
        if target.is_file():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        # Whole or not at all, also if killed or if two processes fetch at once.
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            remote.get_file(file, f"{scratch}/file")
            Path(scratch, "file").rename(target)
    return directory
