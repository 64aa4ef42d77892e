"""Eight CPU devices, no network, and random tiny models in Hugging Face format."""

import importlib.metadata
import os
from pathlib import Path

# XLA ends the process at a flag that it does not know, as later ones this.
QUICK_TO_COMPILE = "--xla_backend_optimization_level=0" + (
    " --xla_cpu_use_fusion_emitters=false"
    if importlib.metadata.version("jaxlib").startswith("0.10.")
    else ""
)
# Before JAX is imported: eight devices to shard over, and compile time instead of run time.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        QUICK_TO_COMPILE,
        "--xla_llvm_disable_expensive_passes=true",
    ]
).strip()
os.environ["JAX_PLATFORMS"] = "cpu"
# What one test, or a process that it starts, has compiled, the others need not.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parents[1] / ".pytest_cache/compiled")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import itertools
import signal
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import hypothesis
import nltk
import pytest
import transformers
from fsspec.implementations.memory import MemoryFileSystem
from nltk.corpus import wordnet
from parity import save_random

from scripts.pretrain.bpe import train_bpe

# What a shell starts in the background ignores Ctrl-C, and so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("untimed", deadline=None)  # a slow machine is no failure
hypothesis.settings.load_profile("untimed")

VOCABULARY = 320
TEXT = (
    "A small model reads what its user has written, and writes as the user would: titles, reviews, "
    "tweets and scores. Personalisation of frozen language models needs no training for new users."
)
# A plug's settings beside the paper's, each and all.
EXTENSIONS = {"recency": True, "features": ("difference", "form")}
OPTIONS = {
    "paper": {},
    "all": EXTENSIONS,
    "recency": {"recency": True},
    "difference": {"features": ("difference",)},
    "form": {"features": ("form",)},
}


@pytest.fixture(scope="session")
def make_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_llama(**settings): a directory with a random tiny Llama and its tokenizer."""
    import torch

    def make(**settings: Any) -> Path:
        path = tmp_path_factory.mktemp("llama")
        torch.manual_seed(0)
        # Weights larger than usual, so that the logits are not all alike.
        config = {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.2,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
        } | settings
        save_random(transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)), path)
        special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
        train_bpe([TEXT], VOCABULARY, special).save_pretrained(path)
        return path

    return make


@pytest.fixture(scope="session")
def tiny_llama(make_llama: Callable[..., Path]) -> Path:
    """A random Llama (D 32, 2 layers, 4 heads, 2 KV heads) and its tokenizer; don't write to it."""
    return make_llama()


@pytest.fixture(scope="session")
def llama_tokenizer(tiny_llama: Path) -> transformers.PreTrainedTokenizerBase:
    return transformers.AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture(scope="session")
def make_bert(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_bert(kind=BertModel, **settings): a directory, a random tiny BERT and its tokenizer."""
    import torch

    def make(
        kind: type[transformers.PreTrainedModel] = transformers.BertModel, **settings: Any
    ) -> Path:
        path = tmp_path_factory.mktemp("bert")
        torch.manual_seed(0)
        config = {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "initializer_range": 0.2,
        } | settings
        save_random(kind(transformers.BertConfig(**config)), path)
        special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        tokenizer = train_bpe([TEXT], VOCABULARY, special, template="[CLS] $A [SEP]")
        tokenizer.save_pretrained(path)
        return path

    return make


@pytest.fixture(scope="session")
def tiny_bert(make_bert: Callable[..., Path]) -> Path:
    """A random BERT (E 32, 2 layers, 128 positions) with its tokenizer; do not write to it."""
    return make_bert()


@pytest.fixture(scope="session")
def make_t5(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_t5(**settings): a directory with a random tiny T5 with a head of its own."""
    import torch

    def make(**settings: Any) -> Path:
        path = tmp_path_factory.mktemp("t5")
        torch.manual_seed(0)
        config = {
            "vocab_size": 24,
            "d_model": 32,
            "d_kv": 12,  # not D / heads
            "d_ff": 48,
            # transformers cannot generate with a decoder that is deeper than the encoder.
            "num_layers": 3,
            "num_decoder_layers": 2,
            "num_heads": 4,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 16,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
            "decoder_start_token_id": 0,
        } | settings
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(**config))
        # transformers 5 ties a new T5's head, but not the head that a checkpoint brings.
        model.lm_head.weight = torch.nn.Parameter(torch.randn(model.shared.weight.shape))
        save_random(model, path)
        return path

    return make


@pytest.fixture(scope="session")
def real_models() -> Path:
    """The trained models outside the repository; tests that need them skip where absent."""
    path = Path(__file__).resolve().parents[2] / "shared" / "models"
    if not path.is_dir():
        pytest.skip(f"{path} is absent: no trained models to compare with")
    return path


@pytest.fixture(scope="session")
def real_gguf() -> Path:
    """NAME/model.gguf of real LLMs, where PPLUG_TEST_GGUF says; tests that need them skip else."""
    path = Path(os.environ.get("PPLUG_TEST_GGUF", "/nowhere"))
    if not path.is_dir():
        pytest.skip("PPLUG_TEST_GGUF names no directory: no real .gguf files to read")
    return path


def forget_nltk_data() -> None:
    wordnet._unload()
    nltk.tokenize._get_punkt_tokenizer.cache_clear()


@pytest.fixture
def no_nltk_data(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """No data and no network; the names that were asked for."""
    asked: list[str] = []
    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(nltk, "download", lambda name, quiet: asked.append(name))
    forget_nltk_data()
    yield asked
    forget_nltk_data()


@pytest.fixture
def nltk_data(tmp_path: Path, no_nltk_data: list[str]) -> Path:
    """The files METEOR reads: no abbreviations, and a WordNet of one synset."""
    punkt, words = tmp_path / "tokenizers/punkt_tab/english", tmp_path / "corpora/wordnet"
    for directory in (punkt, words):
        directory.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
        (punkt / name).touch()
    for part, form in itertools.product(
        ("noun", "verb", "adj", "adv"), ("index.{}", "data.{}", "{}.exc")
    ):
        (words / form.format(part)).touch()
    (words / "index.sense").touch()
    (words / "lexnames").write_text("00\tnoun.artifact\t1\n")
    # Offset 0, file 00 of lexnames, 3 words, 0 pointers.
    (words / "data.noun").write_text("00000000 00 n 03 car 0 auto 0 automobile 0 000 | a vehicle\n")
    # 1 synset, 0 pointers, 1 sense, 0 of them tagged, the synset's offset.
    index = [f"{word} n 1 0 1 0 00000000\n" for word in ("auto", "automobile", "car")]
    (words / "index.noun").write_text("".join(index))
    # NLTK reads nothing that others could write to, which a umask may allow.
    for path in (tmp_path, *tmp_path.rglob("*")):
        path.chmod(0o700)
    nltk.data.path.append(str(tmp_path))
    return tmp_path


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> str:
    """gs://.. of a bucket that lies in memory; Orbax' arrays alone cannot go there."""

    class Bucket(MemoryFileSystem):
        protocol = "gs"
        store: ClassVar[dict] = {}
        pseudo_dirs: ClassVar[list] = [""]

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return super()._strip_protocol(path.removeprefix("gs://"))

    backend = "etils.epath.backend._FileSystemSpecBackend._get_filesystem"
    monkeypatch.setattr(backend, lambda self, name: Bucket())
    return "gs://bucket"
