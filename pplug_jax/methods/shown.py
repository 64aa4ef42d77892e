"""Make a method's examples: what each shows the LLM of its user."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pplug_jax.data.lamp import Example
from pplug_jax.data.tasks import Task
from pplug_jax.feed.batches import Tokenized
from pplug_jax.feed.retrieval import answers_prompt, demonstration_prompt, retrievers
from pplug_jax.feed.store import HistoryStore
from pplug_jax.llm.prompts import Tokenizer
from pplug_jax.methods.table import Method
from pplug_jax.methods.users import strangers
from pplug_jax.plugs.registry import PLUGS
from pplug_jax.settings import Settings


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
    length, behind = config.data.max_input_length, layout_of(method, config).behind
    if method.retrieval:
        data = config.data
        retrieve = retrievers(store, data.max_history, data.history_labels)[method.retrieval]
        top_k = method.top_k or config.eval.top_k
        prompt_of = answers_prompt if method.answers else demonstration_prompt
        prompts = (
            prompt_of(
                task,
                example.input,
                retrieve(task, example, top_k),
                tokenizer.tokenizer,
                length,
            )
            for example in examples
        )
        tokenized = [
            arrays._replace(prompt=tokenizer.prompt(prompt, length, behind))
            for arrays, prompt in zip(tokenized, prompts, strict=True)
        ]
    reads = method.plug and PLUGS[method.kind].reads_input
    readers: Sequence[int | None]
    if not reads or method.history == "none":
        readers = [None] * len(tokenized)
    elif method.history == "another":
        readers = strangers([arrays.history.texts for arrays in tokenized], config.seed)
    else:
        readers = range(len(tokenized))
    return [
        arrays.with_history_of(None if i is None else tokenized[i])
        for arrays, i in zip(tokenized, readers, strict=True)
    ]
