"""Measure how far an answer's style is from the user's own, which ROUGE does not see."""

from collections.abc import Sequence

import numpy as np

from pplug_jax.data.lamp import Example
from pplug_jax.data.tasks import Task


def features(text: str) -> np.ndarray:
    """Return whether there is a colon, the number of words, and the share of capitalised words."""
    words = text.split()
    capitals = sum(word[0].isupper() for word in words) / max(1, len(words))
    return np.array([":" in text, len(words), capitals], np.float64)


def distances(task: Task, examples: Sequence[Example], predictions: Sequence[str]) -> np.ndarray:
    """Return each example's distance from the user's mean and 1, (n, 2); 0 and 0 without a history.

    The distance is the mean over `features` of the absolute difference between the answer and the
    mean of what the user wrote, in standard deviations of what all users wrote.
    """
    written = [
        np.array([features(item[task.answer]) for item in example.profile]) for example in examples
    ]
    with_history = [i for i, texts in enumerate(written) if len(texts)]
    result = np.zeros((len(examples), 2))
    if with_history:
        deviation = np.concatenate([written[i] for i in with_history]).std(axis=0)
        deviation = np.where(deviation > 0, deviation, 1)
        differences = [
            np.abs(features(predictions[i]) - written[i].mean(axis=0)) for i in with_history
        ]
        result[with_history] = np.stack(
            [np.mean(differences / deviation, axis=1), np.ones(len(with_history))], 1
        )
    return result
