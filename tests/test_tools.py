"""The tools that make the bundled models: what they write goes through the ordinary loaders."""

from pathlib import Path

import jax
import numpy as np
import pytest

from pplug_jax.data import sample
from pplug_jax.encoder import load_encoder
from pplug_jax.llm import load_llm
from pplug_jax.session.models import ASSETS
from pplug_jax.storage import hf
from scripts.pretrain.bpe import train_bpe
from tests.support.forks import Fork
from tests.support.lamp_files import write_split


def make(tool: str, output: Path, **settings: object) -> None:
    flags = {"steps": 2, "batch_size": 4, "vocab_size": 400, "hidden_size": 32, "layers": 1}
    arguments = [f"--{name}={value}" for name, value in (flags | settings).items()]
    process = Fork("tests.support.pretraining", tool, f"--output={output}", *arguments)
    said = process.communicate(timeout=300)
    assert process.returncode == 0, said


@pytest.mark.slow
def test_a_pretrained_llm_loads(tmp_path: Path) -> None:
    make("pretrain_llm", tmp_path)
    llm = load_llm(tmp_path, dtype="float32")
    tokenizer = hf.load_tokenizer(tmp_path, llm.config.vocab_size)
    text = next(sample.users(0, "dev")).input
    ids = np.array([tokenizer.encode(text)])
    assert tokenizer.decode(ids[0]) == text
    logits = jax.jit(lambda llm: llm.logits(llm.embed(ids), np.ones(ids.shape, bool)))(llm)
    assert logits.shape == (*ids.shape, 400) and np.isfinite(logits).all()
    assert "step 2 " in (tmp_path / "training_log.txt").read_text()


@pytest.mark.slow
def test_a_pretrained_llm_can_be_made_from_files(tmp_path: Path) -> None:
    users = list(sample.users(0, "train", 6))
    questions = [{"id": u.id, "input": u.input, "profile": list(u.profile)} for u in users]
    golds = [{"id": u.id, "output": u.target} for u in users]
    write_split(tmp_path, "train", questions, {"task": "LaMP_5", "golds": golds})
    make("pretrain_llm", tmp_path / "llm", data=f"LaMP_5:{tmp_path}:1", vocab_size=300)
    assert load_llm(tmp_path / "llm", dtype="float32").config.vocab_size == 300


@pytest.mark.slow
def test_a_pretrained_encoder_loads(tmp_path: Path) -> None:
    make("pretrain_encoder", tmp_path)
    encoder = load_encoder(tmp_path)
    assert encoder.model.pooling == "mean"
    vectors = encoder.encode(["a title and its abstract", "another"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-2)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_bert"])
def test_the_bundled_models_are_small_and_keep_their_log(name: str) -> None:
    files = [file for file in (ASSETS / name).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 4e6  # 8 MB together is the limit
    assert "step " in (ASSETS / name / "training_log.txt").read_text()


def test_a_bpe_knows_every_character() -> None:
    tokenizer = train_bpe(["a text"], 270, {"bos_token": "<s>", "eos_token": "</s>"})
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    for text in ("naïve Übung", "東京", "a  b\n\tc", "🙂"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
