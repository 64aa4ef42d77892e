"""LaMP's metrics, per example, and percentile bootstrap intervals over them."""

from collections.abc import Sequence

import numpy as np
from rouge_score import rouge_scorer
from scipy import stats

from pplug_jax.data.tasks import TASKS


def example_scores(
    task: str, predictions: Sequence[str], references: Sequence[str]
) -> dict[str, np.ndarray]:
    """Each example's score by each of the task's metrics, (n,) float64, as LaMP's evaluation.

    ROUGE is the F-measure of `rouge_score` without stemming, on stripped strings.

    Raises:
        ValueError: lists of different or no length, or an unknown task.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; known: {', '.join(TASKS)}")
    if len(predictions) != len(references) or not predictions:
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
    names = TASKS[task].metrics
    scorer = rouge_scorer.RougeScorer(list(names), use_stemmer=False)
    scores = [
        scorer.score(r.strip(), p.strip()) for p, r in zip(predictions, references, strict=True)
    ]
    return {name: np.array([score[name].fmeasure for score in scores]) for name in names}


def score(task: str, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """The task's metrics over all examples, e.g. {"rouge1": .., "rougeL": ..}.

    The plain mean; LaMP's own script prints the median of bootstrap means, which agrees to about
    the fourth decimal.
    """
    return {
        name: float(values.mean())
        for name, values in example_scores(task, predictions, references).items()
    }


def interval(values: np.ndarray, samples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """The 95% percentile bootstrap interval of the mean of `values` (n,)."""
    if len(values) < 2 or np.all(values == values[0]):
        return float(values.mean()), float(values.mean())
    result = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=samples,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)
