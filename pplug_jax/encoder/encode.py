"""A Hugging Face directory as an encoder of many texts."""

import functools
import hashlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from pplug_jax.encoder import bert
from pplug_jax.errors import InputError
from pplug_jax.nn.variables import Frozen
from pplug_jax.runtime.distributed import fetch
from pplug_jax.runtime.mesh import local_rows, make_mesh, parts, place_rows
from pplug_jax.storage import hf
from pplug_jax.storage.files import read_json, read_object
from pplug_jax.storage.tensors import read_tensors, weight_files

# The compiled text lengths: each a third or a half longer, so that little is padded.
LENGTHS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
# How sentence-transformers called the poolings before 5.4.
OLD_MODES = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
CPU_TOKENS = 2048  # of a batch on a CPU, whose caches shall hold a layer's attention scores


@functools.partial(jax.jit, static_argnames="dtype")
def _forward(model: bert.Bert, tokens: jax.Array, lengths: jax.Array, dtype: str) -> jax.Array:
    del dtype  # part of the cache key: the module's static attributes carry it
    return model(tokens, jnp.arange(tokens.shape[1]) < lengths[:, None])


class Usage(NamedTuple):
    """How to use an encoder, as its sentence-transformers directory says.

    Attributes:
        max_length: tokens that it reads of a text.
        query: the prompt in front of inputs.
        item: the prompt in front of texts that are searched.
        lower: whether it reads everything in small letters.
    """

    max_length: int
    query: str
    item: str
    lower: bool


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _modules(path: Path) -> dict[str, str]:
    """Return the kinds of a sentence-transformers directory's modules, and where each lies."""
    file = path / "modules.json"
    listed = read_json(file) if file.is_file() else []
    try:
        return {module["type"].rpartition(".")[2]: module["path"] for module in listed}
    except (TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{file}: expected a list of modules with `type` and `path`") from error


def transformer_directory(path: str | Path) -> Path:
    """Return where the encoder itself lies, in old directories in a folder as 0_Transformer."""
    return Path(path) / _modules(Path(path)).get("Transformer", "")


def read_usage(path: str | Path) -> Usage:
    """Return what the directory's files say; without any, the encoder reads all its positions.

    Raises:
        InputError: a file is not JSON.
    """
    path, inner = Path(path), transformer_directory(path)
    file = inner / "sentence_bert_config.json"
    module = _read_if_there(file)
    limit = module.get("max_seq_length")
    if limit is None:
        # sentence-transformers 5.4 and later leave it to the tokenizer, for which none is 10^30.
        file = inner / "tokenizer_config.json"
        limit = _read_if_there(file).get("model_max_length")
    if limit is not None and not (isinstance(limit, int | float) and limit >= 3):
        raise InputError(
            f"{file}: the longest text is {limit!r} tokens; it must be a number from 3"
        )
    about = _read_if_there(path / "config_sentence_transformers.json")
    prompts = {name: text or "" for name, text in (about.get("prompts") or {}).items()}
    default = prompts.get(about.get("default_prompt_name"), "")
    item = next((prompts[n] for n in ("document", "passage", "corpus") if n in prompts), default)
    return Usage(
        max_length=sys.maxsize if limit is None else int(limit),
        query=prompts.get("query", default),
        item=item,
        lower=bool(module.get("do_lower_case")),
    )


def read_pooling(path: str | Path) -> str:
    """Return `cls` or `mean`, from a sentence-transformers directory of any version.

    If it says nothing, `mean` for Contriever, and `cls` for others, as for BGE and in the paper.

    Raises:
        InputError: another pooling, or a module between it and the vector.
    """
    path, pooling = Path(path), "1_Pooling"
    instead = f"--config.encoder.pooling={'|'.join(bert.POOLINGS)} leaves that out"
    if types := _modules(path):
        if other := types.keys() - {"Transformer", "Pooling", "Normalize"}:
            raise InputError(
                f"{path}/modules.json: the module {min(other)} is not supported; {instead}"
            )
        pooling = types.get("Pooling", pooling)
    file = path / pooling / "config.json"
    if not file.is_file():
        config = hf.read_config(transformer_directory(path))
        return "mean" if "Contriever" in (config.get("architectures") or ()) else "cls"
    settings = read_object(file)
    modes = settings.get("pooling_mode")  # since sentence-transformers 5.4: one, or a list
    if modes is None:
        modes = [OLD_MODES.get(name, name) for name, on in settings.items() if on is True]
        modes = [mode for mode in modes if mode != "include_prompt"]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in bert.POOLINGS:
        raise InputError(
            f"{file}: pooling by {' and '.join(modes) or 'nothing'} is not supported, only by one "
            f"of {' and '.join(bert.POOLINGS)}; {instead}"
        )
    if modes == ["mean"] and not settings.get("include_prompt", True):
        raise InputError(
            f"{file}: include_prompt=false is not supported: the prompt's tokens are pooled too; "
            f"{instead}"
        )
    return modes[0]


def abstract_bert(
    path: str | Path, *, pooling: str | None, variable: type[nnx.Variable], dtype: str
) -> bert.Bert:
    """Return the directory's model without its weights.

    Args:
        path: the directory.
        pooling: `cls` or `mean`; None is what the directory says.
        variable: `nnx.Param` for trained weights, or `Frozen`.
        dtype: of the computation.
    """
    inner = transformer_directory(path)
    with hf.naming_missing_fields(inner):
        config = bert.config_from_hf(hf.read_config(inner))
    return bert.Bert(config, pooling or read_pooling(path), variable, dtype)


def load_bert(path: str | Path, mesh: Mesh, **settings: Any) -> bert.Bert:
    """Load the directory's model; `settings` are those of `abstract_bert`."""
    module = abstract_bert(path, **settings)
    files = read_tensors(transformer_directory(path))
    tensors = {_modern(name): stored for name, stored in files.items()}
    load = hf.weights_loader(
        module,
        path,
        tensors,
        bert.SOURCES,
        mesh,
        ignore=r"embeddings\.position_ids|pooler\.dense\.(weight|bias)",
        prefix=hf.common_prefix(tensors, "embeddings.word_embeddings.weight"),
    )
    return load()


def _modern(name: str) -> str:
    """Return the current name of a norm's tensor; checkpoints from TensorFlow have another."""
    for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
        name = name.removesuffix(old) + new if name.endswith(old) else name
    return name


class Encoder:
    """A frozen text encoder with its tokenizer.

    Args:
        path: a directory of a BERT-style encoder (config.json, model.safetensors, tokenizer).
        mesh: the mesh to work on; None is the first device.
        dtype: of weights and computation.
        pooling: `cls` or `mean`; None is what the directory says.
        max_length: tokens that are read of a text, at most as many as the directory says.
        query_prefix: the prompt in front of inputs, such as E5's "query: "; None is what the
            directory says.
        item_prefix: the prompt in front of texts that are searched, such as "passage: "; None is
            what the directory says.

    Attributes:
        size: E, the width of its vectors.
        cut_texts: how many texts so far reached `max_length`.
        fingerprint: differs between encoders whose vectors differ (weights, tokenizer, pooling,
            length, dtype, item prefix).

    Raises:
        FileNotFoundError: no such directory, config, weights or tokenizer.
        InputError: another architecture, an unsupported setting, or tensors that do not fit
            config.json.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        mesh: Mesh | None = None,
        dtype: str = "float32",
        pooling: str | None = None,
        max_length: int = 512,
        query_prefix: str | None = None,
        item_prefix: str | None = None,
    ):
        self.mesh = mesh or make_mesh(devices=jax.devices()[:1])
        self.model = load_bert(path, self.mesh, pooling=pooling, variable=Frozen, dtype=dtype)
        inner = transformer_directory(path)
        self.tokenizer = hf.load_tokenizer(inner, self.model.config.vocab_size)
        self.size = self.model.config.hidden_size
        usage = read_usage(path)
        self.max_length = min(
            max_length, usage.max_length, self.model.config.max_length, LENGTHS[-1]
        )
        self.query_prefix = usage.query if query_prefix is None else query_prefix
        self.item_prefix = usage.item if item_prefix is None else item_prefix
        self.lower = usage.lower
        self.cut_texts = 0
        settings = f"{self.model.pooling} {self.max_length} {dtype} {self.item_prefix}"
        digest = hashlib.sha256(settings.encode())
        settings_of = ("config.json", "tokenizer_config.json", "sentence_bert_config.json")
        names = (*settings_of, *hf.TOKENIZERS)
        for file in (*(inner / name for name in names), *weight_files(inner)):
            if file.is_file():
                with open(file, "rb") as handle:
                    digest.update(hashlib.file_digest(handle, "sha256").digest())
        self.fingerprint = digest.hexdigest()[:16]

    def queries(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenise texts as the input encoder reads them, behind the query prefix."""
        return self.tokenize([self.query_prefix + text for text in texts])

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return token ids with [CLS] and [SEP], cut to `max_length`.

        Special tokens in the texts are read as plain text.
        """
        if not texts:
            return []
        return self.tokenizer(
            [text.lower() for text in texts] if self.lower else list(texts),
            truncation=True,
            max_length=self.max_length,
            split_special_tokens=True,
            verbose=False,
        )["input_ids"]

    def encode(
        self,
        texts: Sequence[str],
        batch_size: int = 64,
        on_batch: Callable[[int], None] = lambda done: None,
        *,
        queries: bool = False,
        model: bert.Bert | None = None,
    ) -> np.ndarray:
        """Return the vectors of texts, (N, E) float32, L2-normalised.

        Texts are batched by length, so that little is padded. A CPU gets fewer long texts at a
        time.

        Args:
            texts: the texts, without prefix.
            batch_size: texts at a time.
            on_batch: called with the number of texts of each batch.
            queries: whether the texts are inputs; otherwise they are history texts.
            model: what encodes, if it is another than the frozen one: Enc_inp as a plug trained it.
        """
        model = model or self.model
        prefix = self.query_prefix if queries else self.item_prefix
        tokens = self.tokenize([prefix + text for text in texts])
        self.cut_texts += sum(len(ids) == self.max_length for ids in tokens)
        pieces = parts(self.mesh, "batch")
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        order = np.argsort([-len(ids) for ids in tokens], kind="stable")
        # A few texts need not fill a batch, but neither compile one for every number of them.
        batch_size = min(batch_size, 1 << max(0, len(tokens) - 1).bit_length())
        vectors = np.zeros((len(tokens), self.size), np.float32)
        while len(order):
            longest = len(tokens[order[0]])
            # No wider than the position table, whose size need not be one of LENGTHS.
            width = min(next(x for x in LENGTHS if x >= longest), self.model.config.max_length)
            size = min(batch_size, max(1, CPU_TOKENS // width)) if on_cpu else batch_size
            size = -(-size // pieces) * pieces
            rows, order = order[:size], order[size:]
            ids = np.zeros((size, width), np.int32)
            lengths = np.ones(size, np.int32)
            for i, row in enumerate(rows):
                ids[i, : len(tokens[row])] = tokens[row]
                lengths[i] = len(tokens[row])
            mine = local_rows(self.mesh, size)
            placed = (place_rows(x[mine], self.mesh) for x in (ids, lengths))
            with jax.set_mesh(self.mesh):
                made = _forward(model, *placed, model.dtype)
            vectors[rows] = fetch(made)[: len(rows)]
            on_batch(len(rows))
        return vectors


def load_encoder(path: str | Path, **settings: Any) -> Encoder:
    """Load a BERT-style encoder; `path` and the settings are those of `Encoder`."""
    return Encoder(path, **settings)
