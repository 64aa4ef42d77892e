"""Make the training examples of each method."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np

from pplug_jax.data.lamp import Example, Subset
from pplug_jax.data.tasks import Task
from pplug_jax.feed.batches import Tokenized
from pplug_jax.feed.features import compare_with_peers
from pplug_jax.feed.peers import Peers
from pplug_jax.methods.shown import layout_of, shown
from pplug_jax.methods.table import Method, asked_for, configured
from pplug_jax.methods.users import own_items, split_users
from pplug_jax.plugs.registry import PLUGS
from pplug_jax.session import Models
from pplug_jax.session.inputs import histories, tokenize
from pplug_jax.settings import Settings


@dataclasses.dataclass(frozen=True)
class WithOwnItems:
    """The examples, then up to `count` more from each user's items; computed at each pass."""

    task: Task
    examples: Sequence[Example]
    count: int
    seed: int
    newest: int  # of a user's items

    def __iter__(self) -> Iterator[Example]:
        yield from self.examples
        for i, example in enumerate(self.examples if self.count else ()):
            items = list(own_items(self.task, example, self.newest))
            rng = np.random.default_rng((self.seed, i))
            yield from (items[place] for place in rng.permutation(len(items))[: self.count])


class TrainingInputs:
    """A function from a method and its config to training examples, which are tokenised only once.

    Attributes:
        models: the run's models.
        examples: the examples to train on, without those that `config.train.validation` holds out.
        held_out: the held-out examples, which are of other users.
    """

    def __init__(self, models: Models, examples: Sequence[Example]):
        self.models, self.examples = models, examples
        self._shown = functools.partial(shown, models.task, models.tokenizer, models.store)
        self.held_out: Sequence[Example] = ()
        if share := models.config.train.validation:
            texts = [history.texts for history in histories(models, examples)]
            kept, held_out = split_users(texts, share, models.config.seed)
            self.examples, self.held_out = Subset(examples, kept), Subset(examples, held_out)
        self.tokenized = functools.cache(
            lambda count, layout: tokenize(models, self._with_own_items(count), layout)
        )
        self.tokenized_held_out = functools.cache(
            lambda layout: tokenize(models, self.held_out, layout)
        )

    def _with_own_items(self, count: int) -> WithOwnItems:
        config = self.models.config
        newest = config.data.max_history
        return WithOwnItems(self.models.task, self.examples, count, config.seed, newest)

    def save_peers(self) -> None:
        """Write the pool of peers, if a method of the config needs it.

        The pool holds every training user's items, whatever a method shows of them.
        """
        config = self.models.config
        read = (
            PLUGS[method.kind].features(configured(config, method, 0))
            for method in asked_for(config)
            if method.plug
        )
        if any(map(compare_with_peers, read)):
            pool = Peers.of(self.models.store, histories(self.models, self.examples))
            pool.save(self.models.workdir)

    def __call__(self, method: Method, config: Settings) -> list[Tokenized]:
        count, layout = config.train.own_items, layout_of(method, config)
        tokenized = self.tokenized(count, layout)
        found = self._shown(method, config, self._with_own_items(count), tokenized)
        # Whose turn it is does not depend on the step: a prompt that changed would be read anew.
        drawn = np.random.default_rng(config.seed).random(len(found))
        return [
            plain.with_history_of(None) if draw < config.plug.persona_dropout else each
            for plain, each, draw in zip(tokenized, found, drawn, strict=True)
        ]

    def validation(self, method: Method, config: Settings) -> list[Tokenized]:
        """Return the held-out examples, as the method shows them."""
        tokenized = self.tokenized_held_out(layout_of(method, config))
        return self._shown(method, config, self.held_out, tokenized)
