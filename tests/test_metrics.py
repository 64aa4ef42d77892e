"""Every metric on cases worked by hand; intervals and comparisons on plain restatements."""

import itertools
from collections.abc import Callable
from pathlib import Path

import nltk
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pplug_jax.data.tasks import TASKS
from pplug_jax.errors import InputError
from pplug_jax.scoring.metrics import (
    METRICS,
    check_metrics,
    example_statistics,
    interval,
    paired_difference,
    score,
    value_of,
)

TASK = "LaMP_5"
LONG_TASK = "topic_writing"


def test_every_metric_of_every_task_is_there():
    of_tasks = {name for name, metric in METRICS.items() if metric.statistics}
    assert {metric for task in TASKS.values() for metric in task.metrics} == of_tasks
    lower = {name for name, metric in METRICS.items() if metric.lower_is_better}
    assert lower == {"mae", "rmse", "loss", "style"}


def test_a_loss_is_that_of_all_tokens_together():
    assert value_of("loss", np.array([[6.0, 2.0], [1.0, 8.0]])) == 0.7


# Texts


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
    each = example_statistics(TASK, predictions, references)
    assert list(each) == ["rouge1", "rougeL"]
    np.testing.assert_allclose(each["rouge1"], [[1], [2 / 3], [0]])
    assert score(TASK, predictions, references)["rouge1"] == pytest.approx(5 / 9)


def test_an_exact_match_is_one_of_the_stripped_text():
    predictions, references = [" a b\n", "A b", "a  b", ""], ["a b", "a b", "a b", " "]
    each = example_statistics("custom", predictions, references)
    assert list(each) == ["rouge1", "rougeL", "exact_match"]
    np.testing.assert_array_equal(each["exact_match"], [[1], [0], [0], [1]])


def test_an_exact_prefix_counts_where_the_gold_has_one():
    predictions = ["net: a", "Net: b", "net c", "ip: d", "e"]
    references = ["net: x", "net: y", "net: z", "w", "v"]
    each = example_statistics("custom", predictions, references)["exact_prefix"]
    np.testing.assert_array_equal(each, [[1, 1], [0, 1], [0, 1], [0, 0], [0, 0]])
    assert value_of("exact_prefix", each) == pytest.approx(1 / 3)
    assert "exact_prefix" not in example_statistics("custom", predictions[3:], references[3:])
    # A part of the examples may have none.
    assert np.isnan(value_of("exact_prefix", each[3:]))
    assert np.isnan(interval("exact_prefix", each[3:])).all()


# METEOR


# With m matched words in c runs that are adjacent in both texts, P = m / words predicted, and
# R = m / words of the reference: (1 - (c / m)^3 / 2) P R / (0.9 P + 0.1 R).
@pytest.mark.parametrize(
    ("prediction", "reference", "meteor"),
    [
        # Even an exact match is one run: 1 - (1/3)^3 / 2.
        ("the cat sat", "the cat sat", 53 / 54),
        ("cat", "cat", 1 / 2),
        ("  The cat SAT\n", "the CAT sat ", 53 / 54),
        # The full stop is a word: m = 4.
        ("The cat sat.", "the cat sat .", 127 / 128),
        # "the cat" and "sat" are two runs: 1 - (2/3)^3 / 2.
        ("sat the cat", "the cat sat", 23 / 27),
        # P = 1, R = 1/2, one run of 2: (1 - 1/16) * 1/2 / (0.9 + 0.05).
        ("the cat", "the cat sat down", 15 / 16 * 10 / 19),
        # P = 1/2, R = 1: a long text costs less than a short one.
        ("the cat sat down", "the cat", 15 / 16 * 10 / 11),
        # Porter stems: run, cat.
        ("running cats", "runs cat", 15 / 16),
        # WordNet's synonyms, and none: two runs of one word, P = R = 2/3.
        ("red auto here", "red car here", 53 / 54),
        ("red dog here", "red car here", 1 / 2 * 2 / 3),
        # NLTK looks stems up, and WordNet has no "automobil".
        ("automobile", "car", 0),
        ("dog", "cat", 0),
        ("", "cat", 0),
        ("cat", "", 0),
        # A run of y that old NLTK's stemmer could not bear: the other word still counts.
        ("cat a" + 5000 * "y", "cat", 1 / 2 * 1 / 2 / (0.9 * 1 / 2 + 0.1)),
    ],
)
def test_meteor_by_hand(nltk_data: Path, prediction: str, reference: str, meteor: float):
    scores = score(LONG_TASK, [prediction, "cat"], [reference, "cat"])
    assert list(scores) == ["rouge1", "rougeL", "meteor"]
    assert scores["meteor"] == pytest.approx((meteor + 1 / 2) / 2)


def test_without_its_data_meteor_is_refused_and_says_what_to_do(no_nltk_data: list[str]):
    message = (
        r"wordnet and punkt_tab: run `python -m nltk\.downloader wordnet punkt_tab`.*NLTK_DATA"
    )
    with pytest.raises(InputError, match=message):
        check_metrics(LONG_TASK)
    # Without network it is tried once, not once a data set.
    assert no_nltk_data == ["wordnet"]
    with pytest.raises(InputError, match=message):
        score(LONG_TASK, ["a"], ["a"])


def test_data_that_can_be_downloaded_are(nltk_data: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def download(name: str, quiet: bool) -> bool:
        asked.append(name)
        nltk.data.path[:] = [str(nltk_data)]
        return True

    monkeypatch.setattr(nltk, "download", download)
    nltk.data.path.clear()
    check_metrics(LONG_TASK)
    check_metrics(LONG_TASK)
    assert asked == ["wordnet", "punkt_tab"]


def test_other_tasks_need_no_data(no_nltk_data: list[str]):
    for name, task in TASKS.items():
        if "meteor" not in task.metrics:
            check_metrics(name)
    assert not no_nltk_data


# Classes


def test_accuracy_and_macro_f1_by_hand():
    # [1]: right once, predicted once, gold three times: F1 = 2 * 1 / (1 + 3) = 1/2.
    # [2]: right once, predicted twice, gold once: F1 = 2/3.
    # "1" and "[1] or [2]" are no labels: wrong, but of no class.
    predictions = [" [1]\n", "[2]", "1", "[2] "]
    references = ["[1]", "[1]", "[1]", "[2]"]
    assert score("LaMP_1", predictions, references) == pytest.approx(
        {"accuracy": 1 / 2, "macro_f1": (1 / 2 + 2 / 3) / 2}
    )
    assert score("LaMP_1", ["[1] or [2]"], ["[2]"]) == {"accuracy": 0, "macro_f1": 0}


def test_macro_f1_is_over_all_labels_also_the_absent():
    # Comedy and classic are right, the other 13 labels neither predicted nor gold: F1 0 each.
    texts = ["comedy", "classic", "comedy"]
    assert score("LaMP_2", texts, texts) == pytest.approx({"accuracy": 1, "macro_f1": 2 / 15})


def test_labels_are_not_lower_cased_nor_cut_at_nul():
    predictions, references = ["Comedy", "comedy\0", "com edy"], ["comedy"] * 3
    assert score("LaMP_2", predictions, references) == {"accuracy": 0, "macro_f1": 0}


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([*TASKS["LaMP_2"].labels[:4], "none"]), st.integers(0, 3)),
        min_size=1,
        max_size=12,
    )
)
def test_macro_f1_is_its_definition(pairs: list[tuple[str, int]]):
    labels = TASKS["LaMP_2"].labels
    predictions, references = [p for p, _ in pairs], [labels[i] for _, i in pairs]
    f1 = []
    for label in labels:
        hits = sum(p == r == label for p, r in zip(predictions, references, strict=True))
        precision = hits / max(predictions.count(label), 1)
        recall = hits / max(references.count(label), 1)
        f1.append(2 * precision * recall / (precision + recall) if hits else 0)
    assert score("LaMP_2", predictions, references)["macro_f1"] == pytest.approx(np.mean(f1))


# Ratings


@pytest.mark.parametrize(
    ("prediction", "reference", "error"),
    [
        ("4", "4", 0),
        (" 4.0\n", "5", 1),
        ("4.5", "4", 0.5),
        ("1e0", "3", 2),
        ("-2", "1", 3),
        # What is no number is the end of the scale that is further from the gold.
        ("four", "1", 4),
        ("four", "2", 3),
        ("", "3", 2),
        ("4 stars", "4", 3),
        ("five", "5", 4),
        # Numbers to Python, but not to LaMP's script.
        ("nan", "2", 3),
        ("inf", "5", 4),
        ("-Infinity", "1", 4),
    ],
)
def test_a_rating_by_hand(prediction: str, reference: str, error: float):
    assert score("LaMP_3", [prediction], [reference]) == pytest.approx(
        {"mae": error, "rmse": error}
    )


def test_errors_over_examples_by_hand():
    # Errors 0, 1 and 4.
    assert score("LaMP_3", ["5", "4", "no"], ["5", "5", "5"]) == pytest.approx(
        {"mae": 5 / 3, "rmse": np.sqrt(17 / 3)}
    )


def test_a_rating_too_large_to_square_is_an_infinite_error_not_an_exception():
    each = example_statistics("LaMP_3", ["9" * 200, "4", "5"], ["5", "5", "5"])
    other = example_statistics("LaMP_3", ["5", "4", "5"], ["5", "5", "5"])
    assert interval("rmse", each["rmse"]) == (np.inf, np.inf)
    assert paired_difference("rmse", each["rmse"], other["rmse"]) == (np.inf, np.inf, np.inf, 1)


# What is refused, and any text


@pytest.mark.parametrize("lists", [([], []), (["a"], []), (["a"], ["a", "b"])])
@pytest.mark.parametrize("task", [TASK, "LaMP_QA"])
def test_lists_that_do_not_match_are_refused(task: str, lists: tuple[list[str], list[str]]):
    with pytest.raises(ValueError, match=f"{len(lists[0])} predictions for {len(lists[1])}"):
        score(task, *lists)


@pytest.mark.parametrize("use", [lambda task: score(task, ["a"], ["a"]), check_metrics])
def test_an_unknown_task_is_refused_with_the_known_ones(use: Callable[[str], None]):
    with pytest.raises(ValueError, match="unknown task 'LaMP_0'; known: .*LaMP_5"):
        use("LaMP_0")


@pytest.mark.parametrize(
    ("task", "reference"), [("LaMP_1", "1"), ("LaMP_2", "Comedy"), ("LaMP_3", "4.5")]
)
def test_a_reference_that_is_no_label_is_refused(task: str, reference: str):
    label = TASKS[task].labels[0]
    with pytest.raises(ValueError, match=f"reference '{reference}' is no label of {task}: "):
        score(task, [label, label], [f" {label} ", reference])


def test_a_task_that_only_a_judge_can_score_has_no_metrics():
    assert score("LaMP_QA", ["an answer"], ["an answer"]) == {}


@pytest.mark.slow
@pytest.mark.parametrize("task", ["LaMP_1", "LaMP_2", "LaMP_4", "custom"])
@settings(deadline=None)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=4))
def test_shares_are_between_0_and_1_whatever_is_said(task: str, predictions: list[str]):
    reference = (TASKS[task].labels or ("the cat sat",))[0]
    for value in score(task, predictions, [reference] * len(predictions)).values():
        assert 0 <= value <= 1


# Intervals


def column(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float64)[:, None]


def test_the_interval_holds_the_mean_and_narrows_with_n():
    statistics = np.random.default_rng(0).random((1600, 1))
    low, high = interval("rouge1", statistics)
    assert low < statistics.mean() < high
    # For so many values the bootstrap is close to the normal interval.
    assert high - low == pytest.approx(2 * 1.96 * statistics.std() / 40, rel=0.1)
    few = interval("rouge1", statistics[:100])
    assert few[1] - few[0] > 2 * (high - low)


def test_the_interval_of_a_metric_that_is_no_mean():
    # The root grows with the mean, so it commutes with percentiles, nearly: they interpolate.
    squares = np.random.default_rng(0).random((400, 1)) * 9
    np.testing.assert_allclose(
        interval("rmse", squares), np.sqrt(interval("mae", squares)), rtol=1e-5
    )


def test_the_interval_of_macro_f1_is_of_the_scores_of_resampled_examples():
    rng = np.random.default_rng(0)
    texts = rng.choice(["[1]", "[2]", "no"], 30), rng.choice(["[1]", "[2]"], 30)
    # The same draws, but scored as texts.
    draws = np.random.default_rng(3).integers(0, 30, (200, 30))
    scores = [score("LaMP_1", *(t[i].tolist() for t in texts))["macro_f1"] for i in draws]
    each = example_statistics("LaMP_1", *(t.tolist() for t in texts))["macro_f1"]
    assert each.shape == (30, 6)
    np.testing.assert_allclose(
        interval("macro_f1", each, samples=200, seed=3), np.percentile(scores, [2.5, 97.5])
    )


def test_the_interval_is_the_same_each_time_and_of_its_seed():
    statistics = np.random.default_rng(0).random((50, 1))
    assert interval("mae", statistics) == interval("mae", statistics)
    assert interval("mae", statistics, seed=1) != interval("mae", statistics)


@pytest.mark.parametrize("values", [[0.25], [0.25, 0.25, 0.25], [0.0, 0.0]])
def test_the_interval_of_equal_examples_is_their_value(values: list[float]):
    assert interval("mae", column(*values)) == (values[0], values[0])
    root = values[0] ** 0.5
    assert interval("rmse", column(*values)) == (root, root)


def test_what_is_resampled_are_users():
    statistics, users = np.random.default_rng(0).random((40, 1)), [f"u{i}" for i in range(40)]
    assert interval("mae", statistics, users=users) == interval("mae", statistics)
    assert interval("mae", statistics, users=[""] * 40) == interval("mae", statistics)
    thrice = np.repeat(statistics, 3, axis=0)
    np.testing.assert_allclose(
        interval("mae", thrice, users=np.repeat(users, 3).tolist()), interval("mae", statistics)
    )
    assert np.ptp(interval("mae", thrice)) < 0.8 * np.ptp(interval("mae", statistics))
    assert interval("mae", statistics, users=["u"] * 40) == (statistics.mean(),) * 2


def test_who_has_no_style_is_not_drawn():
    few = np.array([[3.0, 1], [0, 0], [1, 1], [0, 0]])
    assert value_of("style", few) == 2
    assert interval("style", few) == interval("style", few[::2]) == (1, 3)
    assert paired_difference("style", few, few * [2, 1]) == paired_difference(
        "style", few[::2], few[::2] * [2, 1]
    )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # one draw has no standard error
def test_a_user_has_as_much_weight_as_examples():
    # One of 1 and three of 0: the mean is 1, 1/4 or 0, and nothing between.
    drawn = [interval("mae", column(1, 0, 0, 0), 1, seed, "uvvv")[0] for seed in range(20)]
    assert set(drawn) == {0, 0.25, 1}


# Comparisons


def test_a_comparison_counted_by_hand():
    # Of the 8 ways to swap the differences 1, 1, 0 only those with both 1 on one side, swapped
    # or not, and either 0, are as far apart as 2/3: 4.
    a, b = column(1, 1, 1), column(0, 0, 1)
    difference, low, high, p_value = paired_difference("accuracy", a, b)
    assert difference == pytest.approx(2 / 3)
    assert p_value == 4 / 8
    # The three are drawn with replacement: all zeros once in 27 times, all ones 8 times.
    assert (low, high) == (0, 1)


def test_a_user_is_swapped_as_a_whole():
    # 1, 1 and 0 apart: the first two add up to 2/3 or -2/3 when they are swapped together.
    a, b = column(1, 1, 1), column(0, 0, 1)
    assert paired_difference("accuracy", a, b, users=["u", "u", "v"]).p_value == 1
    assert paired_difference("accuracy", a, b, users=["u", "v", "v"]).p_value == 2 / 4
    assert paired_difference("accuracy", a, b, users=["u"] * 3).p_value == 1


def test_a_comparison_of_errors_counted_by_hand():
    # Root mean squares 3 and 0 as seen and all swapped; else root 6 and root 3, less far apart.
    a, b = column(9, 9, 9), column(0, 0, 0)
    assert paired_difference("rmse", a, b) == (3, 3, 3, 2 / 8)
    assert paired_difference("rmse", b, a) == (-3, -3, -3, 2 / 8)


def test_swaps_that_tie_count_though_their_sums_are_rounded():
    # Parts of 49, so that the exact count is one of whole numbers; nearly equal in the mean.
    a, b = np.random.default_rng(457).integers(0, 50, (2, 9))
    swaps = [abs(np.dot(signs, a - b)) for signs in itertools.product([1, -1], repeat=9)]
    exact = np.mean(swaps >= abs(np.sum(a - b)))
    assert paired_difference("rouge1", column(*a / 49), column(*b / 49)).p_value == exact


def test_a_clear_difference_is_found_and_chance_is_not():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 200, 1))
    clear = paired_difference("rouge1", a + 0.3, b)
    assert clear.low > 0
    # None of the random swaps comes near: only the one seen counts.
    assert clear.p_value == 1 / 2001
    chance = paired_difference("rouge1", a, b)
    assert chance.low < 0 < chance.high
    assert chance.p_value > 0.05


@pytest.mark.parametrize("metric", ["mae", "rmse", "macro_f1"])
def test_a_comparison_is_symmetric_and_the_same_each_time(metric: str):
    a, b = np.random.default_rng(0).integers(0, 2, (2, 40, 45)).astype(np.float64)
    if metric != "macro_f1":
        a, b = a[:, :1], b[:, :1]
    there, back = (
        paired_difference(metric, a, b, samples=300),
        paired_difference(metric, b, a, samples=300),
    )
    assert there == paired_difference(metric, a, b, samples=300)
    assert there.p_value == back.p_value
    np.testing.assert_allclose(
        there[:3], np.negative([back.difference, back.high, back.low]), atol=1e-12
    )


def test_for_means_the_interval_is_that_of_the_differences():
    a, b = np.random.default_rng(0).random((2, 60, 1))
    compared = paired_difference("rouge1", a, b)
    np.testing.assert_allclose(compared[1:3], interval("rouge1", a - b), atol=1e-12)
    assert compared.difference == pytest.approx((a - b).mean())


@pytest.mark.parametrize("n", [1, 2, 50])
def test_equal_methods_do_not_differ(n: int):
    a = np.random.default_rng(0).random((n, 1))
    assert paired_difference("rmse", a, a.copy()) == (0, 0, 0, 1)


def test_one_example_says_nothing_about_a_difference():
    assert paired_difference("mae", column(2), column(0.5)) == (1.5, 1.5, 1.5, 1)


def test_statistics_of_other_examples_are_refused():
    with pytest.raises(ValueError, match=r"shapes \(2, 1\) and \(3, 1\) are not of the same"):
        paired_difference("mae", column(1, 2), column(1, 2, 3))
