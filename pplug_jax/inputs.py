"""What a method's examples show of the user, and a user's own items as examples."""

import dataclasses
import functools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

import ml_collections
import numpy as np

from pplug_jax.data.batches import Tokenized
from pplug_jax.data.lamp import Example
from pplug_jax.data.peers import Peers
from pplug_jax.data.retrieval import demonstration_prompt, retrievers
from pplug_jax.data.tasks import Task
from pplug_jax.methods import METHODS, Method, configured, strangers
from pplug_jax.models import Models


def shown(
    models: Models,
    method: Method,
    config: ml_collections.ConfigDict,
    examples: Iterable[Example],
    tokenized: Sequence[Tokenized],
) -> list[Tokenized]:
    """The examples with what the method shows of the user: demonstrations, a history, or none."""
    tokenizer, length = models.tokenizer, config.data.max_input_length
    if method.retrieval:
        retrieve = retrievers(models.store, config.data.history_labels)[method.retrieval]
        top_k = method.top_k or config.eval.top_k
        prompts = (
            demonstration_prompt(
                models.task,
                example.input,
                retrieve(models.task, example.input, example.profile, top_k),
                tokenizer.tokenizer,
                length,
            )
            for example in examples
        )
        tokenized = [
            each._replace(prompt=tokenizer.prompt(prompt, length))
            for each, prompt in zip(tokenized, prompts, strict=True)
        ]
    if not method.plug or method.history == "none":
        readers = [None] * len(tokenized)
    elif method.history == "another":
        readers = strangers([each.rows for each in tokenized], config.seed)
    else:
        readers = range(len(tokenized))
    return [
        each.with_history_of(None if i is None else tokenized[i])
        for each, i in zip(tokenized, readers, strict=True)
    ]


class SameUser:
    """Which of some histories, each (n,) int rows of the store, are the user's whose one is given.

    Two histories are taken for one user's where they share half of the shorter one's texts: files
    need not name users, and co-authors share some.
    """

    def __init__(self, histories: Sequence[np.ndarray]):
        self.sizes, self.whose = [], defaultdict(list)
        for i, rows in enumerate(histories):
            own = set(rows.tolist())
            self.sizes.append(len(own))
            for row in own:
                self.whose[row].append(i)

    def __call__(self, rows: np.ndarray) -> set[int]:
        own = set(rows.tolist())
        shared = Counter(i for row in own for i in self.whose.get(row, ()))
        return {i for i, count in shared.items() if 2 * count >= min(len(own), self.sizes[i])}


def unseen(train: Sequence[np.ndarray], held_out: Sequence[np.ndarray]) -> list[int]:
    """The training examples whose users are not held out; arguments are rows of histories."""
    held = SameUser(held_out)
    return [i for i, rows in enumerate(train) if not held(rows)]


def split_users(
    histories: Sequence[np.ndarray], share: float, seed: int
) -> tuple[list[int], list[int]]:
    """Examples to train on, and about a `share` that is held out, of users who have no others."""
    same, held = SameUser(histories), set()
    for i in np.random.default_rng(seed).permutation(len(histories)).tolist():
        if len(held) >= share * len(histories):
            break
        held |= {i} | same(histories[i])
    rest = [i for i in range(len(histories)) if i not in held]
    kept = unseen([histories[i] for i in rest], [histories[i] for i in held])
    return [rest[i] for i in kept], sorted(held)


def own_items(task: Task, example: Example) -> Iterator[Example]:
    """Each item of the user's as an example, whose history is all the others."""
    for i, item in enumerate(example.profile):
        if item[task.answer].strip():
            input, target = task.own_example(item)
            rest = tuple(other for other in example.profile if other != item)
            yield Example(f"{example.id}/{i}", input, target, rest, example.user)


@dataclasses.dataclass(frozen=True)
class Subset(Sequence[Example]):
    """Some of the examples, read when they are asked for."""

    examples: Sequence[Example]
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Example:
        return self.examples[self.indices[i]]


@dataclasses.dataclass(frozen=True)
class WithOwnItems:
    """The examples, and behind them up to `count` more from each user's items; read each time."""

    task: Task
    examples: Sequence[Example]
    count: int
    seed: int

    def __iter__(self) -> Iterator[Example]:
        yield from self.examples
        for i, example in enumerate(self.examples if self.count else ()):
            items = list(own_items(self.task, example))
            rng = np.random.default_rng((self.seed, i))
            yield from (items[place] for place in rng.permutation(len(items))[: self.count])


class TrainingInputs:
    """Training examples as each method is trained on them; tokenised once for all.

    examples: without those that `config.train.validation` holds out. held_out: these, of other
    users.
    """

    def __init__(self, models: Models, examples: Sequence[Example]):
        self.models, self.examples = models, examples
        self.held_out: Sequence[Example] = ()
        if share := models.config.train.validation:
            rows = models.history_rows(examples)
            kept, held_out = split_users(rows, share, models.config.seed)
            self.examples, self.held_out = Subset(examples, kept), Subset(examples, held_out)
        self.tokenized = functools.cache(lambda own: models.tokenize(self._with_own_items(own)))
        self.tokenized_held_out = functools.cache(lambda: models.tokenize(self.held_out))

    def _with_own_items(self, count: int) -> WithOwnItems:
        return WithOwnItems(self.models.task, self.examples, count, self.models.config.seed)

    def save_peers(self) -> None:
        """Writes the pool of peers, where a method of the config asks for them.

        It holds every training user's items, whatever a method shows of them.
        """
        config = self.models.config
        methods = (METHODS[name] for name in config.methods)
        if any(configured(config, method, 0).plug.difference for method in methods if method.plug):
            rows = self.models.history_rows(self.examples)
            Peers.of(self.models.store, rows).save(self.models.workdir)

    def __call__(self, method: Method, config: ml_collections.ConfigDict) -> list[Tokenized]:
        own = config.train.own_items
        return shown(self.models, method, config, self._with_own_items(own), self.tokenized(own))

    def validation(self, method: Method, config: ml_collections.ConfigDict) -> list[Tokenized]:
        """The examples that are held out, as the method shows them."""
        return shown(self.models, method, config, self.held_out, self.tokenized_held_out())
