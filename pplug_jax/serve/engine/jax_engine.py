"""Continuous batching by our own LLMs: people come and go between the steps of all the others."""

import collections
import hashlib
import threading
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from pplug_jax.feed.batches import ROUND
from pplug_jax.llm import LLM
from pplug_jax.llm.decoder import Context
from pplug_jax.runtime.mesh import parts
from pplug_jax.serve.engine.base import Emit, Engine, Finished, Request, Sampling, Token
from pplug_jax.serve.engine.slots import programs

CONTEXTS = 8  # beginnings of prompts that are kept as they were read


class _Running(NamedTuple):
    """A request in its slot, and how many tokens it may still have."""

    request: Request
    left: int


class JaxEngine(Engine):
    """An engine for every LLM that this package has, on CPUs, GPUs and TPUs.

    All programs are compiled when it is made. One thread admits requests to free slots, and then
    takes a step for all of them. What several prompts begin with is read once, if all of them end
    with equally many rows of their own: soft tokens behind the input, and the suffix.

    Args:
        llm: the LLM, as the plug changes it.
        mesh: the mesh that it lies on.
        longest_prompt: the most rows of a prompt.
        max_new_tokens: the most new tokens.
        slots: how many are answered at a time.
        waiting: how many may wait besides.
        own_rows: how many rows at a prompt's end are not shared; 0 shares nothing. Needs a
            decoder-only LLM.
        reader: the unchanged LLM, which reads what is shared; None is `llm`.
    """

    def __init__(
        self,
        llm: LLM,
        mesh: Mesh,
        *,
        longest_prompt: int,
        max_new_tokens: int,
        slots: int = 32,
        waiting: int = 256,
        own_rows: int = 0,
        reader: LLM | None = None,
    ):
        super().__init__(longest_prompt, max_new_tokens, waiting)
        self.llm, self.mesh, self.own_rows = llm, mesh, own_rows
        self.reader = llm if reader is None else reader
        self._contexts: collections.OrderedDict[bytes, Context] = collections.OrderedDict()
        columns = self._lengths()[-1] + own_rows
        self._programs = programs(llm, mesh, slots, columns, max_new_tokens)
        self._stops = frozenset(llm.config.eos_ids)
        self._waiting: collections.deque[Request] = collections.deque()
        self._running: list[_Running | None] = [None] * slots
        self._time = 0
        # Alone, one need not wait for all slots' sums. Several devices share the slots as they lie.
        whole = parts(mesh, "batch") > 1
        self._counts = [slots] if whole else [*_fours(slots), slots]
        with jax.set_mesh(mesh):
            self._slots = self._programs.empty()
            for length in self._lengths():
                nothing = np.zeros((length + own_rows, llm.config.hidden_size))
                self._admit(0, Request(nothing, Sampling(1), _ignore))
            for count in self._counts:
                self._step(count)
        self._running[0] = None
        self._contexts.clear()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def _lengths(self) -> list[int]:
        """Return the padded lengths of prompts, or of what they share: 16, 32, 64, .. the most."""
        most = max(1, self.longest_prompt - self.own_rows)
        count = max(0, (most - 1) // ROUND).bit_length()
        return [*(ROUND << i for i in range(count)), most]

    @property
    def running(self) -> int:
        """How many are answered now."""
        return sum(entry is not None for entry in self._running)

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def submit(self, rows: np.ndarray, sampling: Sampling, emit: Emit) -> Request:
        self._check_lengths(rows, sampling)
        request = Request(rows, sampling, emit)
        with self._news:
            self._check_room(self.waiting)
            self._waiting.append(request)
            self._news.notify()
        return request

    def close(self) -> None:
        with self._news:
            self._ending = True
            self._news.notify()
        self._thread.join()

    def _work(self) -> None:
        try:
            with jax.set_mesh(self.mesh):
                while self._is_asked():
                    self._fill()
                    if any(self._running):
                        self._tell(*self._step(self._count()))
        except BaseException as error:  # noqa: BLE001  of any kind: nobody else may wait for it
            with self._news:
                self._failure = error
            ended = Finished("error", self._told(error))
            for request in [entry.request for entry in self._running if entry] + [*self._waiting]:
                request.emit(ended)
            self._running = [None] * len(self._running)
            self._waiting.clear()

    def _is_asked(self) -> bool:
        """Wait for work; return False once there will be none."""
        with self._news:
            self._news.wait_for(lambda: self._waiting or self._ending or any(self._running))
            return bool(self._waiting) or any(self._running)

    def _fill(self) -> None:
        """Evict who has gone, and admit who waits to the free slots."""
        for slot, entry in enumerate(self._running):
            if entry and entry.request.cancelled:
                self._finish(slot, "cancelled")
            while self._running[slot] is None and self._waiting:
                request = self._waiting.popleft()
                if request.cancelled:
                    request.emit(Finished("cancelled"))
                else:
                    self._tell_one(slot, *self._admit(slot, request))

    def _admit(self, slot: int, request: Request) -> tuple[int, float]:
        rows, sampling = request.rows, request.sampling
        if self.own_rows:
            shared = max(0, len(rows) - self.own_rows)
            context = self._context(rows[:shared])
            prompt = _padded(rows[shared:], self.own_rows)
        else:
            context, prompt = None, self._padded(rows)
        self._running[slot] = _Running(request, sampling.max_tokens)
        self._slots, token, log_probability = self._programs.admit(
            self.llm,
            self._slots,
            *prompt,
            np.int32(slot),
            np.float32(sampling.temperature),
            np.float32(sampling.top_p),
            np.int32(sampling.seed),
            context,
        )
        return int(token), float(log_probability)

    def _context(self, rows: np.ndarray) -> Context:
        """Return these rows as the LLM read them, now or for one of the last prompts."""
        key = hashlib.sha256(rows.tobytes()).digest()
        if key not in self._contexts:
            self._contexts[key] = self._programs.read(self.reader, *self._padded(rows))
        self._contexts.move_to_end(key)
        if len(self._contexts) > CONTEXTS:
            self._contexts.popitem(last=False)
        return self._contexts[key]

    def _padded(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return _padded(rows, next(size for size in self._lengths() if size >= len(rows)))

    def _count(self) -> int:
        """Return how many slots a step must be taken for, of the numbers that are compiled."""
        used = max(slot for slot, entry in enumerate(self._running) if entry) + 1
        return next(count for count in self._counts if count >= used)

    def _step(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        self._slots, tokens, log_probabilities = self._programs.step(
            self.llm, self._slots, np.int32(self._time), ring=self.max_new_tokens, count=count
        )
        self._time = (self._time + 1) % self.max_new_tokens
        return np.asarray(tokens), np.asarray(log_probabilities)

    def _tell(self, tokens: np.ndarray, log_probabilities: np.ndarray) -> None:
        for slot, entry in enumerate(self._running):
            if entry:
                self._tell_one(slot, int(tokens[slot]), float(log_probabilities[slot]))

    def _tell_one(self, slot: int, token: int, log_probability: float) -> None:
        """Hand a token on, and free the slot if it is the last."""
        entry = self._running[slot]
        assert entry is not None
        if token in self._stops:
            self._finish(slot, "stop")
            return
        entry.request.emit(Token(token, log_probability))
        self._running[slot] = entry._replace(left=entry.left - 1)
        if entry.left == 1:
            self._finish(slot, "length")

    def _finish(self, slot: int, reason: str) -> None:
        entry = self._running[slot]
        assert entry is not None
        self._running[slot] = None
        entry.request.emit(Finished(reason))


def _padded(rows: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rows (L, D) as a batch of one, (1, length, D) float32, and its mask."""
    padded = np.zeros((1, length, rows.shape[1]), np.float32)
    padded[0, : len(rows)] = rows
    return padded, (np.arange(length) < len(rows))[None]


def _fours(limit: int) -> list[int]:
    """Return 1, 4, 16, .. below a limit."""
    return [4**i for i in range(limit) if 4**i < limit]


def _ignore(event: object) -> None:
    """Tell nobody of what is computed only to compile it."""
