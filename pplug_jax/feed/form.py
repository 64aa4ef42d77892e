"""The form of a text: what an encoder that reads all in lower case cannot see.

all-MiniLM and BGE's uncased siblings give `GNU Compiler` and `gnu compiler` one vector, and hardly
tell how long a title is; yet form is what differs most between people who write on the same things.
"""

import math

import numpy as np

SIZE = 8


def form(text: str) -> np.ndarray:
    """(SIZE,) float32 of about unit norm; zeros for an empty text.

    Whether it begins with a capital, has a colon, a bracket, a dash between blanks, a digit, or
    ends with punctuation: 1 or -1 each; the share of words that begin with a capital, from -1 to 1;
    and the logarithm of their number, 0 for 8.
    """
    words = text.split()
    if not words:
        return np.zeros(SIZE, np.float32)
    found = [
        text.strip()[0].isupper(),
        ":" in text,
        "(" in text,
        any(word in "-–—" for word in words),
        any(character.isdigit() for character in text),
        words[-1][-1] in ".!?",
        sum(word[0].isupper() for word in words) / len(words),
    ]
    values = [2 * value - 1 for value in found] + [math.log2(len(words)) - 3]
    return np.array(values, np.float32) / math.sqrt(SIZE)
