"""Features of history items beside their vectors; a new feature is an entry of FEATURES.

Batches, serving and planning carry features through this table and know none by name.
`plugs.reading.features_of` says which of them a plug reads.
"""

import bisect
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from pplug_jax.data.form import SIZE as FORM_SIZE
from pplug_jax.data.form import forms
from pplug_jax.data.lamp import Item, date_order
from pplug_jax.data.tasks import Task


class Feature(NamedTuple):
    """A row of numbers for each item of a history.

    Attributes:
        width: returns the row's length, given the encoder's width E.
        of_items: computes the feature, (n, width) float32, from a history as the task's files have
            it.
        of_peers: computes it from the items' vectors (n, E) and their peers' means (n, E) instead.
    """

    width: Callable[[int], int]
    of_items: Callable[[Task, Sequence[Item]], np.ndarray] | None = None
    of_peers: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None


def item_ages(task: Task, profile: Sequence[Item]) -> np.ndarray:
    """Count for each item the newer items of the profile, (n, 1) float32.

    All ages are 0 if an item has no date: the order of LaMP's lists says too little about time.
    """
    if not all("date" in item for item in profile):
        return np.zeros((len(profile), 1), np.float32)
    dates = [date_order(item) for item in profile]
    order = sorted(dates)
    newer = [len(order) - bisect.bisect_right(order, date) for date in dates]
    return np.array(newer, np.float32)[:, None]


def item_forms(task: Task, profile: Sequence[Item]) -> np.ndarray:
    """Return the form of each item's answer, or else of its text, (n, F) float32; 0 for none."""
    texts = [str(item.get(task.answer or task.cut, "")) for item in profile]
    written = np.array([bool(text.strip()) for text in texts], np.float32)
    return forms(texts) * written[:, None]


FEATURES = {
    "age": Feature(lambda size: 1, of_items=item_ages),
    "difference": Feature(lambda size: size, of_peers=np.subtract),
    "form": Feature(lambda size: FORM_SIZE, of_items=item_forms),
}


def of_items(names: Sequence[str], task: Task, profile: Sequence[Item]) -> dict[str, np.ndarray]:
    """Compute those of the features that need nothing but the history: {name: (n, width)}."""
    return {name: compute(task, profile) for name in names if (compute := FEATURES[name].of_items)}


def compare_with_peers(names: Sequence[str]) -> bool:
    """Return whether one of these features needs the peers."""
    return any(FEATURES[name].of_peers for name in names)


def of_history(
    names: Sequence[str],
    item_features: Mapping[str, np.ndarray],
    vectors: np.ndarray,
    means: Callable[[], np.ndarray],
) -> dict[str, np.ndarray]:
    """Compute these features of a whole history: {name: (n, width)}.

    Args:
        names: the features.
        item_features: what `of_items` returns for the history.
        vectors: (n, E) float32, the items' vectors.
        means: returns the means of the items' peers, (n, E); called at most once.
    """
    peers = means() if compare_with_peers(names) else vectors
    features = {}
    for name in names:
        compare = FEATURES[name].of_peers
        features[name] = compare(vectors, peers) if compare else item_features[name]
    return features
