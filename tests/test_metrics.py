"""LaMP's metrics on cases worked by hand."""

import numpy as np
import pytest

from pplug_jax.metrics import example_scores, interval, score

TASK = "LaMP_5"


@pytest.mark.parametrize(
    ("prediction", "reference", "rouge1", "rouge_l"),
    [
        ("the cat sat", "the cat sat", 1, 1),
        # 3 of 4 words found, 3 of 3 covered: 2 * 3/4 * 1 / (3/4 + 1)
        ("a fast cat sat", "a cat sat", 6 / 7, 6 / 7),
        # All words, but the longest common subsequence is "the cat" (or "on mat"): 2 of 4.
        ("on mat the cat", "the cat on mat", 1, 1 / 2),
        # A word counts as often as it stands in both: min(3, 1) = 1 of 3 and of 2.
        ("cat cat cat", "cat dog", 2 / 5, 2 / 5),
        ("dog", "cat", 0, 0),
        # No stemming.
        ("cats", "cat", 0, 0),
        # Case and punctuation are not seen, and a hyphen parts words.
        ("DEEP nets: Self-Training!", "deep nets self training", 1, 1),
        # Only a-z and 0-9 make words: "naïve" is "na ve", of which "naive" has nothing.
        ("naïve", "na ve", 1, 1),
        ("naïve", "naive", 0, 0),
        # Neither text has any word at all.
        ("Ω", "Ω", 0, 0),
        ("", "the cat", 0, 0),
        ("the cat", "", 0, 0),
        ("  the cat \n", "\tthe cat", 1, 1),
    ],
)
def test_rouge_by_hand(prediction: str, reference: str, rouge1: float, rouge_l: float):
    assert score(TASK, [prediction], [reference]) == pytest.approx(
        {"rouge1": rouge1, "rougeL": rouge_l}
    )


def test_the_score_is_the_mean_of_the_examples():
    predictions, references = ["a b", "a", "c"], ["a b", "a b", "d"]
    each = example_scores(TASK, predictions, references)
    assert list(each) == ["rouge1", "rougeL"]
    np.testing.assert_allclose(each["rouge1"], [1, 2 / 3, 0])
    assert score(TASK, predictions, references)["rouge1"] == pytest.approx(5 / 9)


@pytest.mark.parametrize("lists", [([], []), (["a"], []), (["a"], ["a", "b"])])
def test_lists_that_do_not_match_are_refused(lists: tuple[list[str], list[str]]):
    with pytest.raises(ValueError, match=f"{len(lists[0])} predictions for {len(lists[1])}"):
        score(TASK, *lists)


def test_an_unknown_task_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown task 'LaMP_0'; known: .*LaMP_5"):
        score("LaMP_0", ["a"], ["a"])


def test_the_interval_holds_the_mean_and_narrows_with_n():
    values = np.random.default_rng(0).random(1600)
    low, high = interval(values)
    assert low < values.mean() < high
    # For so many values the bootstrap is close to the normal interval.
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 40, rel=0.1)
    few = interval(values[:100])
    assert few[1] - few[0] > 2 * (high - low)


def test_the_interval_is_the_same_each_time():
    values = np.random.default_rng(0).random(50)
    assert interval(values) == interval(values)


@pytest.mark.parametrize("values", [[0.3], [0.3, 0.3, 0.3], [0.0, 0.0]])
def test_the_interval_of_constant_values_is_their_value(values: list[float]):
    assert interval(np.array(values)) == pytest.approx((values[0], values[0]))
