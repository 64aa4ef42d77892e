"""Progress on a terminal and elsewhere."""

import io
import os
import subprocess
import sys

import pytest
from rich.console import Console

from pplug_jax.runtime import console as progress
from pplug_jax.runtime.console import Progress


def capture(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> io.StringIO:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100)
    monkeypatch.setattr(progress, "console", console)
    return out


def test_log_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch):
    out = capture(monkeypatch, terminal=False)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", -1)
    with Progress("training", 5, "steps") as bar:
        bar.advance(2, "loss 1.250")
        bar.advance(2)
        bar.advance(1, "loss 1.125")
    first, second, last = out.getvalue().splitlines()
    assert first.startswith("training: 2/5 steps, ")
    assert first.endswith("left, loss 1.250")
    assert second.startswith("training: 4/5 steps, ")
    assert last.startswith("training: 5/5 steps, done in ")
    assert last.endswith(" s, loss 1.125")


def test_lines_come_now_and_then_only(monkeypatch: pytest.MonkeyPatch):
    out = capture(monkeypatch, terminal=False)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 1e9)
    with Progress("encoding", 1000, "texts") as bar:
        for _ in range(1000):
            bar.advance(1)
    assert out.getvalue().count("\n") == 1
    assert "encoding: 1000/1000 texts" in out.getvalue()


def test_the_estimate_is_the_rate_so_far(monkeypatch: pytest.MonkeyPatch):
    out = capture(monkeypatch, terminal=False)
    clock = iter([100.0, 130.0, 130.0, 130.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    Progress("training", 8, "steps").advance(2)
    assert out.getvalue() == "training: 2/8 steps, 30 s, 90 s left\n"


def test_nothing_done_and_nothing_to_do(monkeypatch: pytest.MonkeyPatch):
    out = capture(monkeypatch, terminal=False)
    with Progress("encoding", 0, "texts"):
        pass
    assert "encoding: 0/0 texts, done" in out.getvalue()


def test_work_that_failed_is_not_called_done(monkeypatch: pytest.MonkeyPatch):
    out = capture(monkeypatch, terminal=False)
    with pytest.raises(KeyError), Progress("training", 2, "steps") as bar:
        bar.advance(2)
        raise KeyError
    assert out.getvalue() == ""


@pytest.mark.parametrize("fails", [False, True])
def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, fails: bool):
    out = capture(monkeypatch, terminal=True)
    try:
        with Progress("training", 4, "steps") as bar:
            bar.advance(1)
            bar.advance(2, "loss 1.250")
            assert bar.done == 3
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    said = out.getvalue()
    assert "training" in said
    assert "3/4" in said
    assert "loss 1.250" in said
    assert "\x1b[?25h" in said  # the cursor is back


def test_a_wide_table_is_whole_where_there_is_no_terminal():
    code = (
        "from pplug_jax.scoring.tables import show_table\n"
        "show_table('T', ['method', *(f'metric{i:02} (95% interval)' for i in range(12))], "
        "[['pplug', *['0.123 [0.100, 0.200]'] * 12]])"
    )
    environment = os.environ | {"COLUMNS": "80", "TERM": "dumb"}
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    ).stdout
    assert "metric11 (95% interval)" in out
    assert out.count("0.123 [0.100, 0.200]") == 12
    assert "\N{HORIZONTAL ELLIPSIS}" not in out
