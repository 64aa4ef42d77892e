"""The tensors of a checkpoint's files, each read in slices: safetensors, PyTorch's .bin, GGUF."""

import pickle
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from pplug_jax.errors import InputError
from pplug_jax.storage import gguf
from pplug_jax.storage.files import read_json

Index = tuple[slice, ...]


class Tensor(Protocol):
    def get_shape(self) -> Sequence[int]: ...

    def __getitem__(self, index: Index) -> np.ndarray: ...


class Stored(NamedTuple):
    """A tensor and the file that holds it."""

    file: Path
    tensor: Tensor


def weight_files(directory: Path) -> list[Path]:
    """Return the files that hold the directory's weights, chosen as `transformers` does.

    One file goes before several with an index, safetensors before .bin.

    Raises:
        FileNotFoundError: there is none, or one that the index names is missing.
    """
    if files := sorted(path for path in directory.glob("*") if gguf.is_gguf(path.name)):
        return files
    for name in ("model.safetensors", "pytorch_model.bin"):
        whole, index = directory / name, directory / f"{name}.index.json"
        if whole.is_file():
            return [whole]
        if index.is_file():
            files = [directory / part for part in sorted(set(_weight_map(index).values()))]
            if missing := [str(file) for file in files if not file.is_file()]:
                raise FileNotFoundError(f"{', '.join(missing)}: no such weight file")
            return files
    raise FileNotFoundError(f"{directory / 'model.safetensors'}: no such weight file")


def _weight_map(index: Path) -> dict[str, str]:
    content = read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise InputError(f"{index}: the field 'weight_map' must name a file for each tensor")
    return names


def read_tensors(directory: str | Path) -> dict[str, Stored]:
    """Return the directory's tensors by name; only .bin files are read now, others when asked for.

    Raises:
        FileNotFoundError: as in `weight_files`.
        InputError: a file is cut, or nothing here can read it.
    """
    directory = Path(directory)
    return {
        name: Stored(file, tensor)
        for file in weight_files(directory)
        for name, tensor in _reader_of(file)(file)
    }


def _reader_of(file: Path) -> Callable[[Path], Iterable[tuple[str, Tensor]]]:
    readers = {".safetensors": _safetensors, ".bin": _pickled, ".gguf": gguf.tensors}
    if file.suffix.lower() not in readers:
        raise InputError(f"{file}: weights are read from {', '.join(readers)} files only")
    return readers[file.suffix.lower()]


def _safetensors(file: Path) -> Iterable[tuple[str, Tensor]]:
    try:
        handle = safe_open(file, framework="np")
        return [(name, handle.get_slice(name)) for name in handle.keys()]  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(
            f"{file}: not a whole safetensors file ({error}); fetch it again"
        ) from error


class _TorchTensor:
    def __init__(self, tensor: Any):
        self.tensor = tensor

    def get_shape(self) -> Sequence[int]:
        return self.tensor.shape

    def __getitem__(self, index: Index) -> np.ndarray:
        part = self.tensor[index].contiguous()
        if str(part.dtype) == "torch.bfloat16":  # which NumPy lacks
            return part.view(_torch(None).int16).numpy().view(ml_dtypes.bfloat16)
        return part.numpy()


def _torch(file: Path | None) -> Any:
    try:
        import torch  # not among the requirements: only old checkpoints need it
    except ImportError as error:
        raise InputError(
            f"{file}: only PyTorch reads this file; `pip install torch` here, or write it anew "
            "where PyTorch is, with transformers' save_pretrained(DIR), and give DIR"
        ) from error
    return torch


def _pickled(file: Path) -> Iterable[tuple[str, Tensor]]:
    """Read a file by PyTorch, which refuses everything but tensors: a pickle may hold code."""
    torch = _torch(file)
    settings = {"map_location": "cpu", "weights_only": True}
    try:
        try:
            content = torch.load(file, mmap=True, **settings)
        except RuntimeError:  # files of before PyTorch 1.6 cannot be mapped
            content = torch.load(file, **settings)
    except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise InputError(
            f"{file}: PyTorch finds it cut, or holding more than tensors, which may be code; "
            "fetch it again from a source that you trust"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: a {type(content).__name__} and no tensors by name")
    return [(name, _TorchTensor(t)) for name, t in content.items() if torch.is_tensor(t)]


def are_equal(one: Tensor, other: Tensor, rows: int = 4096) -> bool:
    """Return whether two matrices hold the same values, reading `rows` at a time."""
    shape = tuple(one.get_shape())
    if shape != tuple(other.get_shape()):
        return False
    starts = range(0, shape[0], rows)
    pieces = (slice(start, min(start + rows, shape[0])) for start in starts)
    return all(np.array_equal(one[(piece,)], other[(piece,)]) for piece in pieces)
