"""What the LLM has read of prompts is kept, and changes nothing but the time."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from pplug_jax.feed.batches import Batch
from pplug_jax.llm import LLM
from pplug_jax.llm.decoder import KeysValues
from pplug_jax.plugs.forward import read_prompts
from pplug_jax.run import run
from pplug_jax.session.prompts import PromptCache, Read
from pplug_jax.storage.scalars import read_scalars
from pplug_jax.storage.workdir import METRICS, about_path, predictions_path
from tests.support.runs import small_config
from tests.support.tiny import ONE_DEVICE, make_batch, make_llm

METHODS = ("instruction_only", "task_lora+pplug", "pplug+answers")


def compare(workdir: Path, cache: float) -> None:
    config = small_config(
        methods=METHODS,
        plug__place="behind",
        data__buckets=1,
        eval__num_beams=2,
        train__prompt_cache=cache,
        train__validation=0.2,
        train__learning_rate=1e-3,  # at a higher one rounding errors grow
        seeds=(0,),
        mesh__tensor=2,
        mesh__data=4,
    )
    run(config, workdir, "compare")


def test_a_prompt_is_kept_as_it_was_padded() -> None:
    """Or a run that was stopped would go on with other roundings than one that was not."""
    llm, batch = make_llm(), make_batch()
    cache = PromptCache(llm, ONE_DEVICE, 1e9)
    reads = []

    def read(llm: LLM, text: jax.Array, mask: jax.Array) -> KeysValues:
        reads.append(text.shape[1])
        return read_prompts(llm, text, mask)

    width = batch.text.shape[1]
    for padding in (0, 0, 16, 16, 0):
        wide = [np.pad(x, ((0, 0), (0, padding))) for x in (batch.text, batch.text_mask)]
        found = cache.read(llm, batch._replace(text=wide[0], text_mask=wide[1]), read).was_read
        mask = wide[1][:, None, :, None, None]
        for x, y in zip(found, read_prompts(llm, *wide), strict=True):
            np.testing.assert_array_equal(np.where(mask, x, 0), np.where(mask, y, 0))
    assert reads == [width, width + 16, width]


def test_room_is_counted_in_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    prompts = [np.arange(n, dtype=np.int32) for n in (3, 4, 5)]
    token = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, their width, float32
    cache = PromptCache(make_llm(), ONE_DEVICE, 12 * token)
    assert cache.keep(prompts[:2])
    assert cache.keep(prompts[:2])
    assert cache.keep(prompts)
    assert not cache.keep([*prompts, np.arange(1, dtype=np.int32)])
    assert capsys.readouterr().out.startswith("4 prompts are read anew at each use: to keep them")
    assert not PromptCache(make_llm(), ONE_DEVICE, 0).keep(prompts)


@pytest.mark.slow
def test_kept_prompts_change_nothing_and_are_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reads: list[np.ndarray] = []
    whole = PromptCache.read

    def counting(self: PromptCache, llm: LLM, batch: Batch, read: Read = read_prompts) -> Batch:
        def counted(llm: LLM, text: jax.Array, mask: jax.Array) -> object:
            reads.append(np.asarray(text))
            return read(llm, text, mask)

        return whole(self, llm, batch, counted)

    monkeypatch.setattr(PromptCache, "read", counting)
    compare(tmp_path / "kept", 1.0)
    # Of 24 users 19 to train on, in batches of 8, and 5 to validate. Twice, for what
    # `pplug+answers` shows is another prompt.
    assert len(reads) == 2 * (3 + 1)
    count = len(reads)
    compare(tmp_path / "anew", 1e-6)
    assert len(reads) == count
    assert "24 prompts are read anew at each use: to keep them takes " in capsys.readouterr().out
    kept, anew = (tmp_path / name / "seed_0" for name in ("kept", "anew"))
    for method in METHODS:
        paths = [predictions_path(path, "dev", method) for path in (kept, anew)]
        assert paths[0].read_text() == paths[1].read_text()
        losses = [json.loads(about_path(path).read_text())["losses"] for path in paths]
        np.testing.assert_allclose(losses[0], losses[1], rtol=5e-3)
    for name in ("loss", "grad_norm", "validation_loss"):
        curves = [read_scalars(path / METRICS, name) for path in (kept, anew)]
        assert curves[0].keys() == set(METHODS)
        for method, curve in curves[0].items():
            first = min(curve)
            assert curve[first] == pytest.approx(curves[1][method][first], rel=1e-4)
            if name != "grad_norm":  # whose rounding errors grow most
                assert curve == pytest.approx(curves[1][method], rel=1e-3)
