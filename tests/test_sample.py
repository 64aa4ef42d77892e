"""The embedded sample: same seed, same users; a style for each kind, which no abstract tells."""

import itertools
import math
import random
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


PHRASES = ("trouble_phrase", "data_phrase", "quality_phrase")


def texts(user: Example) -> list[tuple[str, str]]:
    """The user's abstracts and their titles."""
    abstract = TASKS["LaMP_5"].query_text(user.input)
    return [(abstract, user.target), *((item["abstract"], item["title"]) for item in user.profile)]


def shown(title: str, factor: str) -> str | None:
    """The option of `factor` that a title shows, read from its words alone."""
    if factor == "casing":
        return "lower" if title == title.lower() else "sentence"
    if factor == "separator":
        return next((mark for mark in sample.STYLE[factor] if mark in title), None)
    if factor == "aspect_place":
        starts = [phrase.partition(" {")[0] for name in PHRASES for phrase in sample.STYLE[name]]
        return "ahead" if title.lower().startswith(tuple(f"{x} " for x in starts)) else "after"
    return next(
        (
            option
            for option in sample.STYLE[factor]
            if f" {option.partition(' {')[0]} " in f" {re.sub('[:?]', '', title.lower())} "
        ),
        None,
    )


# Factors whose words are in a title for no other reason.
SHARED = ("study_verb", "system_verb", "resource_noun", "audience", "trouble_phrase")
CHANGING = ("opener", "adjective", "article", "tail", "aspect_place", "separator", "casing")


def options(users: list[Example], factor: str) -> list[dict[str, set[str]]]:
    """For each user the options that their titles of each kind show."""
    found = []
    for user in users:
        of_kind = {kind: set() for kind in sample.FRAMES}
        for abstract, title in texts(user):
            of_kind[sample.kind_of(abstract)] |= {shown(title, factor)} - {None}
        found.append(of_kind)
    return found


def test_an_abstract_tells_the_kind():
    for kind, deeds in sample.DEEDS.items():
        content = {"kind": kind, "aspect": "data", "task": "a task", "method": "a method"}
        abstracts = [sample.abstract(random.Random(i), content | {"data": "x"}) for i in range(50)]
        assert {sample.kind_of(abstract) for abstract in abstracts} == {kind}
        assert all(any(deed in abstract for abstract in abstracts) for deed in deeds)


@pytest.mark.parametrize("factor", SHARED + CHANGING)
def test_a_user_keeps_one_style_for_papers_of_one_kind(factor: str):
    seen = [option for user in options(USERS, factor) for option in user.values()]
    assert all(len(option) <= 1 for option in seen)
    assert set().union(*seen) == set(sample.STYLE[factor])


@pytest.mark.parametrize("factor", SHARED)
def test_some_factors_are_the_same_in_all_kinds(factor: str):
    assert factor not in sample.BY_KIND
    assert all(len(set().union(*user.values())) <= 1 for user in options(USERS, factor))


@pytest.mark.parametrize("factor", CHANGING)
def test_other_factors_are_chosen_anew_for_every_kind(factor: str):
    """Two kinds agree as often as two draws, so the one tells nothing of the other."""
    assert factor in sample.BY_KIND
    users = options(list(sample.users(0, "dev", 1000)), factor)
    pairs = [
        first == second
        for user in users
        for first, second in itertools.combinations(filter(None, user.values()), 2)
    ]
    chance = 1 / len(sample.STYLE[factor])
    error = (chance * (1 - chance) / len(pairs)) ** 0.5
    assert len(pairs) >= 100
    assert abs(sum(pairs) / len(pairs) - chance) < 4 * error


def test_only_items_of_the_inputs_kind_tell_its_title():
    """Who reads them knows the title's changing words; who reads all items alike does not."""
    right = {"kind": [], "all": []}
    for user in sample.users(0, "dev", 400):
        (abstract, gold), *items = texts(user)
        kind = sample.kind_of(abstract)
        for factor in ("opener", "adjective", "article", "tail"):
            if (wanted := shown(gold, factor)) is None:
                continue
            seen = [(sample.kind_of(text), shown(title, factor)) for text, title in items]
            for who, said in {
                "kind": [option for of, option in seen if option and of == kind],
                "all": [option for _, option in seen if option],
            }.items():
                if said:
                    right[who].append(max(sorted(set(said)), key=said.count) == wanted)
    assert sum(right["kind"]) == len(right["kind"]) > 300
    assert sum(right["all"]) < 0.8 * len(right["all"])


def test_a_user_of_one_style_has_no_other():
    users = list(sample.users(0, "pretrain", 60, one_style=True))
    for factor in SHARED + CHANGING:
        assert all(len(set().union(*user.values())) <= 1 for user in options(users, factor))


def test_notes_name_every_factor_of_one_style_in_the_users_words():
    for user in sample.users(0, "dev", 60, one_style=True):
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
