"""Tell users apart by their histories, and turn a user's items into examples."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from pplug_jax.data.lamp import Example
from pplug_jax.data.tasks import Task


def strangers(histories: Sequence[np.ndarray], seed: int) -> list[int | None]:
    """Choose for each example another whose history shares no text with it.

    Args:
        histories: (n,) int for each example, the keys of its history's texts.
        seed: of the choice.

    Returns:
        the other's place, as `first_stranger`.
    """
    # A random cycle over the examples gives everyone another's history. One user may have several
    # examples, with histories of different times, and the files may not say whose they are: so the
    # cycle is walked on to the next history that has no text in common.
    cycle = np.random.default_rng(seed).permutation(len(histories))
    place = {example: i for i, example in enumerate(cycle)}
    chosen = []
    for i in range(len(histories)):
        others = (int(cycle[(place[i] + step) % len(cycle)]) for step in range(1, len(cycle)))
        chosen.append(first_stranger(histories, i, others))
    return chosen


def first_stranger(histories: Sequence[np.ndarray], i: int, order: Iterable[int]) -> int | None:
    """Return the first in an order whose history shares no text with example `i`'s.

    Args:
        histories: as for `strangers`.
        i: the example.
        order: places of examples.

    Returns:
        None if there is none, or if the example has no history itself: another's would give it more
            than its own.
    """
    own = histories[i]
    strange = (j for j in order if len(histories[j]) and not np.isin(histories[j], own).any())
    return next(strange, None) if len(own) else None


class SameUser:
    """A function from a history to the places of all histories of the same user.

    Two histories count as one user's if they share half of the shorter one's texts: files need not
    name users, and co-authors share some.

    Args:
        histories: (n,) int each, the keys of their texts.
    """

    def __init__(self, histories: Sequence[np.ndarray]):
        self.sizes, self.whose = [], defaultdict(list)
        for i, rows in enumerate(histories):
            texts = set(rows.tolist())
            self.sizes.append(len(texts))
            for row in texts:
                self.whose[row].append(i)

    def __call__(self, rows: np.ndarray) -> set[int]:
        texts = set(rows.tolist())
        shared = Counter(i for row in texts for i in self.whose.get(row, ()))
        return {i for i, count in shared.items() if 2 * count >= min(len(texts), self.sizes[i])}


def unseen(train: Sequence[np.ndarray], held_out: Sequence[np.ndarray]) -> list[int]:
    """Return the training examples whose users are not held out.

    Args:
        train: (n,) int for each training example, the keys of its history's texts.
        held_out: the same of each held-out example.
    """
    held = SameUser(held_out)
    return [i for i, rows in enumerate(train) if not held(rows)]


def split_users(
    histories: Sequence[np.ndarray], share: float, seed: int
) -> tuple[list[int], list[int]]:
    """Split examples into those to train on and about a `share` held out, without a common user."""
    held: set[int] = set()
    same = SameUser(histories)
    for i in np.random.default_rng(seed).permutation(len(histories)).tolist():
        if len(held) >= share * len(histories):
            break
        held |= {i} | same(histories[i])
    rest = [i for i in range(len(histories)) if i not in held]
    kept = unseen([histories[i] for i in rest], [histories[i] for i in held])
    return [rest[i] for i in kept], sorted(held)


def own_items(task: Task, example: Example, newest: int) -> Iterator[Example]:
    """Yield each of the user's `newest` items as an example, whose history is the others."""
    profile, owner = example.profile[-newest:], example.owner
    for i, item in enumerate(profile):
        if item[task.answer].strip():
            input, target = task.own_example(item)
            rest = tuple(other for other in profile if other != item)
            yield Example(f"{example.id}/{i}", input, target, rest, owner)
