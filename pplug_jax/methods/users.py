"""Which examples are of one user, of others, and what a user's own items are as examples."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from pplug_jax.data.lamp import Example
from pplug_jax.data.tasks import Task


def strangers(own: Sequence[np.ndarray], seed: int) -> list[int | None]:
    """For each example another one, whose history has no text in common with its own, if any.

    own: (n,) int rows of each example's own history in the history store.
    """
    # A random cycle over the examples gives everyone another's history. One user may have several
    # examples, with histories of different times, and the files may not say whose they are: so the
    # cycle is walked on to the next history that has no text in common.
    cycle = np.random.default_rng(seed).permutation(len(own))
    place = {example: i for i, example in enumerate(cycle)}
    found = []
    for i in range(len(own)):
        others = (int(cycle[(place[i] + step) % len(own)]) for step in range(1, len(own)))
        strange = (j for j in others if len(own[j]) and not np.isin(own[j], own[i]).any())
        found.append(next(strange, None))
    return found


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
    held: set[int] = set()
    same = SameUser(histories)
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
