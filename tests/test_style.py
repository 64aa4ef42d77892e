"""The style measure, by hand."""

import numpy as np
import pytest

from pplug_jax.data.lamp import Example
from pplug_jax.data.tasks import TASKS
from pplug_jax.scoring.style import distances, features


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Plain words here", [0, 3, 1 / 3]),
        ("A Tale: Of Two", [1, 4, 1]),
        ("3 of Them", [0, 3, 1 / 3]),
        ("", [0, 0, 0]),
    ],
)
def test_features(text: str, found: list[float]) -> None:
    np.testing.assert_allclose(features(text), found)


def user(*titles: str) -> Example:
    return Example("0", "", "", tuple({"title": title, "abstract": ""} for title in titles))


def test_the_distance_is_in_standard_deviations_of_all_that_users_wrote() -> None:
    users = [user("A: B", "A: B"), user("c d e f", "c d e f")]
    # Colons: mean 1 and 0, deviation .5; words: 2 and 4, deviation 1; capitals: 1 and 0, .5.
    assert distances(TASKS["LaMP_5"], users, ["A: B", "c d e f"]).tolist() == [[0, 1]] * 2
    found = distances(TASKS["LaMP_5"], users, ["c d e f", "A: B d e"])
    np.testing.assert_allclose(found[:, 0], [(2 + 2 + 2) / 3, (2 + 0 + 1) / 3])


def test_who_wrote_nothing_has_no_style() -> None:
    found = distances(TASKS["LaMP_5"], [user(), user("a b", "c d e f")], ["x", "y z v"])
    # Three words are the mean, and nothing else ever varies.
    assert found.tolist() == [[0, 0], [0, 1]]
    assert distances(TASKS["LaMP_5"], [user()], ["x"]).tolist() == [[0, 0]]
