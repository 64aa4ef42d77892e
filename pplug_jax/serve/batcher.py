"""One call of an encoder for the texts of many requests."""

import collections
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import numpy as np

MOMENT = 0.002  # seconds that the first waits for others


class Batcher:
    """An encoder that many threads may call, and that encodes what they bring together.

    Whoever comes first waits a moment for others, and then encodes for all of them. Who comes
    meanwhile is encoded next.

    Args:
        encode: returns the vectors of texts, (n, ..).
    """

    def __init__(self, encode: Callable[[Sequence[str]], np.ndarray]):
        self._encode = encode
        self._waiting: collections.deque[tuple[Sequence[str], Future[np.ndarray]]]
        self._waiting = collections.deque()
        self._turn = threading.Lock()

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Return the texts' vectors, (n, ..)."""
        made: Future[np.ndarray] = Future()
        self._waiting.append((texts, made))
        with self._turn:
            if not made.done():  # nobody took it along
                time.sleep(MOMENT)
                self._encode_waiting()
        return made.result()

    def _encode_waiting(self) -> None:
        taken = [self._waiting.popleft() for _ in range(len(self._waiting))]
        ends = np.cumsum([len(texts) for texts, _ in taken])
        try:
            vectors = self._encode([text for texts, _ in taken for text in texts])
        except BaseException as error:  # noqa: BLE001  all who wait must hear of it
            for _, made in taken:
                made.set_exception(error)
            return
        for (_, made), part in zip(taken, np.split(vectors, ends[:-1]), strict=True):
            made.set_result(part)
