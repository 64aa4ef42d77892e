"""Choose the profile items that a prompt shows, and show them as LaMP's demonstrations."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import transformers

from pplug_jax.data.keys import text_key
from pplug_jax.data.lamp import Example, Item, places_by_date
from pplug_jax.data.tasks import Task
from pplug_jax.feed.batches import history_texts
from pplug_jax.feed.store import History, HistoryStore

OWN_ANSWERS = "\n\nThe same person wrote before:"
BULLET = "\n- "


def bm25(task: Task, example: Example, top_k: int) -> list[int]:
    """Return the places of the items nearest to the input by BM25, best first, equals in order.

    k1 1.5, b 0.75 and words split at white space are LaMP's. The idf is bm25s' (Lucene's), which
    never falls below 0, where LaMP's rank_bm25 floors the idf of words that most items have.
    """
    import bm25s  # importing it takes hold of the devices, before several processes could meet

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it reports every index it builds
    profile = example.profile
    corpus = [task.document_text(item).split() for item in profile]
    query = task.retrieval_text(example.input).split()
    if not any(corpus) or not query:
        return list(range(len(profile)))[:top_k]
    index = bm25s.BM25(k1=1.5, b=0.75)
    index.index(corpus, show_progress=False)
    return _best(index.get_scores(query), top_k)


def recency(task: Task, example: Example, top_k: int) -> list[int]:
    """Return the places of the newest items, newest first.

    Items are ordered by `date` if all have one, else by place, since LaMP's lists end with the
    newest.
    """
    del task
    return places_by_date(example.profile)[::-1][:top_k]


def random(task: Task, example: Example, top_k: int) -> list[int]:
    """Return the places of random items, each at most once; equal inputs get equal ones."""
    del task
    rng = np.random.default_rng(list(text_key(example.input)))
    return rng.permutation(len(example.profile))[:top_k].tolist()


@dataclasses.dataclass(frozen=True)
class Dense:
    """A retriever by the cosine of the history encoder's vectors, best first.

    LaMP's Contriever compares un-normalised vectors of texts without labels.

    Attributes:
        store: the history store.
        newest: how many of a profile's items the store holds, and this retrieves among.
        labels: whether the store holds the items with their labels.
    """

    store: HistoryStore
    newest: int
    labels: bool

    def __call__(self, task: Task, examples: Sequence[Example], top_k: int) -> Iterator[list[int]]:
        inputs = [task.retrieval_text(example.input) for example in examples]
        queries = self.store.encoder.encode(inputs, queries=True)
        for example, query in zip(examples, queries, strict=True):
            history = History.of(*history_texts(task, example, self.newest, self.labels))
            older = max(0, len(example.profile) - self.newest)
            yield [older + i for i in nearest(self.store.vectors(history), query, top_k)]


def nearest(vectors: np.ndarray, query: np.ndarray, top_k: int) -> list[int]:
    """Return the places of the vectors (n, E) that are nearest to the query's (E,), best first."""
    return _best(vectors @ query, top_k)


def _best(scores: np.ndarray, top_k: int) -> list[int]:
    return np.argsort(-scores, kind="stable")[:top_k].tolist()


Retriever = Callable[[Task, Sequence[Example], int], Iterator[list[int]]]


def retrievers(store: HistoryStore, newest: int, labels: bool) -> dict[str, Retriever]:
    """Return all retrievers by name; each yields the places of up to `top_k` items of a profile."""

    def each(retrieve: Callable[[Task, Example, int], list[int]]) -> Retriever:
        return lambda task, examples, top_k: (
            retrieve(task, example, top_k) for example in examples
        )

    return {
        "bm25": each(bm25),
        "recency": each(recency),
        "random": each(random),
        "dense": Dense(store, newest, labels),
    }


def demonstration_prompt(
    task: Task,
    input: str,
    items: Sequence[Item],
    tokenizer: transformers.PreTrainedTokenizerBase,
    max_length: int,
) -> str:
    """Return the input behind `items` as demonstrations, in LaMP's format and by its token budget.

    The input may take up to 60% of `max_length` tokens. Each demonstration gets an equal share of
    the rest; the next one may use what it leaves. If a demonstration does not fit although its text
    is cut to nothing, the input's part shrinks by another 10%, by which its end is then cut. If no
    part is left, the bare input is returned.

    Args:
        task: says how demonstrations look.
        input: the example's input.
        items: the items to show.
        tokenizer: counts and cuts tokens.
        max_length: the budget in tokens.
    """

    if not items:
        return input
    encode = functools.partial(_encode, tokenizer)
    frame = task.prompt.format(demonstrations="", input="", before="", after="")
    fixed = len(encode(frame)) + len(encode(task.joint)) * (len(items) - 1)
    costs = [len(encode(task.demonstration(item | {task.cut: ""}))) for item in items]
    texts = [encode(item[task.cut]) for item in items]
    input_length = len(encode(input))

    def fit(share: int) -> list[int] | None:
        """Return how many tokens of each text fit, or None if a demonstration does not."""
        lengths, room = [], 0
        for cost, text in zip(costs, texts, strict=True):
            room += share - cost
            if room < 0:
                return None
            lengths.append(min(len(text), room))
            room -= lengths[-1]
        return lengths

    for tenths in range(6, -1, -1):
        left = max_length - min(input_length, int(tenths / 10 * max_length)) - fixed
        if lengths := fit(left // len(items)):
            break
    else:
        return input
    shown = []
    for item, text, length in zip(items, texts, lengths, strict=True):
        if length < len(text):
            item = item | {task.cut: _decode(tokenizer, text[:length])}
        shown.append(task.demonstration(item))
    return task.demonstration_prompt(shown, input)


def answers_prompt(
    task: Task,
    input: str,
    items: Sequence[Item],
    tokenizer: transformers.PreTrainedTokenizerBase,
    max_length: int,
) -> str:
    """Return the input and, behind it, what the items' answers are, the first item's last.

    The input may take up to 60% of `max_length` tokens, as in `demonstration_prompt`, or what the
    answers leave. Each answer is cut to an equal share of the rest; if no part of it is left, the
    bare input is returned.

    Args:
        task: says which field of an item is its answer.
        input: the example's input.
        items: the items to show, the nearest first.
        tokenizer: counts and cuts tokens.
        max_length: the budget in tokens.
    """

    def cut(text: str, length: int) -> str:
        tokens = encode(text)
        return text if len(tokens) <= length else _decode(tokenizer, tokens[:length])

    encode = functools.partial(_encode, tokenizer)
    texts = [" ".join(item[task.answer].split()) for item in reversed(items)]
    lines = [BULLET + text for text in texts if text]
    if not lines:
        return input
    least = min(len(encode(input)), int(0.6 * max_length))
    share = (max_length - least - len(encode(OWN_ANSWERS))) // len(lines)
    if share <= len(encode(BULLET)):
        return input
    shown = OWN_ANSWERS + "".join(cut(line, share) for line in lines)
    return cut(input, max_length - len(encode(shown))) + shown


def _encode(tokenizer: transformers.PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.encode(
        text, add_special_tokens=False, split_special_tokens=True, verbose=False
    )


def _decode(tokenizer: transformers.PreTrainedTokenizerBase, tokens: list[int]) -> str:
    # A character cut in two would be read as several tokens again.
    return str(tokenizer.decode(tokens)).rstrip("\ufffd")
