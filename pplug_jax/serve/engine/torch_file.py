"""A tensor in the form of `torch.save`, without PyTorch."""

import base64
import io
import struct
import zipfile

import numpy as np

# The names of PyTorch's storages, by the dtypes that LLMs have.
STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage"}


def torch_file(array: np.ndarray) -> bytes:
    """Return a file that `torch.load(weights_only=True)` reads as this array.

    It is a zip of the plain numbers and of a pickle, in which PyTorch names its functions.

    Args:
        array: of a dtype of `STORAGES`, which includes JAX's bfloat16.
    """
    file = io.BytesIO()
    parts = {
        "data.pkl": _pickled(array),
        "byteorder": b"little",
        "data/0": np.ascontiguousarray(array).tobytes(),
        "version": b"3\n",
    }
    with zipfile.ZipFile(file, "w") as zipped:
        for name, part in parts.items():  # undated: equal arrays have equal files
            zipped.writestr(zipfile.ZipInfo(f"archive/{name}"), part)
    return file.getvalue()


def prompt_embeds(rows: np.ndarray) -> str:
    """Return rows (L, D) as the text that vLLM takes as `prompt_embeds`."""
    return base64.b64encode(torch_file(rows)).decode()


def _pickled(array: np.ndarray) -> bytes:
    """Return `_rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())`, pickled.

    By hand, as `pickle` writes only names that can be imported.
    """
    strides = [int(np.prod(array.shape[i + 1 :])) for i in range(array.ndim)]
    storage = _tuple(
        _text("storage"),
        _name("torch", STORAGES[array.dtype.name]),
        _text("0"),
        _text("cpu"),
        _whole(array.size),
    )
    arguments = _tuple(
        storage + b"Q",  # a persistent id
        _whole(0),
        _tuple(*map(_whole, array.shape)),
        _tuple(*map(_whole, strides)),
        b"\x89",
        _name("collections", "OrderedDict") + b")R",
    )
    return b"\x80\x02" + _name("torch._utils", "_rebuild_tensor_v2") + arguments + b"R."


def _tuple(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def _name(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _whole(number: int) -> bytes:
    return b"J" + struct.pack("<i", number)
