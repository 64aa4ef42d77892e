"""A training whose loss leaves: when that is said, and what comes of it."""

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pplug_jax.feed.batches import Batch
from pplug_jax.llm.prompts import Front
from pplug_jax.plugs.forward import token_losses
from pplug_jax.run import run
from pplug_jax.storage.checkpoint import Checkpoints
from pplug_jax.train.watch import RISE, Start, llm_loss
from tests.support.runs import small_config
from tests.support.tiny import make_batch, make_llm


@given(st.floats(0, 20), st.floats(0, 20), st.floats(0, 20))
def test_a_loss_is_wrong_far_above_the_llms_own_and_where_it_began(
    first: float, first_own: float, own: float
) -> None:
    start = Start(first, first_own)
    least = own + max(0, first - first_own) + RISE
    assert not start.problem(least - 1e-6, own)
    problem = start.problem(least + 0.01, own)
    assert f"the LLM alone has {own:.3f}; it began at {first:.3f}" in problem
    assert "the loss is nan" in start.problem(math.nan, own)
    # Only what is far above the first batch's losses is worth a second look.
    assert not start.suspect(max(first, first_own) + RISE)
    assert start.suspect(max(first, first_own) + RISE + 0.01)
    assert start.suspect(math.nan)


def test_where_no_beginning_is_known_only_what_is_no_number_is_wrong(tmp_path: Path) -> None:
    start = Start.read(tmp_path, "pplug")
    assert not start.suspect(1e9)
    assert start.suspect(math.nan) and start.problem(math.nan, 1.0)
    lines = [
        {"step": 1, "name": f"{name}", "value": value}
        for name, value in (
            ("pplug/start_loss", 3.0),
            ("pplug/start_llm_loss", 2.0),
            ("other/start_loss", 9.0),
        )
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert Start.read(tmp_path, "pplug") == (3, 2)
    assert Start.read(tmp_path, "other") == (9, 0)
    assert Start.read(tmp_path, "third") == Start()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_llms_own_loss_is_that_without_soft_tokens(accumulation: int) -> None:
    llm, batch = make_llm(), make_batch()

    def mean(llm: object, batch: Batch) -> jax.Array:
        return token_losses(None, llm, batch, Front(1)).sum() / batch.target_mask.sum()

    expected = jax.jit(mean)(llm, batch)
    found = llm_loss(llm, batch, place=Front(1), accumulation=accumulation)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("then", "message"), [("stop", "lower"), ("back", "before any good checkpoint; lower")]
)
@pytest.mark.parametrize("place", ["front", "behind"])
def test_a_run_that_diverges_stops_with_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, then: str, message: str
) -> None:
    monkeypatch.setattr("pplug_jax.train.watch.RISE", -9.0)
    config = small_config(methods=("pplug",), plug__place=place, train__on_divergence=then)
    number = r"\d+\.\d+"
    expected = (
        rf"pplug diverges: at step 1 the loss is {number}, where the LLM alone has {number}; it "
        rf"began at {number}, where the LLM has {number}[,;] {message}"
    )
    with pytest.raises(FloatingPointError, match=expected):
        run(config, tmp_path, "train")


@pytest.mark.slow
def test_a_run_that_diverges_goes_back_if_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []

    def problem(start: Start, loss: float, own: float) -> str:
        """The fourth step's loss has left, and that of the newest checkpoint, but no other."""
        steps.append(loss)
        return "the loss is high" if len(steps) in (4, 5) else ""

    monkeypatch.setattr(Start, "suspect", lambda start, loss: True)
    monkeypatch.setattr(Start, "problem", problem)
    config = small_config(
        methods=("pplug",), train__checkpoint_every=1, train__on_divergence="back"
    )
    run(config, tmp_path, "train_and_evaluate")
    assert "pplug diverges: at step 4 the loss is high; lower" in capsys.readouterr().out
    assert len(steps) == 6
    # The third step's checkpoint was found bad too.
    assert Checkpoints(tmp_path / "checkpoints" / "pplug").latest == 2
    about = json.loads((tmp_path / "predictions" / "dev.pplug.about.json").read_text())
    assert about["step"] == 2


@pytest.mark.slow
def test_a_plug_above_the_llms_own_loss_is_told_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(methods=("pplug",))
    run(config, tmp_path / "good", "train")
    assert "nothing of use" not in capsys.readouterr().out
    monkeypatch.setattr("pplug_jax.train.loop.llm_loss", lambda *args, **settings: 0.0)
    run(config, tmp_path / "bad", "train")
    assert "the LLM alone has 0.000: nothing of use was learnt" in capsys.readouterr().out
