"""The style measure, by hand."""

import numpy as np
import pytest

from pplug_jax.data.form import SIZE
from pplug_jax.data.lamp import Example
from pplug_jax.data.tasks import TASKS
from pplug_jax.scoring.style import distances

TASK = TASKS["LaMP_5"]


def user(*titles: str) -> Example:
    return Example("0", "", "", tuple({"title": title, "abstract": ""} for title in titles))


def test_the_distance_is_in_standard_deviations_of_all_that_users_wrote() -> None:
    users = [user("A: B", "A: B"), user("c d e f", "c d e f")]
    # The users differ in a first capital, a prefix, one that they use, the letter behind it,
    # capitals, and words, each from one user's mean to the other's by 2 deviations.
    assert distances(TASK, users, ["A: B", "c d e f"]).tolist() == [[0, 1]] * 2
    found = distances(TASK, users, ["c d e f", "A: B"])
    # The second answer's prefix is not one that its user has: they differ in 5.
    np.testing.assert_allclose(found[:, 0], [2 * 6 / SIZE, 2 * 5 / SIZE], rtol=1e-5)


def test_what_nobody_else_writes_counts_three_deviations() -> None:
    titles = ["one", "two"] * 50
    (plain, ticked, asked), marked = (user(*titles) for _ in range(3)), user("`one`")
    found = distances(TASK, [plain, ticked, asked, marked], ["one", "`one`", "one?", "`one`"])
    # A backtick is rare among them, a question mark unheard of.
    np.testing.assert_allclose(found[:3, 0], [0, 3 / SIZE, 3 / SIZE], atol=1e-6)


def test_who_wrote_nothing_has_no_style() -> None:
    found = distances(TASK, [user(), user("a b", "c d e f g h i j")], ["x", "y z v u"])
    # Four words are the mean of the logarithms, and nothing else ever varies.
    np.testing.assert_allclose(found, [[0, 0], [0, 1]], atol=1e-6)
    assert distances(TASK, [user()], ["x"]).tolist() == [[0, 0]]


def test_items_without_an_answer_do_not_count() -> None:
    some, all_of_them = user("A b", "", " "), user("A b")
    for answer in ("c", ""):
        a, b = (distances(TASK, [of], [answer]) for of in (some, all_of_them))
        np.testing.assert_array_equal(a, b)
    assert distances(TASK, [user("", " ")], ["x"]).tolist() == [[0, 0]]


@pytest.mark.parametrize("name", [n for n, task in TASKS.items() if "rouge1" in task.metrics])
def test_tasks_say_what_the_users_answers_are(name: str) -> None:
    task = TASKS[name]
    assert bool(task.answer) != bool(task.answers)
