"""What a comparison says in words."""

import numpy as np
import pytest

from pplug_jax.scoring.summary import verdicts

LOW, HIGH = np.zeros((30, 1)), np.ones((30, 1))
NOISE = np.random.default_rng(0).random((30, 1))


def said(metric: str, pplug: np.ndarray, **others: np.ndarray) -> list[str]:
    every = {"pplug": pplug} | others
    return verdicts({name: {metric: rows} for name, rows in every.items()}, metric, 500)


@pytest.mark.parametrize(
    ("metric", "pplug", "none", "word"),
    [
        ("rouge1", HIGH, LOW, "better than"),
        ("rouge1", LOW, HIGH, "worse than"),
        ("mae", HIGH, LOW, "worse than"),
        ("mae", LOW, HIGH, "better than"),
        ("rouge1", HIGH, HIGH, "not significantly different from"),
        ("rouge1", NOISE, NOISE[::-1], "not significantly different from"),
        # Five examples that all go one way may be chance: 2 of 32 swaps are as extreme.
        ("rouge1", HIGH[:5], LOW[:5], "not significantly different from"),
    ],
)
def test_better_is_what_the_metric_says_and_chance_is_not(
    metric: str, pplug: np.ndarray, none: np.ndarray, word: str
):
    (line,) = said(metric, pplug, none=none)
    assert line.startswith(f"pplug is {word} none: {metric} ")


def test_a_stranger_who_does_as_well_is_remarked_upon():
    assert "So nothing here shows" in said("rouge1", HIGH, shuffled_user=HIGH)[-1]
    assert "So nothing here shows" in said("mae", HIGH, shuffled_user=LOW)[-1]
    assert len(said("mae", LOW, shuffled_user=HIGH)) == 1


def test_without_pplug_nothing_is_compared():
    assert verdicts({"none": {"rouge1": LOW}}, "rouge1", 500) == []
