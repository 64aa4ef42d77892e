"""The embedded sample: same seed, same users; one style a user, which no abstract tells."""

import itertools
import math
import re

import pytest

from pplug_jax.data import sample
from pplug_jax.data.lamp import Example
from pplug_jax.data.tasks import TASKS

USERS = list(sample.users(0, "dev", 60))


def titles(user: Example) -> list[str]:
    return [user.target, *(item["title"] for item in user.profile)]


def test_a_user_is_a_function_of_seed_split_and_number():
    assert list(sample.users(0, "dev", 60)) == USERS
    assert list(itertools.islice(sample.users(0, "dev"), 5)) == USERS[:5]
    assert sample.user(0, 41, "dev", (8, 16)) == USERS[41]


def test_seeds_and_splits_give_other_users():
    base, seed, split = (
        [user.profile for user in sample.users(*arguments, 20)]
        for arguments in ((0, "dev"), (1, "dev"), (0, "train"))
    )
    for other in (seed, split):
        assert all(a != b for a, b in zip(base, other, strict=True))
    assert base == [user.profile for user in USERS[:20]]


def test_users_have_the_tasks_format():
    assert len({user.id for user in USERS}) == len(USERS)
    for user in USERS:
        assert 8 <= len(user.profile) <= 16
        assert len({item["id"] for item in user.profile}) == len(user.profile)
        for item in user.profile:
            assert all(isinstance(item[field], str) for field in TASKS["LaMP_5"].fields)
    assert {len(user.profile) for user in USERS} == set(range(8, 17))


def test_the_history_length_is_as_asked():
    assert {len(user.profile) for user in sample.users(0, "dev", 20, (2, 3))} == {2, 3}


def test_no_text_has_holes():
    for user in USERS:
        texts = [user.input, *titles(user), *(item["abstract"] for item in user.profile)]
        assert not any(re.search(r"[{}\0]|  |^\s|\s$|\s[,.?]|^$", text) for text in texts), texts


def test_the_gold_title_is_not_in_the_profile():
    for user in USERS:
        assert len(set(titles(user))) == len(titles(user))
        assert user.target.lower() not in user.input.lower()


def casing(title: str) -> str:
    return "lower" if title == title.lower() else "sentence"


def test_a_user_keeps_one_style():
    def uses(user: Example, factor: str) -> set[str]:
        texts = [title.lower() for title in titles(user)]
        return {
            option
            for option in sample.STYLE[factor]
            if any(f" {option.partition(' {')[0]} " in f" {text} " for text in texts)
        }

    for factor in ("opener", "adjective", "system_noun", "study_verb", "trouble_phrase"):
        used = [uses(user, factor) for user in USERS]
        assert all(len(options) <= 1 for options in used)
        assert set().union(*used) == set(sample.STYLE[factor])

    styles = [{casing(title) for title in titles(user)} for user in USERS]
    assert all(len(style) == 1 for style in styles)
    assert set().union(*styles) == set(sample.STYLE["casing"])

    separators = [
        {mark for mark in sample.STYLE["separator"] for title in titles(user) if mark in title}
        for user in USERS
    ]
    assert all(len(marks) <= 1 for marks in separators)
    assert set().union(*separators) == set(sample.STYLE["separator"])


def test_notes_name_every_factor_in_the_users_words():
    for user in USERS:
        notes = sample.notes(0, "dev", user.id)
        assert len(notes) == len(sample.STYLE) and all(notes)
        assert not any("{" in note for note in notes)
        said = set(notes)
        for title in titles(user):
            assert {
                word for word in ("robust", "simple", "frugal", "honest") if word in title
            } <= said


def test_styles_are_too_many_to_repeat():
    assert len(sample.STYLE) >= 20
    assert math.prod(map(len, sample.STYLE.values())) > 10**10
    for options in sample.STYLE.values():
        assert len(set(options)) == len(options) > 1


def test_the_abstract_does_not_tell_the_style(monkeypatch: pytest.MonkeyPatch):
    # Users of a single paper: no draw is repeated because of a title that was there already.
    users = list(sample.users(0, "dev", 200, (0, 0)))
    # With its options turned round, the same draws give every factor of the style another value.
    turned = {factor: options[1:] + options[:1] for factor, options in sample.STYLE.items()}
    monkeypatch.setattr(sample, "STYLE", turned)
    for user, other in zip(users, sample.users(0, "dev", 200, (0, 0)), strict=True):
        assert user.input == other.input
        assert user.target != other.target
