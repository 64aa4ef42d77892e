"""What a comparison says in words."""

import numpy as np
import pytest

from pplug_jax.scoring.summary import holm, verdicts

LOW, HIGH = np.zeros((30, 1)), np.ones((30, 1))
NAMES = {"plug": "pplug", "controls": ("instruction_only", "shuffled_user")}
NOISE = np.random.default_rng(0).random((30, 1))


def said(metric: str, pplug: np.ndarray, **others: np.ndarray) -> list[str]:
    every = {"pplug": pplug} | others
    return verdicts({name: {metric: rows} for name, rows in every.items()}, metric, 500, **NAMES)


@pytest.mark.parametrize(
    ("metric", "pplug", "none", "word"),
    [
        ("rouge1", HIGH, LOW, "better"),
        ("rouge1", LOW, HIGH, "worse"),
        ("mae", HIGH, LOW, "worse"),
        ("mae", LOW, HIGH, "better"),
        ("rouge1", HIGH, HIGH, "not significantly different"),
        ("rouge1", NOISE, NOISE[::-1], "not significantly different"),
        # Five examples that all go one way may be chance: 2 of 32 swaps are as extreme.
        ("rouge1", HIGH[:5], LOW[:5], "not significantly different"),
    ],
)
def test_better_is_what_the_metric_says_and_chance_is_not(
    metric: str, pplug: np.ndarray, none: np.ndarray, word: str
):
    (line,) = said(metric, pplug, none=none)
    assert line.startswith(f"pplug against none: {word} in {metric} ")


def sums(values: np.ndarray) -> np.ndarray:
    return np.concatenate([values, np.ones_like(values)], axis=1)


def test_loss_metric_and_style_are_judged_together():
    """A plug that only lowers the loss has learnt the user, whatever ROUGE sees."""
    ours = {"rouge1": NOISE, "loss": sums(NOISE), "style": sums(NOISE)}
    theirs = ours | {"rouge1": NOISE[::-1], "loss": sums(NOISE + 0.1)}
    (line,) = verdicts({"pplug": ours, "shuffled_user": theirs}, "rouge1", 500, **NAMES)
    better, same = line.split("; ")
    assert better.startswith("pplug against shuffled_user: better in loss -0.100 [")
    assert same.startswith("not significantly different in rouge1 ")
    assert ", style +0.000 [+0.000, +0.000] p = 1.0000" in same
    # Of 501 swaps none is as extreme, which is looked for three times.
    assert better.endswith(f"p = {3 / 501:.4f}")


@pytest.mark.parametrize(
    ("p_values", "corrected"),
    [
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),
        ([0.5, 0.9], [1.0, 1.0]),
        ([0.02], [0.02]),
        ([], []),
    ],
)
def test_holm(p_values: list[float], corrected: list[float]):
    assert holm(p_values) == pytest.approx(corrected)


def test_a_control_that_does_as_well_is_remarked_upon():
    for control in NAMES["controls"]:
        other = next(name for name in NAMES["controls"] if name != control)
        remark = said("rouge1", HIGH, **{control: HIGH, other: LOW})[-1]
        assert "So nothing here shows" in remark
        assert remark.endswith(f"it is not better than {control}.")
        assert "So nothing here shows" in said("mae", HIGH, **{control: LOW})[-1]
        assert len(said("mae", LOW, **{control: HIGH})) == 1
    both = said("rouge1", LOW, instruction_only=LOW, shuffled_user=HIGH)[-1]
    assert both.endswith("not better than instruction_only and shuffled_user.")


def test_without_pplug_nothing_is_compared():
    assert verdicts({"none": {"rouge1": LOW}}, "rouge1", 500, **NAMES) == []
