"""Notice Ctrl-C and SIGTERM while a loop runs."""

import signal
from typing import Self

import jax

from pplug_jax.runtime.distributed import is_preempted


class Stop:
    """A context that notes SIGTERM and Ctrl-C, so that a loop can save before it ends.

    If one of several processes gets SIGTERM, all stop, since JAX tells them; Ctrl-C ends them at
    once.
    """

    def __enter__(self) -> Self:
        self.signal: signal.Signals | None = None
        noted = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
        self.before = {s: signal.signal(s, self._note) for s in noted}
        return self

    def asked(self, step: int) -> signal.Signals | None:
        """Return the signal to stop after `step`, if one came; call it at every step."""
        if is_preempted(step):
            self.signal = signal.SIGTERM
        return self.signal

    def _note(self, number: int, frame: object) -> None:
        if self.signal is not None:  # a second Ctrl-C: at once
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)

    def __exit__(self, *exception: object) -> None:
        for s, handler in self.before.items():
            signal.signal(s, handler)
