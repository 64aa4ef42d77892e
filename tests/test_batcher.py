"""Texts that several threads bring together are encoded together, and come back to each."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pplug_jax.serve.batcher import Batcher


def lengths(texts: Sequence[str]) -> np.ndarray:
    if "bad" in texts:
        raise MemoryError("no room")
    return np.array([[len(text)] for text in texts])


def test_who_waits_is_encoded_at_once() -> None:
    calls: list[int] = []

    def encode(texts: Sequence[str]) -> np.ndarray:
        calls.append(len(texts))
        return lengths(texts)

    batcher = Batcher(encode)
    asked = [["x" * n] * (n % 3 + 1) for n in range(20)]
    with ThreadPoolExecutor(20) as pool:
        with batcher._turn:  # as while others are encoded
            found = [pool.submit(batcher, texts) for texts in asked]
            while len(batcher._waiting) < 20:
                time.sleep(0.001)
        for texts, vectors in zip(asked, found, strict=True):
            np.testing.assert_array_equal(vectors.result(), lengths(texts))
    assert calls == [sum(map(len, asked))]
    np.testing.assert_array_equal(batcher(["alone"]), [[5]])


def test_any_number_of_threads_get_what_they_brought() -> None:
    batcher, wrong = Batcher(lengths), []

    def ask(thread: int) -> None:
        for n in range(30):
            texts = ["x" * (thread + n)] * (n % 2 + 1)
            if batcher(texts).tolist() != lengths(texts).tolist():
                wrong.append(texts)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong


def test_a_failure_is_told_to_all_and_is_no_end() -> None:
    batcher = Batcher(lengths)
    with ThreadPoolExecutor(2) as pool:
        with batcher._turn:
            found = [pool.submit(batcher, [text]) for text in ("good", "bad")]
            while len(batcher._waiting) < 2:
                time.sleep(0.001)
        for each in found:
            with pytest.raises(MemoryError, match="no room"):
                each.result()
    np.testing.assert_array_equal(batcher(["good"]), [[4]])
