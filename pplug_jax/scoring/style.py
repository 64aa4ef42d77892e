"""Measure how far an answer's style is from the user's own, which ROUGE does not see."""

from collections.abc import Sequence

import numpy as np

from pplug_jax.data.form import form, forms, prefix_of
from pplug_jax.data.lamp import Example
from pplug_jax.data.tasks import Task

# Deviations that an entry counts at most: what hardly anybody writes, as a backtick in a title,
# must not decide alone.
MOST = 3.0
LEAST_DEVIATION = 1e-3  # of what nobody varies


def distances(task: Task, examples: Sequence[Example], predictions: Sequence[str]) -> np.ndarray:
    """Return each example's distance from the user's mean and 1, (n, 2); 0 and 0 without a history.

    The distance is the mean over the entries of `form` of the absolute difference between the
    answer and the mean of what the user wrote, in standard deviations of what all users wrote, of
    which an entry counts at most 3.
    """
    histories = [_written(task, example) for example in examples]
    with_history = [i for i, texts in enumerate(histories) if texts]
    result = np.zeros((len(examples), 2))
    if with_history:
        written = [forms(histories[i]) for i in with_history]
        deviation = np.concatenate(written).std(axis=0, dtype=np.float64)
        deviation = np.maximum(deviation, LEAST_DEVIATION)
        answers = [form(predictions[i], {*map(prefix_of, histories[i])}) for i in with_history]
        means = [rows.mean(axis=0, dtype=np.float64) for rows in written]
        differences = np.abs(np.array(answers) - np.array(means)) / deviation
        result[with_history, 0] = np.minimum(differences, MOST).mean(axis=1)
        result[with_history, 1] = 1
    return result


def _written(task: Task, example: Example) -> list[str]:
    """Return what the user wrote that is like an answer."""
    return [item[task.answer] for item in example.profile if item[task.answer].strip()]
