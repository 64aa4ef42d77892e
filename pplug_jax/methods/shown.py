"""Make a method's examples: what each shows the LLM of its user."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pplug_jax.data.lamp import Example, Item
from pplug_jax.data.tasks import Task
from pplug_jax.feed.batches import Tokenized
from pplug_jax.feed.retrieval import answers_prompt, demonstration_prompt, retrievers
from pplug_jax.feed.store import HistoryStore
from pplug_jax.llm.prompts import Tokenizer
from pplug_jax.methods.table import Method
from pplug_jax.methods.users import strangers
from pplug_jax.plugs.registry import PLUGS
from pplug_jax.settings import Settings

AT_ONCE = 256  # examples whose items are retrieved together: their inputs are encoded in batches


class Layout(NamedTuple):
    """How a method's examples are tokenised.

    Attributes:
        behind: the soft tokens stand behind the input.
        encoded: the plug reads the queries' vectors, as it does not train Enc_inp.
        features: the features of the items that the plug reads.
    """

    behind: bool = False
    encoded: bool = False
    features: tuple[str, ...] = ()


PLAIN = Layout()


def layout_of(method: Method, config: Settings) -> Layout:
    """Return the layout of a method's examples.

    Args:
        method: the method.
        config: the method's config (`table.configured`).
    """
    if not method.plug:
        return PLAIN
    kind = PLUGS[method.kind]
    soft = kind.soft_tokens(config, method.reading)
    weighs = kind.reads_input and not method.reading.uniform
    encoded = weighs and not kind.trains_encoder(config)
    return Layout(config.plug.place == "behind" and soft > 0, encoded, kind.features(config))


def shown(
    task: Task,
    tokenizer: Tokenizer,
    store: HistoryStore,
    method: Method,
    config: Settings,
    examples: Iterable[Example],
    tokenized: Sequence[Tokenized],
) -> list[Tokenized]:
    """Return the examples with what the method shows: demonstrations, a history, or neither.

    Args:
        task: the examples' task.
        tokenizer: the LLM's tokenizer.
        store: the history store.
        method: the method.
        config: the method's config (`table.configured`).
        examples: the examples, iterated once.
        tokenized: the same examples, tokenised.
    """
    reads = method.plug and PLUGS[method.kind].reads_input
    readers: Sequence[int | None]
    if method.history == "another":
        readers = strangers([arrays.history.texts for arrays in tokenized], config.seed)
        if method.retrieval:
            examples = with_profiles_of(list(examples), readers)
    elif not reads or method.history == "none":
        readers = [None] * len(tokenized)
    else:
        readers = range(len(tokenized))
    prompts: Iterator[tuple[np.ndarray, list[int]]] = ((arrays.prompt, []) for arrays in tokenized)
    if method.retrieval:
        prompts = _prompts(task, tokenizer, store, method, config, examples)
    return [
        arrays._replace(prompt=prompt, shown=places).with_history_of(
            None if i is None else tokenized[i]
        )
        for arrays, (prompt, places), i in zip(tokenized, prompts, readers, strict=True)
    ]


def with_profiles_of(
    examples: Sequence[Example], others: Iterable[int | None]
) -> Iterator[Example]:
    """Yield each example with the profile of another one, or with an empty one for None."""
    for example, i in zip(examples, others, strict=True):
        if i is None:
            yield dataclasses.replace(example, profile=())
        else:
            user, profile = examples[i].user, examples[i].profile
            yield dataclasses.replace(example, user=user, profile=profile)


def _prompts(
    task: Task,
    tokenizer: Tokenizer,
    store: HistoryStore,
    method: Method,
    config: Settings,
    examples: Iterable[Example],
) -> Iterator[tuple[np.ndarray, list[int]]]:
    """Yield the tokens of each example's input with the items that the method shows, and these."""
    data, behind = config.data, layout_of(method, config).behind
    retrieve = retrievers(store, data.max_history, data.history_labels)[method.retrieval or ""]
    left = iter(examples)
    while together := list(itertools.islice(left, AT_ONCE)):
        retrieved = retrieve(task, together, top_k(method, config))
        for example, places in zip(together, retrieved, strict=True):
            if method.answers:
                places = [i for i in places if example.profile[i][task.answer].strip()]
            items = [example.profile[i] for i in places]
            prompt = in_words(task, tokenizer, method, config, example.input, items)
            in_prompt = [] if prompt == example.input else places  # there may be no room
            yield tokenizer.prompt(prompt, data.max_input_length, behind), in_prompt


def top_k(method: Method, config: Settings) -> int:
    """Return how many items the method shows."""
    return method.top_k or config.eval.top_k


def in_words(
    task: Task,
    tokenizer: Tokenizer,
    method: Method,
    config: Settings,
    input: str,
    items: Sequence[Item],
) -> str:
    """Return an input with the items that the method shows, which its retriever chose."""
    prompt_of = answers_prompt if method.answers else demonstration_prompt
    return prompt_of(task, input, items, tokenizer.tokenizer, config.data.max_input_length)
