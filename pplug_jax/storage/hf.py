"""Directories in Hugging Face format: config, tokenizer, and weights read into their shards."""

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from flax import nnx
from jax.sharding import Mesh
from safetensors.numpy import save_file

from pplug_jax.errors import InputError
from pplug_jax.runtime.mesh import shardings
from pplug_jax.storage.files import read_object
from pplug_jax.storage.tensors import Index, Stored

# Of which a directory holds one or more.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.txt")
# Of a stack of layers, so many bytes are read at a time.
PIECE_BYTES = 2**26

Module = TypeVar("Module", bound=nnx.Module)


class Source(NamedTuple):
    """The place of one of our variables in a checkpoint.

    Attributes:
        name: the tensor's name; a `{}` stands for the layer, and layers are stacked on a new axis
            0.
        transpose: whether to swap the axes: PyTorch's Linear stores (out, in), ours are (in, out).
    """

    name: str
    transpose: bool = False


def read_config(directory: str | Path) -> dict[str, Any]:
    """Return the directory's config.json, or raise an error that says what a model directory holds.

    Raises:
        FileNotFoundError: there is no directory or no config.json.
        InputError: it is not JSON.
    """
    directory = Path(directory)
    path = directory / "config.json"
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{directory}: no such directory (a model in Hugging Face format is expected there)"
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; "
            "a model directory holds config.json, *.safetensors and a tokenizer"
        )
    return read_object(path)


@contextlib.contextmanager
def naming_missing_fields(directory: str | Path) -> Iterator[None]:
    """Name the field that config.json lacks, if the code inside asks for one.

    Raises:
        InputError: instead of a KeyError.
    """
    try:
        yield
    except KeyError as error:
        raise InputError(f"{directory}/config.json: the field {error} is missing") from error


def load_tokenizer(directory: str | Path, vocab_size: int) -> transformers.PreTrainedTokenizerBase:
    """Load the directory's tokenizer.

    Args:
        directory: the model's directory.
        vocab_size: rows of the embedding table.

    Raises:
        FileNotFoundError: there is none.
        InputError: its files cannot be read, it loses the blanks between words, or a text can give
            an id beyond the embedding table.
    """
    if not any((Path(directory) / name).is_file() for name in TOKENIZERS):
        raise FileNotFoundError(
            f"{directory}: no tokenizer, which is one of {', '.join(TOKENIZERS)}"
        )
    tokenizer = _with_blanks(directory)
    # Tokens of the template's own text are looked at where there is a template, in `prompts`.
    added = tokenizer.added_tokens_decoder
    framing = [tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.unk_token_id]
    for token, id in tokenizer.get_vocab().items():
        never = id in added and added[id].special and id not in framing
        if id >= vocab_size and not never:
            raise InputError(
                f"{directory}: the tokenizer can give the token {token!r} with id {id}, but the "
                f"embedding table has {vocab_size} rows: they do not belong together"
            )
    return tokenizer


def _with_blanks(directory: str | Path) -> transformers.PreTrainedTokenizerBase:
    """Load the tokenizer by the class that its files name, or by tokenizer.json alone.

    Some files name Llama's class and are of another kind; transformers 5 then drops all blanks.
    """
    kinds: list[Any] = [transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast]
    failure: Exception | None = None
    for kind in kinds[: 1 + (Path(directory) / "tokenizer.json").is_file()]:
        # Each kind of tokenizer has its own errors, down to the bare ones of its Rust code.
        try:
            tokenizer = kind.from_pretrained(directory)
            ids = tokenizer.encode("two words", add_special_tokens=False)
            if " " in tokenizer.decode(ids).strip():
                return tokenizer
        except Exception as error:  # noqa: BLE001
            failure = failure or error
    if failure is None:
        raise InputError(
            f"{directory}: the tokenizer loses the blanks between words; is it whole, and of this "
            "LLM?"
        )
    problem = str(failure).strip().partition("\n")[0] or type(failure).__name__
    pieces = next(Path(directory).glob("*.model"), None)
    if pieces and not (Path(directory) / "tokenizer.json").is_file():
        if not find_spec("sentencepiece"):
            raise InputError(
                f"{pieces}: `pip install sentencepiece` reads this file, or write a tokenizer.json "
                "where it is, with transformers' save_pretrained"
            ) from failure
        problem = (
            f"{pieces.name} is not a whole SentencePiece file, or of another kind; fetch it again"
        )
    if "BOM" in problem:
        problem = "a file begins with a byte order mark; save it as UTF-8 without one"
    raise InputError(f"{directory}: the tokenizer cannot be read: {problem}") from failure


def weights_loader(
    module: Module,
    directory: str | Path,
    stored: Mapping[str, Stored],
    sources: Mapping[str, Source],
    mesh: Mesh,
    *,
    ignore: str = "",
    prefix: str = "",
    store: Callable[[jax.Array], Any] = lambda array: array,
) -> Callable[[], Module]:
    """Check the checkpoint's tensors now, and return a function that fills `module` with them.

    Each device reads only its slice.

    Args:
        module: its variables hold `jax.ShapeDtypeStruct`. The checkpoint must have their shapes (or
            their `stored_shape`, to which zeros are appended), and is cast to their dtypes.
        directory: where the tensors are from, for messages.
        stored: `tensors.read_tensors` of it.
        sources: variable path, joined with dots -> its tensor.
        mesh: the mesh to lay the weights out on.
        ignore: pattern of further tensor names that the checkpoint may have.
        prefix: the beginning of this module's tensor names; tensors without it are another
            module's.
        store: makes what a variable holds from its array, or from some layers of its stack.

    Raises:
        InputError: a missing, unexpected or misshapen tensor, or a truncated file; the message
            names it.
    """
    tensors = {
        name.removeprefix(prefix): tensor
        for name, tensor in stored.items()
        if name.startswith(prefix)
    }
    graph, state = nnx.split(module)
    variables, places = nnx.to_flat_state(state), nnx.to_flat_state(shardings(module, mesh))
    fillings = [
        _Filling(variable, sources[".".join(map(str, path))], place.get_value(), store)
        for (path, variable), (_, place) in zip(variables, places, strict=True)
    ]
    for filling in fillings:
        filling.find(tensors, directory)
    wanted = {name for filling in fillings for name in filling.names}
    unexpected = sorted(
        name for name in tensors if name not in wanted and not re.fullmatch(ignore, name)
    )
    if unexpected:
        raise InputError(
            f"{directory}: the checkpoint has tensors that this architecture does not: "
            f"{', '.join(unexpected[:5])}"
        )

    def load() -> Module:
        flat = [
            (path, variable.replace(filling()))
            for (path, variable), filling in zip(variables, fillings, strict=True)
        ]
        return nnx.merge(graph, nnx.from_flat_state(flat))

    return load


class _Filling:
    """What fills a variable: its tensors, and how its array is made of them.

    Args:
        variable: holds a `jax.ShapeDtypeStruct`.
        source: its tensors' names.
        where: the place of its array on the mesh; axis 0 of a stack is never split.
        store: as in `weights_loader`.
    """

    def __init__(
        self,
        variable: nnx.Variable,
        source: Source,
        where: jax.sharding.Sharding,
        store: Callable[[jax.Array], Any],
    ):
        self.abstract: jax.ShapeDtypeStruct = variable.get_value()
        self.stored_shape = variable.get_metadata("stored_shape", self.abstract.shape)
        self.stacked = "{}" in source.name
        layers = self.abstract.shape[0] if self.stacked else 1
        self.names = [source.name.format(i) for i in range(layers)]
        self.transpose, self.where, self.store = source.transpose, where, store

    def find(self, tensors: Mapping[str, Stored], directory: str | Path) -> None:
        """Find the tensors among a checkpoint's, and check their shapes."""
        if missing := [name for name in self.names if name not in tensors]:
            raise InputError(
                f"{directory}: the checkpoint lacks the tensor {missing[0]} "
                f"({len(missing)} of its kind)"
            )
        self.tensors = {name: tensors[name].tensor for name in self.names}
        wanted = self.stored_shape[1:] if self.stacked else self.stored_shape
        wanted = wanted[::-1] if self.transpose else wanted
        for name, tensor in self.tensors.items():
            shape = tuple(tensor.get_shape())
            if shape != wanted:
                raise InputError(
                    f"{tensors[name].file}: the tensor {name} has shape {shape}, "
                    f"config.json asks for {wanted}"
                )

    def __call__(self) -> Any:
        """Make what the variable holds; of a stack some layers at a time are on the host."""
        if not self.stacked:
            return self._made(self.abstract.shape, self._padded)
        layer_bytes = self.abstract.dtype.itemsize * math.prod(self.abstract.shape[1:])
        at_once = max(1, PIECE_BYTES // layer_bytes)
        if at_once >= len(self.names):
            return self._stack(self.names)
        stack = None
        for start in range(0, len(self.names), at_once):
            piece = self._stack(self.names[start : start + at_once])
            if stack is None:
                stack = jax.tree.map(functools.partial(_zeros, len(self.names)), piece)
            stack = jax.tree.map(functools.partial(_put, start=start), stack, piece)
            jax.block_until_ready(stack)  # or the host would read ahead of the devices
        return stack

    def _made(self, shape: tuple[int, ...], read: Callable[[Any], np.ndarray]) -> Any:
        return self.store(jax.make_array_from_callback(shape, self.where, read))

    def _stack(self, names: Sequence[str]) -> Any:
        """Stack tensors on a new axis 0."""
        return self._made(
            (len(names), *self.abstract.shape[1:]),
            lambda index: np.stack([self._read(name, index[1:]) for name in names]),
        )

    def _padded(self, index: Index) -> np.ndarray:
        """Read a part of the only tensor: the rows that are stored, then zeros."""
        (name,) = self.names
        if self.stored_shape == self.abstract.shape:
            return self._read(name, index)
        rows = self.stored_shape[0]
        start, stop, _ = index[0].indices(self.abstract.shape[0])
        # A row at least is read, since safetensors refuses a slice of none.
        inside = slice(min(start, rows - 1), min(stop, rows))
        part = self._read(name, (inside, *index[1:]))[: max(rows - start, 0)]
        return np.pad(part, [(0, stop - start - len(part)), *[(0, 0)] * (part.ndim - 1)])

    def _read(self, name: str, index: Index) -> np.ndarray:
        """Read a part of a tensor as ours lies and in its dtype."""
        tensor = self.tensors[name]
        array = tensor[index[::-1]].T if self.transpose else tensor[index]
        return array.astype(self.abstract.dtype, copy=False)


def _zeros(layers: int, like: jax.Array) -> jax.Array:
    return jnp.zeros((layers, *like.shape[1:]), like.dtype, device=like.sharding)


@functools.partial(jax.jit, donate_argnames="stack")
def _put(stack: jax.Array, piece: jax.Array, start: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(stack, piece, start, axis=0)


def save_weights(
    module: nnx.Module, directory: str | Path, sources: Mapping[str, Source], dtype: Any
) -> None:
    """Write `module` as `model.safetensors`, for `weights_loader` to read."""
    tensors = {}
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        source = sources[".".join(map(str, path))]
        array = np.asarray(variable.get_value()).astype(dtype)
        array = array[tuple(map(slice, variable.get_metadata("stored_shape", array.shape)))]
        for i, part in enumerate(array if "{}" in source.name else [array]):
            tensors[source.name.format(i)] = np.ascontiguousarray(
                part.T if source.transpose else part
            )
    save_file(tensors, Path(directory) / "model.safetensors", metadata={"format": "pt"})


def common_prefix(tensors: Iterable[str], name: str) -> str:
    """Return what stands before `name` in a checkpoint (`bert.` if it was saved with a head)."""
    return next((tensor.removesuffix(name) for tensor in tensors if tensor.endswith(name)), "")
