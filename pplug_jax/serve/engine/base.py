"""The interface of an engine."""

import abc
import queue
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from pplug_jax.errors import InputError


class Busy(InputError):
    """As many requests wait as may, or the engine ends; the same one may succeed later."""


class Unwell(RuntimeError):
    """The engine failed, and answers nothing any more until it is started again."""


class Sampling(NamedTuple):
    """How a continuation is chosen.

    Attributes:
        max_tokens: the most new tokens.
        temperature: divides the logits; 0 is greedy.
        top_p: draw only from the likeliest tokens that have so much probability together.
        seed: of the draws, which depend on nothing else.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class Token(NamedTuple):
    """A new token.

    Attributes:
        id: the token.
        log_probability: that the LLM gave it, before temperature and top_p.
    """

    id: int
    log_probability: float


class Finished(NamedTuple):
    """The end of a continuation.

    Attributes:
        reason: `stop` at a token that ends answers, which is not told; `length`; `cancelled`; or
            `error`.
        problem: what the error is.
    """

    reason: str
    problem: str = ""

    def check(self) -> None:
        """Raise `Unwell` if an error ended it."""
        if self.reason == "error":
            raise Unwell(self.problem)


Event = Token | Finished
Emit = Callable[[Event], None]


class Request:
    """A prompt under way.

    Args:
        rows: (L, D), the prompt's embeddings with the soft tokens in their place.
        sampling: how to go on.
        emit: is called with every token as it comes, and at last with `Finished`, in the engine's
            thread: it must not wait.
    """

    def __init__(self, rows: np.ndarray, sampling: Sampling, emit: Emit):
        self.rows, self.sampling, self.emit = rows, sampling, emit
        self.cancelled = False

    def cancel(self) -> None:
        """Give the place up; whoever reads the tokens is told that it is `cancelled`."""
        self.cancelled = True


class Engine(abc.ABC):
    """A thing that goes on from prompts. Any number of threads may use it.

    Args:
        longest_prompt: the most rows of a prompt.
        max_new_tokens: the most new tokens.
        waiting: the most requests that wait.
    """

    def __init__(self, longest_prompt: int, max_new_tokens: int, waiting: int):
        self.longest_prompt, self.max_new_tokens = longest_prompt, max_new_tokens
        self.max_waiting = waiting
        self._news = threading.Condition()  # guards _ending, _failure and all requests
        self._ending = False
        self._failure: BaseException | None = None

    @abc.abstractmethod
    def submit(self, rows: np.ndarray, sampling: Sampling, emit: Emit) -> Request:
        """Begin to answer.

        Raises:
            Busy: too many wait, or the engine ends.
            InputError: the prompt or the answer is too long.
            Unwell: the engine failed.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Refuse what is new, and return when all that runs has finished."""

    def check(self) -> None:
        """Raise `Unwell` if the engine failed."""
        with self._news:
            self._check()

    def _check(self) -> None:
        if self._failure is not None:
            raise Unwell(self._told(self._failure)) from self._failure

    def _told(self, failure: BaseException) -> str:
        """Return what people are told of a failure."""
        return f"the engine failed: {failure}"

    def _check_lengths(self, rows: np.ndarray, sampling: Sampling) -> None:
        """Raise `InputError`, with both lengths, if a prompt or an answer is too long."""
        if len(rows) > self.longest_prompt:
            raise InputError(
                f"the prompt has {len(rows)} tokens, and this server takes {self.longest_prompt}"
            )
        if not 1 <= sampling.max_tokens <= self.max_new_tokens:
            raise InputError(
                f"max_tokens must be from 1 to {self.max_new_tokens}, not {sampling.max_tokens}"
            )

    def _check_room(self, waiting: int) -> None:
        """Raise `Unwell` or `Busy` if no request is taken while so many wait."""
        self._check()
        if self._ending:
            raise Busy("the server ends")
        if waiting >= self.max_waiting:
            raise Busy(f"{self.max_waiting} requests wait already; try again later")


def tokens_of(engine: Engine, rows: np.ndarray, sampling: Sampling) -> Iterator[Token]:
    """Yield the tokens of a continuation as they come; whoever stops asking cancels it.

    Raises:
        Unwell: the engine failed.
    """
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    request = engine.submit(rows, sampling, events.put)
    try:
        while isinstance(event := events.get(), Token):
            yield event
        event.check()
    finally:
        request.cancel()
