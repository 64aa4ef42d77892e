"""Make arrays of examples by a run's tokenizer and stores."""

from collections.abc import Iterable, Sequence
from typing import Any

from pplug_jax.data.lamp import Example
from pplug_jax.feed import batches
from pplug_jax.feed.batches import Assemble, Buckets, Tokenized
from pplug_jax.feed.features import compare_with_peers
from pplug_jax.feed.store import History
from pplug_jax.llm.prompts import Place
from pplug_jax.methods.shown import PLAIN, Layout, layout_of
from pplug_jax.methods.table import Method
from pplug_jax.runtime.mesh import local_rows
from pplug_jax.session.models import Models
from pplug_jax.settings import Settings


def histories(models: Models, examples: Iterable[Example]) -> list[History]:
    """Return each example's history, as the store knows it, without tokenising anything."""
    return [History.of(*models.history_texts(example)) for example in examples]


def tokenize(
    models: Models, examples: Iterable[Example], layout: Layout = PLAIN
) -> list[Tokenized]:
    """Tokenise examples with this task, tokenizer, store and the config's lengths."""
    data = models.config.data
    return batches.tokenize(
        models.task,
        examples,
        models.tokenizer,
        models.encoder,
        max_input_length=data.max_input_length,
        max_target_length=data.max_target_length,
        max_history=data.max_history,
        history_labels=data.history_labels,
        behind=layout.behind,
        features=layout.features,
        queries=models.queries if layout.encoded else None,
    )


def place_of(models: Models, method: Method, config: Settings) -> Place:
    """Return where the method's soft tokens stand."""
    return models.tokenizer.place(layout_of(method, config).behind)


def buckets_of(
    models: Models, tokenized: Sequence[Tokenized], count: int, behind: bool = False
) -> Buckets:
    """Choose padded shapes for examples whose soft tokens stand in front, or `behind`."""
    longest_query = models.encoder.model.config.max_length
    # Behind the input a place has a backward pass beside the forward one.
    target_cost = 2 if behind else 0 if models.abstract_llm.decoder_only else 1
    return Buckets(tokenized, count, longest_query, target_cost)


def assembler(
    models: Models,
    method: Method,
    config: Settings,
    tokenized: Sequence[Tokenized],
    batch_size: int,
    **training: Any,
) -> Assemble:
    """Return the function that makes batches of the examples, as the method's plug reads them.

    Args:
        models: the run's models.
        method: the method.
        config: the method's config (`table.configured`).
        tokenized: the examples.
        batch_size: rows of the global batch.
        **training: the seed and rates of `Assemble`'s dropout.
    """
    layout = layout_of(method, config)
    return Assemble(
        tokenized,
        buckets_of(models, tokenized, config.data.buckets, layout.behind),
        models.store,
        local_rows(models.mesh, batch_size),
        features=layout.features,
        peers=models.peers if compare_with_peers(layout.features) else None,
        queries=models.queries if layout.encoded else None,
        **training,
    )
