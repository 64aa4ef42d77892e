"""No network, and random tiny models in Hugging Face format.

Fixtures import what they need: pytest's first process, which runs no test, reads this file too.
"""

# isort: off
import tests.support.environment  # noqa: F401  before JAX
# isort: on

import functools
import itertools
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import hypothesis
import pytest

from tests.support.once import Once
from tests.support.once import once as made_once

if TYPE_CHECKING:
    import playwright.sync_api as playwright
    import transformers

    from tests.support.postgres import Postgres
    from tests.support.server import Running

# What a shell starts in the background ignores Ctrl-C, and so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("untimed", deadline=None)  # a slow machine is no failure
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=10_000)
hypothesis.settings.load_profile("untimed")  # --hypothesis-profile=thorough loads the other

# Of the 65,530 memory maps that Linux gives a process, beyond which it crashes. A compiled program
# of a CPU takes dozens.
MOST_MAPS = 30_000

LONGEST = ("test_distributed.py", "test_run.py", "test_compare.py", "test_wheel.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begins with the longest tests, so that at the end no worker waits for another's."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(autouse=True)
def few_maps() -> Iterator[None]:
    """Forgets compiled programs before there are too many."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        import jax

        jax.clear_caches()


@pytest.fixture
def browser() -> Iterator["playwright.Page"]:
    """An empty page, which no error of a script or of its policy may meet."""
    programs = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    with programs.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1200, "height": 860})
        page.set_default_timeout(30_000)
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
        page.on("dialog", lambda dialog: dialog.accept())
        yield page
        chromium.close()
    # A request that needs a key is an error of the console, too.
    assert [error for error in errors if "401" not in error] == []


@pytest.fixture(scope="session")
def make_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_llama(**settings): a directory with a random tiny Llama and its tokenizer."""
    from tests.support.models import save_llama

    def make(**settings: Any) -> Path:
        return save_llama(tmp_path_factory.mktemp("llama"), **settings)

    return make


@pytest.fixture(scope="session")
def tiny_llama(make_llama: Callable[..., Path]) -> Path:
    """A random Llama (D 32, 2 layers, 4 heads, 2 KV heads) and its tokenizer; don't write to it."""
    return make_llama()


@pytest.fixture(scope="session")
def llama_tokenizer(tiny_llama: Path) -> "transformers.PreTrainedTokenizerBase":
    import transformers

    return transformers.AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture(scope="session")
def make_bert(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_bert(**settings): a directory with a random tiny BERT and its tokenizer."""
    from tests.support.models import save_bert

    def make(**settings: Any) -> Path:
        return save_bert(tmp_path_factory.mktemp("bert"), **settings)

    return make


@pytest.fixture(scope="session")
def tiny_bert(make_bert: Callable[..., Path]) -> Path:
    """A random BERT (E 32, 2 layers, 128 positions) with its tokenizer; do not write to it."""
    return make_bert()


@pytest.fixture(scope="session")
def make_t5(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_t5(**settings): a directory with a random tiny T5 with a head of its own."""
    from tests.support.models import save_t5

    def make(**settings: Any) -> Path:
        return save_t5(tmp_path_factory.mktemp("t5"), **settings)

    return make


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """once(name, make): the directory that make(path) fills, for all tests of all workers."""
    return functools.partial(made_once, tmp_path_factory)


@pytest.fixture(scope="session")
def finished(once: Once) -> Path:
    """The workdir of a whole small run; copy it to write to it.

    The names of what it compiled are in its file `compiled`.
    """
    from tests.support.runs import finish

    return once("finished", finish)


@pytest.fixture(scope="module")
def server(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Running]":
    """A server of the small run's plug on loopback, with an empty store."""
    from tests.support.server import serving

    with serving(finished, tmp_path_factory.mktemp("served") / "store.sqlite") as running:
        yield running


@pytest.fixture(scope="session")
def postgres() -> "Iterator[Postgres]":
    """A PostgreSQL on loopback; whoever stops it starts it again."""
    from tests.support.postgres import programs, running

    if (bin := programs()) is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    with running(bin) as server:
        yield server


def outside(variable: str, what: str) -> Path:
    """The directory that an environment variable names; tests that need it skip else."""
    path = Path(os.environ.get(variable, "/nowhere"))
    if not path.is_dir():
        pytest.skip(f"{variable} names no directory: no {what}")
    return path


@pytest.fixture(scope="session")
def real_model() -> Callable[[str], Path]:
    """Gives the directory of a trained model in Hugging Face format, by its name."""
    models = outside("PPLUG_TEST_MODELS", "trained models to compare with")

    def directory(name: str) -> Path:
        if not (models / name).is_dir():
            pytest.skip(f"PPLUG_TEST_MODELS: {models} has no {name}")
        return models / name

    return directory


@pytest.fixture(scope="session")
def real_texts() -> Path:
    """Real texts: ours in LaMP's format, a directory each, and corpus/."""
    return outside("PPLUG_TEST_TEXTS", "real texts to read")


@pytest.fixture(scope="session")
def real_gguf() -> Path:
    """NAME/model.gguf of real LLMs."""
    return outside("PPLUG_TEST_GGUF", "real .gguf files to read")


def forget_nltk_data() -> None:
    import nltk
    from nltk.corpus import wordnet

    wordnet._unload()
    nltk.tokenize._get_punkt_tokenizer.cache_clear()


@pytest.fixture
def no_nltk_data(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """No data and no network; the names that were asked for."""
    import nltk

    asked: list[str] = []
    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(nltk, "download", lambda name, quiet: asked.append(name))
    forget_nltk_data()
    yield asked
    forget_nltk_data()


@pytest.fixture
def nltk_data(tmp_path: Path, no_nltk_data: list[str]) -> Path:
    """The files METEOR reads: no abbreviations, and a WordNet of one synset."""
    import nltk

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
    from fsspec.implementations.memory import MemoryFileSystem

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
