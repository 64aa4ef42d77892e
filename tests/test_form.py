"""The form of a text, by hand."""

import math

import numpy as np
import pytest

from pplug_jax.feed.form import SIZE, form


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A Study of Two Rivers: floods", [1, 1, -1, -1, -1, -1, 2 * 4 / 6 - 1, math.log2(6) - 3]),
        ("tool - 2 modes (curses).", [-1, -1, 1, 1, 1, 1, -1, math.log2(5) - 3]),
        ("  Ünder eins-zwei  ", [1, -1, -1, -1, -1, -1, 0, -2]),
        ("", [0] * SIZE),
    ],
)
def test_form(text: str, expected: list[float]) -> None:
    found = form(text)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found * math.sqrt(SIZE), expected, rtol=1e-6)
