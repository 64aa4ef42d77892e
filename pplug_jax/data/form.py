"""The form of a text: what people see at once, and ROUGE and an uncased encoder do not.

all-MiniLM and BGE's uncased siblings give `GNU Compiler` and `gnu compiler` one vector, and say
little about a title's length. Yet form differs most between people who write on the same things.
Plugs read it (`feed.features`), and `style` measures it (`scoring.style`).
"""

import math
import re
from collections import Counter
from collections.abc import Container, Sequence

import numpy as np

SIZE = 16


def prefix_of(text: str) -> str:
    """Return what stands before the first colon that a blank follows; empty if nothing does."""
    match = re.match(r"\s*(.*?\S)\s*:\s", text, re.DOTALL)
    return match[1] if match else ""


def form(text: str, prefixes: Container[str] = ()) -> np.ndarray:
    """Describe a text's form, (SIZE,) float32 of about unit norm.

    Most entries are 1 or -1: it begins with a capital, has a prefix, one of `prefixes`, ends with a
    full stop, with ! or ?, has quotes, backticks, brackets, a dash between blanks, a digit; its
    first word, behind a prefix, ends as an English gerund, past tense, or third person. The case of
    that word's first letter is 0 where there is no prefix. Then follow the share of words that
    begin with a capital, from -1 to 1, and the logarithm of the number of words, 0 for 8.

    Args:
        text: the text.
        prefixes: what the user has written before a colon elsewhere.
    """
    text = text.strip()
    prefix, words = prefix_of(text), text.split()
    rest = text[len(prefix) :].lstrip(" :") if prefix else text
    first = (rest.split() or [""])[0].strip("\"'`()[],.;")
    marks = [
        text[:1].isupper(),
        prefix != "",
        prefix != "" and prefix in prefixes,
        text.endswith("."),
        text.endswith(("!", "?")),
        re.search(r"[\"“”„«»]|(?<!\S)['‘]", text),
        "`" in text,
        re.search(r"[(\[{]", text),
        any(word in "-–—" for word in words),
        any(character.isdigit() for character in text),
        re.search(r"[a-z]{2}ing$", first, re.IGNORECASE),
        re.search(r"[a-z][^e]ed$", first, re.IGNORECASE),
        re.search(r"[a-z][^isu]s$", first, re.IGNORECASE),
    ]
    values = [
        *(1 if mark else -1 for mark in marks),
        (1 if first[:1].isupper() else -1) if prefix else 0,
        2 * sum(word[0].isupper() for word in words) / max(1, len(words)) - 1,
        math.log2(max(1, len(words))) - 3,
    ]
    return np.array(values, np.float32) / math.sqrt(SIZE)


def forms(texts: Sequence[str]) -> np.ndarray:
    """Return the form of each of a user's texts, (n, SIZE) float32."""
    numbers = Counter(map(prefix_of, texts))
    repeated = {prefix for prefix, number in numbers.items() if number > 1}
    return np.array([form(text, repeated) for text in texts], np.float32).reshape(-1, SIZE)
