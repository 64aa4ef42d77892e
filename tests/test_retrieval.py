"""Which items a prompt shows, and the prompt itself."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pplug_jax.data.lamp import Example, Item
from pplug_jax.data.tasks import TASKS
from pplug_jax.feed.retrieval import (
    OWN_ANSWERS,
    Dense,
    answers_prompt,
    bm25,
    demonstration_prompt,
    random,
    recency,
)
from pplug_jax.feed.store import HistoryStore
from tests.support.words import WordTokenizer

TASK = TASKS["LaMP_5"]
INSTRUCTION = "Generate a title for the following abstract of a paper: "


def item(title: str = "", abstract: str = "", **more: object) -> Item:
    return {"title": title, "abstract": abstract} | more


def asked(input: str, profile: list[Item]) -> Example:
    return Example("", input, None, tuple(profile))


def bm25_score(query: str, text: str, texts: list[str]) -> float:
    """BM25 with Lucene's idf, ln(1 + (N - df + 1/2) / (df + 1/2)), as bm25s by default.

    Robertson's idf, without the "1 +", is negative for words in more than half of the texts.
    """
    k1, b = 1.5, 0.75
    words, documents = text.split(), [t.split() for t in texts]
    mean_length = sum(map(len, documents)) / len(documents)
    total = 0.0
    for word in query.split():
        df = sum(word in document for document in documents)
        tf = words.count(word)
        idf = math.log(1 + (len(texts) - df + 0.5) / (df + 0.5))
        total += idf * tf / (tf + k1 * (1 - b + b * len(words) / mean_length))
    return total


WORDS = st.lists(st.sampled_from("abcdeA"), min_size=1, max_size=8).map(" ".join)


@settings(deadline=None)
@given(WORDS, st.lists(WORDS, min_size=1, max_size=6), st.integers(1, 7))
def test_bm25_is_the_formulas_order(query: str, texts: list[str], top_k: int):
    profile = [item(text[:1], text[2:]) for text in texts]
    texts = [TASK.document_text(each) for each in profile]
    found = bm25(TASK, asked(INSTRUCTION + query, profile), top_k)
    scores = [bm25_score(query, text, texts) for text in texts]
    best = sorted(scores, reverse=True)[:top_k]
    assert [scores[i] for i in found] == pytest.approx(best, abs=1e-5)
    assert len(set(found)) == len(found)


def test_bm25_compares_the_users_text_not_the_instruction():
    profile = [item("following abstract of a paper:"), item("graph kernels")]
    assert bm25(TASK, asked(f"{INSTRUCTION}graph", profile), 1) == [1]


def test_bm25_keeps_the_profiles_order_among_equals():
    profile = [item("other"), *[item("same words")] * 39]
    assert bm25(TASK, asked(f"{INSTRUCTION}words", profile), 40) == [*range(1, 40), 0]


@pytest.mark.parametrize(
    ("query", "profile"),
    [
        ("graph", []),
        ("", [item("one"), item("two")]),
        ("graph", [item("one"), item("two")]),  # no word in common
        ("graph", [item(), item(" ", "\n")]),
        ("graph", [item(), item("one")]),
    ],
)
def test_bm25_with_nothing_to_compare_takes_the_first(query: str, profile: list[Item]):
    places = list(range(len(profile)))
    assert bm25(TASK, asked(INSTRUCTION + query, profile), 1) == places[:1]
    assert bm25(TASK, asked(INSTRUCTION + query, profile), 5) == places


@pytest.mark.parametrize(
    ("dates", "newest"),
    [
        (["2014-03-07", "2009-12-31", "2014-03-10", "2014-02-28"], [2, 0, 3]),
        (["2014-3-7", "2009-12-31", "2014-3-10", "2014-2-28"], [2, 0, 3]),  # no order of strings
        ([2014, 1999, 2021, 2001], [2, 0, 3]),
        (["2014-03", "2013-12", "2014-11", "2014-02"], [2, 0, 3]),
        (["2014-03", 2013, "2014-03-01", "2014"], [2, 0, 3]),
        (["2014-03-07T08:00", "2014-03-07 07:59", "2015/01/01", "2014-03-07"], [2, 0, 1]),
        (["2014", None, "2015", "unknown"], [2, 0, 3]),  # what tells no time is the oldest
    ],
)
def test_recency_goes_by_date(dates: list[object], newest: list[int]):
    profile = [item(date=date) for date in dates]
    assert recency(TASK, asked("", profile), 3) == newest


def test_recency_without_dates_goes_by_place():
    profile = [item() for _ in range(4)]
    assert recency(TASK, asked("", profile), 2) == [3, 2]
    assert recency(TASK, asked("", profile), 9) == [3, 2, 1, 0]
    # A date that only some items have orders nothing.
    profile[0]["date"] = "2030-01-01"
    assert recency(TASK, asked("", profile), 2) == [3, 2]
    assert recency(TASK, asked("", []), 2) == []


def test_random_items_are_the_same_each_time_and_all_can_come():
    profile = [item() for _ in range(6)]
    first = {input: random(TASK, asked(input, profile), 2) for input in map(str, range(60))}
    assert all(random(TASK, asked(input, profile), 2) == found for input, found in first.items())
    assert all(len(found) == 2 and found[0] != found[1] for found in first.values())
    assert {found[0] for found in first.values()} == set(range(6))
    assert sorted(random(TASK, asked("x", profile), 9)) == list(range(6))
    assert random(TASK, asked("x", []), 2) == []


class AxisEncoder:
    """A text's vector is 1 at the digit in it; a query's, at the digit after the one in it."""

    size, fingerprint = 10, "axis"

    def encode(self, texts: list[str], *batching: object, queries: bool = False) -> np.ndarray:
        digits = [int(re.search(r"\d", text).group()) for text in texts]
        return np.eye(10, dtype=np.float32)[np.array(digits) + queries]


def test_dense_takes_the_nearest_by_the_encoders_query(tmp_path: Path):
    profile = [item(str(i)) for i in (1, 4, 5, 8, 5)]
    store = HistoryStore(tmp_path, AxisEncoder())
    store.add([(asked("", profile).owner, [TASK.item_text(each) for each in profile])])
    dense = Dense(store, newest=9, labels=True)
    four, three = (asked(f"{INSTRUCTION}{number}", profile) for number in (4, 3))
    nobody = asked(four.input, [])
    assert list(dense(TASK, [four, nobody, three], 2)) == [[2, 4], [], [1, 0]]
    assert list(dense(TASK, [four], 9)) == [[2, 4, 0, 1, 3]]
    store.add([(four.owner, [TASK.item_text(each) for each in profile[-2:]])])
    assert list(Dense(store, newest=2, labels=True)(TASK, [four], 9)) == [[4, 3]]


def words(n: int, word: str = "w") -> str:
    return " ".join([word] * n)


def test_the_prompt_is_lamps():
    items = [item("On Cats", "Cats sleep."), item('{x} "quoted" %s', "Braces {abstract} stay \\n.")]
    prompt = demonstration_prompt(TASK, f"{INSTRUCTION}Dogs {{y}}.", items, WordTokenizer(), 256)
    assert prompt == (
        '"On Cats" is a title for "Cats sleep." , and '
        '"{x} "quoted" %s" is a title for "Braces {abstract} stay \\n." '
        ". Following the given patterns "
        "Generate a title for the following abstract of a paper: Dogs {y}."
    )


def test_without_items_the_input_stands_alone():
    assert demonstration_prompt(TASK, "input", [], WordTokenizer(), 256) == "input"


# With one word a title, a demonstration without its abstract is 6 words long ('"t" is a title for
# ""'), the words behind the demonstrations are 5 ('. Following the given patterns'), and those
# between two of them 2 (', and').


def test_the_shares_are_equal():
    # 100 - 10 of the input - 5 - 2 = 83: 41 each, 35 of them for the abstract.
    items = [item("t", words(99, "one")), item("t", words(99, "two"))]
    prompt = demonstration_prompt(TASK, words(10), items, WordTokenizer(), 100)
    assert (prompt.count("one"), prompt.count("two")) == (35, 35)


def test_what_one_leaves_the_next_may_use():
    items = [item("t", words(5, "one")), item("t", words(99, "two"))]
    prompt = demonstration_prompt(TASK, words(10), items, WordTokenizer(), 100)
    assert (prompt.count("one"), prompt.count("two")) == (5, 65)


def test_a_title_too_long_for_its_share_shrinks_the_inputs():
    # 100 - 60 of the input - 5 - 2 = 33: 16 each, and the first title alone needs 20. With 50%
    # for the input 43: 21 each, 1 for the abstract; the second has 21 - 6.
    items = [item(words(15), words(9, "one")), item("t", words(99, "two"))]
    prompt = demonstration_prompt(TASK, words(70), items, WordTokenizer(), 100)
    assert (prompt.count("one"), prompt.count("two")) == (1, 15)
    assert prompt.endswith(words(70))


def test_a_long_input_counts_at_most_60_percent():
    items = [item("t", words(99, "one"))]
    prompt = demonstration_prompt(TASK, words(500), items, WordTokenizer(), 100)
    assert prompt.count("one") == 100 - 60 - 5 - 6
    assert prompt.endswith(words(500))


def test_without_room_the_input_stands_alone():
    items = [item("t", "abstract")] * 3
    # The three need 3 * 6, the words behind them 5, and those between them 4.
    assert demonstration_prompt(TASK, words(10), items, WordTokenizer(), 26) == words(10)
    assert demonstration_prompt(TASK, words(10), items, WordTokenizer(), 27) != words(10)


@pytest.fixture(scope="session")
def tokenizer(tiny_llama: Path) -> transformers.PreTrainedTokenizerBase:
    return transformers.AutoTokenizer.from_pretrained(tiny_llama)


# What a token count may stumble over: characters of several bytes, a special token in a text,
# quotes and blanks that grow together with those around them.
PIECES = ["the ", "model", "é", "😀", "</s>", '"', ", and ", "{title}", " ", "\n", "...", "1234"]


def text_of(max_size: int) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(PIECES), max_size=max_size).map("".join)


@settings(max_examples=200, deadline=None)
@given(
    text_of(12),
    st.lists(st.builds(item, text_of(5), text_of(30)), max_size=4),
    st.integers(10, 250),
)
def test_the_budget_is_kept(
    tokenizer: transformers.PreTrainedTokenizerBase, input: str, items: list[Item], max_length: int
):
    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))

    prompt = demonstration_prompt(TASK, input, items, tokenizer, max_length)
    assert prompt.endswith(input)
    if prompt != input:
        assert count(prompt) - count(input) <= max_length


@settings(deadline=None)
@example("t", "😀" * 30, 100)  # four tokens each: at most one of these two cuts between them
@example("t", "😀" * 30, 101)
@example("</s> é", "😀 the {title} </s>" * 9, 400)
@given(text_of(5), text_of(30), st.integers(10, 400))
def test_what_is_shown_is_the_items_own_text(
    tokenizer: transformers.PreTrainedTokenizerBase, title: str, abstract: str, max_length: int
):
    each = item(title, abstract)
    prompt = demonstration_prompt(TASK, "input", [each], tokenizer, max_length)
    if prompt != "input":
        start = TASK.demonstration(item(title))[:-2]
        end = TASK.demonstration_prompt(['" '], "input")
        assert prompt.startswith(start)
        assert prompt.endswith(end)
        assert abstract.startswith(prompt[len(start) : -len(end)])
    if max_length == 400:
        assert TASK.demonstration(each) in prompt


def test_answers_stand_behind_the_input_with_the_nearest_last():
    items = [item("nearest", "a"), item("two\n lines", "b"), item("", "c"), item("last", "d")]
    prompt = answers_prompt(TASK, "input", items, WordTokenizer(), 60)
    assert prompt == f"input{OWN_ANSWERS}\n- last\n- two lines\n- nearest"
    for nothing in ([], [item("", "c")]):
        assert answers_prompt(TASK, "input", nothing, WordTokenizer(), 60) == "input"


def test_answers_share_what_the_input_leaves():
    # 50 - 30 of the input - 5 that introduce them = 15: 7 each, one of them the bullet.
    items = [item(words(9, "one")), item(words(9, "two"))]
    prompt = answers_prompt(TASK, words(99), items, WordTokenizer(), 50)
    assert (prompt.count("one"), prompt.count("two")) == (6, 6)
    assert len(prompt.split()) == 50
    # The input takes what short ones leave.
    prompt = answers_prompt(TASK, words(99), [item("one")], WordTokenizer(), 50)
    assert len(prompt.split()) == 50


@settings(max_examples=200, deadline=None)
@given(
    text_of(40), st.lists(st.builds(item, text_of(9), text_of(3)), max_size=4), st.integers(20, 250)
)
def test_answers_keep_the_budget(
    tokenizer: transformers.PreTrainedTokenizerBase, input: str, items: list[Item], max_length: int
):
    prompt = answers_prompt(TASK, input, items, tokenizer, max_length)
    if prompt != input:
        # Texts that are cut may grow by a token where they meet.
        tokens = tokenizer.encode(prompt, add_special_tokens=False, split_special_tokens=True)
        assert len(tokens) <= max_length + len(items) + 1
        assert input.startswith(prompt[: prompt.index(OWN_ANSWERS)])
