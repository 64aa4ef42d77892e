"""People as the server knows them: their stored histories made into soft tokens."""

import hashlib
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pplug_jax.data.lamp import Item, check_history, check_input
from pplug_jax.errors import InputError
from pplug_jax.serve.batcher import Batcher
from pplug_jax.serve.metrics import Metrics
from pplug_jax.serve.personalizer import Personal, Personalizer
from pplug_jax.serve.store import Store, StoredItem, StoreUnavailable, UnknownPersona

AT_ONCE = 64  # items that are encoded at a time in the background
PAUSE = 5.0  # seconds between two looks for items that other servers were given


class Persona(NamedTuple):
    """What a plug makes of somebody for one input.

    Attributes:
        made: the prompt, the soft tokens and the weights of the items.
        known: whether there is such a persona; otherwise these are the null persona's.
        items: the ids of the items that were read, the oldest first.
    """

    made: Personal
    known: bool
    items: list[str]


class People:
    """The personas of a store, as a trained plug reads them.

    A thread encodes what was added, so that a request seldom must.

    Args:
        personalizer: the plug and its models.
        store: the histories.
        metrics: what is counted.
    """

    def __init__(self, personalizer: Personalizer, store: Store, metrics: Metrics):
        self.personalizer, self.store, self.metrics = personalizer, store, metrics
        models, data = personalizer.models, personalizer.models.config.data
        # An item's vector depends on the text that is made of it too.
        form = hashlib.sha256(f"{models.task.name} {data.history_labels}".encode()).hexdigest()[:8]
        self.encoder = f"{models.encoder.fingerprint}-{form}"
        self._encode_items = Batcher(personalizer.encode_items)
        self._encode_inputs = Batcher(personalizer.encode_inputs)
        self._news, self._ending = threading.Event(), False
        self._thread = threading.Thread(target=self._encode_new, name="encoder", daemon=True)
        self._thread.start()

    def check(self, items: Any) -> list[Item]:
        """Return items that are as the plug's task has them.

        Raises:
            InputError: one is not; the message names its place and field.
        """
        checked = check_history(self.personalizer.models.task, items, sort_by_date=False)
        for i, item in enumerate(checked):
            if isinstance(item, str):
                raise InputError(f"history item {i}: expected an object, found str")
        return list(items)

    def persona(self, tenant: int, name: str | None, input: str) -> Persona:
        """Return what the plug makes of a persona for an input; of nobody's, the null persona's.

        Raises:
            InputError: the input is no text.
            StoreUnavailable: the store does not answer.
        """
        check_input(input)
        known, stored = name is not None, list[StoredItem]()
        with self.metrics.store_seconds.time():
            try:
                if name is not None:
                    stored = self._newest(tenant, name)
            except UnknownPersona:
                known = False
        items, vectors = [row.item for row in stored], self._vectors(stored)
        with self.metrics.persona_seconds.time():
            asked = self._encode_inputs([input])[0]
            made = self.personalizer.personal(input, asked, items, vectors)
        self.metrics.history_items.observe(len(items))
        return Persona(made, known, [item["id"] for item in items])

    def _newest(self, tenant: int, name: str) -> list[StoredItem]:
        data = self.personalizer.models.config.data
        by_date = data.sort_by_date
        return self.store.newest(tenant, name, data.max_history, self.encoder, by_date=by_date)

    def _vectors(self, stored: Sequence[StoredItem]) -> np.ndarray:
        """Return the items' vectors, (n, E) float16, and keep those that were lacking."""
        new = {i: row for i, row in enumerate(stored) if row.vector is None}
        made = self._encoded(list(new.values())) if new else ()
        places = {i: at for at, i in enumerate(new)}
        size = self.personalizer.models.encoder.size
        rows = [made[places[i]] if i in new else row.vector for i, row in enumerate(stored)]
        return np.array(rows, np.float16).reshape(len(stored), size)

    def _encoded(self, items: Sequence[StoredItem]) -> np.ndarray:
        vectors = self._encode_items(self.personalizer.item_texts([row.item for row in items]))
        self.store.put_vectors(self.encoder, items, vectors)
        self.metrics.encode_items.inc(len(items))
        return vectors

    def added(self) -> None:
        """Have what was added encoded."""
        self._news.set()

    def _encode_new(self) -> None:
        while not self._ending:
            self._news.wait(PAUSE)
            self._news.clear()
            try:
                while not self._ending and (new := self.store.lacking(self.encoder, AT_ONCE)):
                    self._encoded(new)
            except StoreUnavailable:
                continue  # the next look may find it back
            except InputError:  # another task's items are in this store
                self._ending = True

    def close(self) -> None:
        self._ending = True
        self._news.set()
        self._thread.join()
