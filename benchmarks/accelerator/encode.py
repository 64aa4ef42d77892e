"""Part 3: encoding histories, against sentence-transformers.

MiniLM with its weights, and BGE base's shape with random ones and MiniLM's tokenizer. Both read the
same made-up texts as long as LaMP-5's items, in bfloat16 and in batches of as many rows; tokenising
is part of it. Without sentence-transformers the peer is the same thing in plain transformers.
"""

import functools
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

from benchmarks.accelerator.bring import ENCODER
from benchmarks.accelerator.record import Record
from benchmarks.accelerator.shapes import DEVICE, free
from benchmarks.timing import medians
from pplug_jax.encoder import load_encoder
from pplug_jax.encoder.encode import read_pooling
from pplug_jax.llm.shapes import PUBLISHED
from pplug_jax.session.models import ASSETS

Encode = Callable[[Sequence[str]], np.ndarray]
MAX_LENGTH, BATCH = 256, 256
WARM = 2048  # texts of the first, untimed call: enough to meet all lengths


class Case(NamedTuple):
    """tokenizer: the directory of an encoder, whose weights are read too where shape is None."""

    name: str
    tokenizer: Path
    shape: transformers.BertConfig | None
    texts: int
    repeats: int
    needs: float


REAL = (
    Case("MiniLM", ENCODER, None, 100_000, 1, 15),
    Case("BGE base", ENCODER, PUBLISHED["BAAI/bge-base-en-v1.5"], 100_000, 1, 40),
)
SMALL = transformers.BertConfig(
    vocab_size=1536,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=MAX_LENGTH,
)
TINY = (
    Case("tiny", ASSETS / "tiny_bert", None, 24, 1, 0),
    Case("tiny shape", ASSETS / "tiny_bert", SMALL, 24, 1, 0),
)


def draw_texts(directory: Path, count: int) -> list[str]:
    """Random words of the tokenizer's, as many as titles with abstracts have."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    words = np.array(sorted(word for word in tokenizer.get_vocab() if word.isalpha()))
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.gamma(6, 27, count), 8, 400).astype(int)
    return [" ".join(words[rng.integers(0, len(words), length)]) for length in lengths]


def write_shape(case: Case, directory: Path) -> Path:
    """An encoder's directory with random weights of the case's shape."""
    made = directory / "encoder"
    shutil.copytree(case.tokenizer, made, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = transformers.BertModel(case.shape, add_pooling_layer=False)
    tensors = {name: x.contiguous() for name, x in model.state_dict().items()}
    save_file(tensors, made / "model.safetensors")
    case.shape.save_pretrained(made)
    pooling = made / "1_Pooling/config.json"
    settings = json.loads(pooling.read_text())
    settings["word_embedding_dimension"] = case.shape.hidden_size
    pooling.write_text(json.dumps(settings))
    return made


def longest(directory: Path) -> int:
    """Tokens that are read of a text: ours takes no more than there are positions."""
    config = json.loads((directory / "config.json").read_text())
    return min(MAX_LENGTH, config["max_position_embeddings"])


def sentence_transformer(directory: Path) -> Encode:
    from sentence_transformers import SentenceTransformer

    settings = {"dtype": torch.bfloat16}
    model = SentenceTransformer(str(directory), device=DEVICE, model_kwargs=settings)
    model.max_seq_length = longest(directory)
    return functools.partial(
        model.encode, batch_size=BATCH, normalize_embeddings=True, show_progress_bar=False
    )


def plain_transformers(directory: Path) -> Encode:
    """What it does: batches of like lengths, each padded to its longest."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.BertModel.from_pretrained(
        directory, dtype=torch.bfloat16, add_pooling_layer=False
    ).to(DEVICE)
    pooling = read_pooling(directory)

    @torch.inference_mode()
    def encode(texts: Sequence[str]) -> np.ndarray:
        order = np.argsort([-len(text) for text in texts], kind="stable")
        vectors = np.zeros((len(texts), model.config.hidden_size), np.float32)
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            inputs = tokenizer(
                [texts[row] for row in rows],
                padding=True,
                truncation=True,
                max_length=longest(directory),
                return_tensors="pt",
            ).to(DEVICE)
            hidden = model(**inputs).last_hidden_state
            if pooling == "cls":
                found = hidden[:, 0].float()
            else:
                there = inputs["attention_mask"][..., None]
                found = (hidden * there).sum(dim=1).float() / there.sum(dim=1)
            vectors[rows] = torch.nn.functional.normalize(found, dim=-1).cpu().numpy()
        return vectors

    return encode


def ours(directory: Path) -> Encode:
    encoder = load_encoder(directory, dtype="bfloat16", max_length=MAX_LENGTH)
    return functools.partial(encoder.encode, batch_size=BATCH)


def measure(record: Record, case: Case, directory: Path) -> None:
    theirs = "sentence-transformers"
    load = {"ours": ours, theirs: sentence_transformer}
    if importlib.util.find_spec("sentence_transformers") is None:
        load = {"ours": ours, "plain transformers": plain_transformers}
    texts = draw_texts(case.tokenizer, case.texts)
    sample, vectors = texts[:: max(1, len(texts) // WARM)], {}
    for peer, make in load.items():

        def timed(peer: str = peer, make: Callable[[Path], Encode] = make) -> None:
            record.note(f"{case.name}: {peer}", peer=peer, texts=len(texts), batch=BATCH)
            encode = make(directory)
            first = medians({peer: lambda: vectors.update({peer: encode(sample)})}, 1)[peer]
            record.note(f"{case.name}: {peer}", first_seconds=first)
            seconds = medians({peer: lambda: encode(texts)}, case.repeats)[peer]
            cosine = float((vectors[peer] * vectors["ours"]).sum(axis=1).min())
            record.note(f"{case.name}: {peer}", seconds=seconds, smallest_cosine=cosine)

        record.attempt(f"{case.name}: {peer}", timed, case.needs)
        free()


def run(record: Record, rehearse: bool) -> None:
    for case in TINY if rehearse else REAL:
        with tempfile.TemporaryDirectory() as scratch:
            directory = case.tokenizer
            if case.shape is not None:
                make = functools.partial(write_shape, case, Path(scratch))
                directory = record.attempt(case.name, make)
            if directory is not None:
                measure(record, case, directory)
