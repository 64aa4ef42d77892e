"""The form of a text, by hand."""

import math

import numpy as np
import pytest

from pplug_jax.data.form import SIZE, form, forms, prefix_of

# The places of the entries.
(CAPITAL, PREFIX, USED, STOP, OTHER, QUOTES, TICKS, BRACKETS, DASH, DIGIT, ING, ED, S) = range(13)
BEHIND, CAPITALS, WORDS = 13, 14, 15


def entries(text: str, prefixes: tuple[str, ...] = ()) -> np.ndarray:
    return form(text, prefixes) * math.sqrt(SIZE)


@pytest.mark.parametrize(
    ("text", "marks", "behind", "capitals", "words"),
    [
        ("A Study of Two Rivers: floods", {CAPITAL, PREFIX, S}, -1, 4 / 6, 6),
        ("tool - 2 modes (curses).", {STOP, BRACKETS, DASH, DIGIT}, 0, 0, 5),
        ("  \u00dcnder eins-zwei  ", {CAPITAL}, 0, 1 / 2, 2),
        ("net: Fixed `x` in 'y'!", {PREFIX, OTHER, QUOTES, TICKS, ED}, 1, 1 / 5, 5),
        ("Don't stop: adds \u201ctests\u201d", {CAPITAL, PREFIX, QUOTES, S}, -1, 1 / 4, 4),
        ("a: b: Adding more?", {PREFIX, OTHER}, -1, 1 / 4, 4),
        ("http://x is up", set(), 0, 0, 3),
        ("", set(), 0, 0, 1),
    ],
)
def test_form(text: str, marks: set[int], behind: int, capitals: float, words: int) -> None:
    expected = [1 if place in marks else -1 for place in range(13)]
    expected += [behind, 2 * capitals - 1, math.log2(words) - 3]
    found = form(text)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found * math.sqrt(SIZE), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("word", "ending"),
    [
        ("Adding", ING),
        ("ring", None),
        ("fixed", ED),
        ("Need", None),
        ("red", None),
        ("Removes", S),
        ("Pass", None),
        ("this", None),
        ('"Fixes"', S),
        ("Add", None),
    ],
)
def test_a_first_words_ending(word: str, ending: int | None) -> None:
    for text in (f"{word} it", f"net: {word} it"):
        found = {place for place in (ING, ED, S) if entries(text)[place] > 0}
        assert found == ({ending} if ending is not None else set())


@pytest.mark.parametrize(
    ("text", "prefix"),
    [
        ("net: ip: fix", "net"),
        (" a::b : fix", "a::b"),
        ("at 12:30 we met: a tale", "at 12:30 we met"),
        ("nothing:", ""),
        (": x", ""),
        ("", ""),
    ],
)
def test_a_prefix_is_what_a_colon_and_a_blank_follow(text: str, prefix: str) -> None:
    assert prefix_of(text) == prefix


def test_a_prefix_is_used_if_another_text_of_the_user_has_it() -> None:
    used = forms(["net: a", "net: b", "ip: c", "d"])[:, USED]
    assert (used > 0).tolist() == [True, True, False, False]
    assert entries("ip: x", ("ip",))[USED] == 1
    assert entries("ip x", ("",))[USED] == -1
    assert forms([]).shape == (0, SIZE)
