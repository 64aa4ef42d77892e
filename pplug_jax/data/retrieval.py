"""Which profile items a prompt shows, and how: LaMP's retrieval and demonstration form."""

import logging
import re
from collections.abc import Sequence
from typing import Any

import bm25s
import numpy as np
import transformers

from pplug_jax.data.tasks import Task

logging.getLogger("bm25s").setLevel(logging.WARNING)  # it reports every index it builds

Item = dict[str, Any]


def bm25(task: Task, input: str, profile: Sequence[Item], top_k: int) -> list[Item]:
    """The items nearest to the input by BM25, best first; of equals, the first in the profile.

    k1 1.5, b 0.75 and words split at white space are LaMP's; the idf is bm25s' (Lucene's), which
    never falls below 0, where LaMP's rank_bm25 floors the idf of words that most items have.
    """
    corpus = [task.item_text(item).split() for item in profile]
    query = task.query(input).split()
    if not any(corpus) or not query:
        return list(profile[:top_k])
    index = bm25s.BM25(k1=1.5, b=0.75)
    index.index(corpus, show_progress=False)
    best = np.argsort(-index.get_scores(query), kind="stable")
    return [profile[i] for i in best[:top_k]]


def recency(task: Task, input: str, profile: Sequence[Item], top_k: int) -> list[Item]:
    """The newest items, newest first.

    By `date` where every item has one, else by place (LaMP's lists end with the newest).
    """
    del task, input
    order = list(profile)
    if all("date" in item for item in profile):
        order.sort(key=lambda item: [int(part) for part in re.findall(r"\d+", str(item["date"]))])
    return order[::-1][:top_k]


RETRIEVERS = {"bm25": bm25, "recency": recency}


def demonstration_prompt(
    task: Task,
    input: str,
    items: Sequence[Item],
    tokenizer: transformers.PreTrainedTokenizerBase,
    max_length: int,
) -> str:
    """The input behind `items` as demonstrations, in LaMP's form and by its token budget.

    The input may take up to 60% of `max_length` tokens. Each demonstration gets an equal share of
    the rest; what one leaves unused, the next may use. Where nothing is left for any demonstration,
    the bare input is returned.
    """

    def encode(text: str) -> list[int]:
        return tokenizer.encode(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False
        )

    def count(text: str) -> int:
        return len(encode(text))

    if not items:
        return input
    frame = count(task.prompt.format(demonstrations="", input="")) + count(", and ") * (
        len(items) - 1
    )
    budget = max_length - min(count(input), int(0.6 * max_length)) - frame
    share, room = budget // len(items), 0
    shown = []
    for item in items:
        room += share
        cost = count(task.demonstration.format(**(item | {task.cut: ""})))
        if room < cost:
            continue
        text = item[task.cut]
        tokens = encode(text)
        if len(tokens) > room - cost:
            tokens = tokens[: room - cost]
            # A character cut in two would be read as several tokens again.
            text = tokenizer.decode(tokens).rstrip("\ufffd")
        room -= cost + len(tokens)
        shown.append(task.demonstration.format(**(item | {task.cut: text})))
    return task.prompt.format(demonstrations=", and ".join(shown), input=input) if shown else input
