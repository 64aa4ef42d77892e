"""The benchmarks' metrics, bootstrap intervals, and paired comparisons of two methods.

Every metric is a function of the mean over examples of per-example statistics. So resampling the
rows of one array (n, S) gives an interval for any of them, even an RMSE or a macro-F1. Users are
resampled, each with all of their examples, which are alike: a cluster bootstrap.
"""

import math
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import nltk
import numpy as np
from nltk.corpus import wordnet
from nltk.tokenize import word_tokenize
from nltk.translate.meteor_score import single_meteor_score
from rouge_score import rouge_scorer
from scipy import stats

from pplug_jax.data.form import prefix_of
from pplug_jax.data.tasks import TASKS, Task
from pplug_jax.errors import InputError

# Resamples handled at once. The figures do not depend on it, the memory does.
BATCH = 200


def _mean(means: np.ndarray) -> np.ndarray:
    return means[..., 0]


def _ratio(means: np.ndarray) -> np.ndarray:
    """Return nan where there is nothing to divide by, as in a part without any prefix."""
    of = np.broadcast_to(np.nan, means.shape[:-1]).copy()
    return np.divide(means[..., 0], means[..., 1], out=of, where=means[..., 1] > 0)


class Metric(NamedTuple):
    """How a metric is computed.

    Attributes:
        statistics: (task, predictions, references), all stripped, to each example's (n, S) float64;
            None if it takes more than these.
        value: means of statistics over examples, (..., S), to the metric, (...).
        lower_is_better: whether less is better.
    """

    statistics: Callable[[Task, Sequence[str], Sequence[str]], np.ndarray] | None
    value: Callable[[np.ndarray], np.ndarray] = _mean
    lower_is_better: bool = False


class Comparison(NamedTuple):
    """The first method's value minus the second's, its 95% interval, and a two-sided p-value."""

    difference: float
    low: float
    high: float
    p_value: float


def _each(
    measure: Callable[[str, str], float],
) -> Callable[[Task, Sequence[str], Sequence[str]], np.ndarray]:
    def statistics(task: Task, predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
        pairs = zip(predictions, references, strict=True)
        return np.array([[measure(*pair)] for pair in pairs], dtype=np.float64)

    return statistics


def _class_counts(task: Task, predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    # Not NumPy's comparison of strings, which drops their trailing NULs.
    predicted, gold = (
        np.array([[text == label for label in task.labels] for text in texts], dtype=np.float64)
        for texts in (predictions, references)
    )
    return np.concatenate([predicted * gold, predicted, gold], axis=1)


def _macro_f1(means: np.ndarray) -> np.ndarray:
    hit, predicted, gold = np.split(means, 3, axis=-1)
    total = predicted + gold
    return np.divide(2 * hit, total, out=np.zeros_like(total), where=total > 0).mean(axis=-1)


def _exact_prefix(task: Task, predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    golds = [prefix_of(reference) for reference in references]
    pairs = zip(map(prefix_of, predictions), golds, strict=True)
    return np.array([[gold != "" and prefix == gold, gold != ""] for prefix, gold in pairs], float)


def _error(prediction: str, reference: str) -> float:
    gold = float(reference)
    try:
        rating = float(prediction)
    except ValueError:
        rating = math.nan
    # "nan" and "inf" are floats to Python, but LaMP's script stops at them: no ratings either.
    if math.isfinite(rating):
        return abs(rating - gold)
    return max(abs(1 - gold), abs(5 - gold))


def _squared_error(prediction: str, reference: str) -> float:
    error = _error(prediction, reference)
    return error * error  # a rating of 200 digits makes this infinite, and `**` an exception


def _rouge(name: str) -> Callable[[str, str], float]:
    scorer = rouge_scorer.RougeScorer([name], use_stemmer=False)
    return lambda prediction, reference: scorer.score(reference, prediction)[name].fmeasure


def _meteor(prediction: str, reference: str) -> float:
    return single_meteor_score(
        word_tokenize(reference), word_tokenize(prediction), alpha=0.9, beta=3, gamma=0.5
    )


METRICS = {
    "accuracy": Metric(_each(operator.eq)),
    "macro_f1": Metric(_class_counts, _macro_f1),
    "exact_match": Metric(_each(operator.eq)),
    "exact_prefix": Metric(_exact_prefix, _ratio),
    "mae": Metric(_each(_error), lower_is_better=True),
    "rmse": Metric(
        _each(_squared_error), lambda means: np.sqrt(_mean(means)), lower_is_better=True
    ),
    "rouge1": Metric(_each(_rouge("rouge1"))),
    "rougeL": Metric(_each(_rouge("rougeL"))),
    "meteor": Metric(_each(_meteor)),
    # The golds' tokens': each example's sum and count, of evaluate.predict.
    "loss": Metric(None, _ratio, lower_is_better=True),
    "style": Metric(None, _ratio, lower_is_better=True),  # style.distances: it takes the histories
}


def _known(task: str) -> Task:
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; known: {', '.join(TASKS)}")
    return TASKS[task]


def check_metrics(task: str) -> None:
    """Load the data that the task's metrics need, so that a long run cannot fail at its end.

    Only METEOR needs any: NLTK's WordNet and its sentence splitter, downloaded if absent.

    Raises:
        ValueError: an unknown task.
        InputError: the data are missing and cannot be downloaded.
    """
    if "meteor" not in _known(task).metrics:
        return

    def load() -> None:
        word_tokenize("")
        wordnet.ensure_loaded()

    try:
        load()
    except LookupError:
        for name in ("wordnet", "punkt_tab"):
            if not nltk.download(name, quiet=True):
                break  # it has said why; the next would fail alike
        try:
            load()
        except LookupError as error:
            raise InputError(
                "METEOR needs NLTK's data sets wordnet and punkt_tab: run `python -m "
                "nltk.downloader wordnet punkt_tab`; without network, run it elsewhere, copy the "
                "nltk_data directory here and set NLTK_DATA to its path"
            ) from error


def example_statistics(
    task: str, predictions: Sequence[str], references: Sequence[str]
) -> dict[str, np.ndarray]:
    """Return each example's statistics for each of the task's metrics, (n, S) float64.

    S is 3 C for macro-F1 over C labels, 2 for exact_prefix, and 1 for the others. The definitions
    are those of LaMP's evaluation (arXiv 2304.11406) and LongLaMP's (arXiv 2407.11016), on stripped
    strings:

    - accuracy, macro_f1: exactly a label, in its case. An output that is no label is wrong and
      belongs to no class. A class that nobody has or predicts has F1 0.
    - mae, rmse: the prediction as Python's `float`; an output that is no finite number becomes the
      end of the scale, 1 or 5, that is further from the reference.
    - exact_match: the strings are equal.
    - exact_prefix: of the references with a prefix (`form.prefix_of`), the predictions that have
      the same; left out if no reference has one.
    - rouge1, rougeL: the F-measure of `rouge_score` without stemming (Lin 2004).
    - meteor: NLTK's, of NLTK's words (Lavie and Agarwal 2007; alpha 0.9, beta 3, gamma 0.5).

    Raises:
        ValueError: lists of different or no length, an unknown task, or a reference that is none of
            the task's labels.
        InputError: METEOR's data are missing, see `check_metrics`.
    """
    row = _known(task)
    if len(predictions) != len(references) or not predictions:
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
    predictions, references = (
        [text.strip() for text in texts] for texts in (predictions, references)
    )
    for reference in references:
        if row.labels and reference not in row.labels:
            raise ValueError(
                f"reference {reference!r} is no label of {task}: {', '.join(row.labels)}"
            )
    check_metrics(task)
    values = {
        name: statistics(row, predictions, references)
        for name in row.metrics
        if (statistics := METRICS[name].statistics)
    }
    return {
        name: rows
        for name, rows in values.items()
        if METRICS[name].value is not _ratio or rows[:, 1].any()
    }


def value_of(metric: str, statistics: np.ndarray) -> float:
    """Return the metric over the examples with these `example_statistics`, (n, S)."""
    return float(METRICS[metric].value(statistics.mean(axis=0)))


def score(task: str, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return the task's metrics over all examples, e.g. {"rouge1": .., "rougeL": ..}.

    For ROUGE this is the plain mean. LaMP's own script prints the median of bootstrap means, which
    agrees to about the fourth decimal. `example_statistics` has definitions and errors.

    Args:
        task: a task's name, as LaMP_5.
        predictions: the answers.
        references: the right outputs, in the same order.
    """
    return {
        name: value_of(name, statistics)
        for name, statistics in example_statistics(task, predictions, references).items()
    }


def _by_user(
    metric: str, statistics: np.ndarray, users: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Return each user's sums of statistics, (U, S), and number of examples, (U, 1).

    An example without a user counts as a user. Users whose ratio would divide by zero are left out.
    """
    places: dict[str | int, int] = {}
    users = users or [""] * len(statistics)
    place = np.array([places.setdefault(user or i, len(places)) for i, user in enumerate(users)])
    sums = np.zeros((len(places), statistics.shape[1]))
    np.add.at(sums, place, statistics)
    numbers = np.bincount(place)[:, None]
    divisible = sums[:, 1] > 0 if METRICS[metric].value is _ratio else slice(None)
    return sums[divisible], numbers[divisible]


def _value(metric: str, sums: np.ndarray, numbers: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    # `drawn` (..., U) are rows of the others. Counted, as those rows are S times larger.
    counts = np.apply_along_axis(np.bincount, -1, drawn, minlength=len(sums))
    return METRICS[metric].value(counts @ sums / (counts @ numbers))


def _percentiles(
    value: Callable[..., np.ndarray], n: int, samples: int, seed: int
) -> tuple[float, float]:
    result = stats.bootstrap(
        (np.arange(n),),
        value,
        n_resamples=samples,
        batch=BATCH,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def interval(
    metric: str,
    statistics: np.ndarray,
    samples: int = 2000,
    seed: int = 0,
    users: Sequence[str] = (),
) -> tuple[float, float]:
    """Return the 95% percentile bootstrap interval of the metric over users (Efron 1979).

    One user, equal examples, or an infinite value give the value twice.

    Args:
        metric: its name.
        statistics: (n, S), from `example_statistics`.
        samples: number of resamples.
        seed: of the resampling.
        users: the user of each example, "" if unknown. Leave empty to treat every example as a
            different user.
    """
    value = value_of(metric, statistics)
    sums, numbers = _by_user(metric, statistics, users)
    if len(sums) < 2 or np.all(statistics == statistics[0]) or not math.isfinite(value):
        return value, value
    return _percentiles(
        lambda drawn, axis: _value(metric, sums, numbers, drawn), len(sums), samples, seed
    )


def paired_difference(
    metric: str,
    a: np.ndarray,
    b: np.ndarray,
    samples: int = 2000,
    users: Sequence[str] = (),
) -> Comparison:
    """Compare two methods in the metric on the same examples: a minus b.

    The interval is the bootstrap's over users. The p-value is that of the permutation test that
    swaps the methods within users: the share of swaps, the observed one included, that differ as
    much. It is exact if all 2^U swaps are no more than `samples` (Phipson and Smyth 2010).

    Args:
        metric: its name.
        a: (n, S), from `example_statistics`.
        b: as `a`.
        samples: number of resamples and of swaps.
        users: as in `interval`.

    Raises:
        ValueError: a and b differ in shape.
    """
    if a.shape != b.shape:
        raise ValueError(
            f"statistics of shapes {a.shape} and {b.shape} are not of the same examples"
        )
    (sums, numbers), (others, _) = (_by_user(metric, statistics, users) for statistics in (a, b))
    n = len(sums)
    both = np.concatenate([sums, others]), np.concatenate([numbers, numbers])

    def difference(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return _value(metric, *both, first) - _value(metric, *both, second)

    def size(first: np.ndarray, second: np.ndarray, axis: int) -> np.ndarray:
        # Rounded: whether two swaps tie must not hang on the order of a sum.
        return np.round(np.abs(difference(first, second)), 12)

    observed = value_of(metric, a) - value_of(metric, b)
    if n < 2 or np.array_equal(a, b) or not math.isfinite(observed):
        return Comparison(observed, observed, observed, 1.0)
    low, high = _percentiles(lambda drawn, axis: difference(drawn, drawn + n), n, samples, seed=0)
    test = stats.permutation_test(
        (np.arange(n), np.arange(n, 2 * n)),
        size,
        permutation_type="samples",
        alternative="greater",
        n_resamples=samples,
        batch=BATCH,
        rng=np.random.default_rng(0),
    )
    return Comparison(observed, low, high, float(test.pvalue))
