"""Signals that come while a loop runs."""

import os
import signal

import pytest

from pplug_jax.train.stop import Stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_then_as_before(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Stop() as stop:
        assert not stop.asked(1)
        os.kill(os.getpid(), number)
        assert stop.asked(2)
        assert stop.signal == number
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_wait(first: signal.Signals) -> None:
    """Ctrl-C while a checkpoint is saved must not wait for it."""
    with pytest.raises(KeyboardInterrupt), Stop():
        os.kill(os.getpid(), first)
        os.kill(os.getpid(), signal.SIGINT)
