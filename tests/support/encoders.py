"""An encoder without a model."""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np


class FakeEncoder:
    """A text's vector is drawn from its own hash. `dies_at`: the call to `encode` that fails."""

    size = 6

    def __init__(self, fingerprint: str = "print", dies_at: int | None = None):
        self.fingerprint, self.dies_at = fingerprint, dies_at
        self.calls = self.cut_texts = 0
        self.encoded: list[str] = []

    def vector(self, text: str) -> np.ndarray:
        seed = int.from_bytes(hashlib.sha256((self.fingerprint + text).encode()).digest()[:8])
        vector = np.random.default_rng(seed).standard_normal(self.size)
        return (vector / np.linalg.norm(vector)).astype(np.float32)

    def encode(
        self,
        texts: Sequence[str],
        batch_size: int = 64,
        on_batch: Callable[[int], None] = lambda done: None,
        queries: bool = False,
    ) -> np.ndarray:
        self.calls += 1
        if self.calls == self.dies_at:
            raise KeyboardInterrupt
        self.encoded += texts
        on_batch(len(texts))
        return np.stack([self.vector(text) for text in texts])
