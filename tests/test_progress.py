"""support/progress.py: what a terminal and what a file see of long work."""

import contextlib
import io

import pytest

from support import progress
from support.progress import Progress


class Clock:
    """time.monotonic, moved by hand."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_file_gets_a_plain_line_every_two_seconds(clock):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), Progress(40, "eval base", done=4) as bar:
        for step in range(36):
            clock.now += 0.5
            bar.update(1, f"reward {step}")
    lines = out.getvalue().splitlines()
    assert "\r" not in out.getvalue() and "\x1b" not in out.getvalue()
    assert lines[:3] == ["eval base: 4/40 [00:00]", "eval base: 8/40 [00:02] reward 3", "eval base: 12/40 [00:04] reward 7"]
    assert lines[-1] == "eval base: 40/40 [00:18] reward 35" and len(lines) == 10


def test_a_long_step_is_not_silent(clock):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), Progress(3, "eval") as bar:
        for _ in range(21):
            clock.now += 0.3
            bar.update(0)
    assert out.getvalue().splitlines() == [f"eval: 0/3 [00:0{second}]" for second in (0, 2, 4, 6)]


def test_a_terminal_gets_one_bar(monkeypatch):
    out = Terminal()
    monkeypatch.setenv("COLUMNS", "100")
    with contextlib.redirect_stdout(out), Progress(3, "sft") as bar:
        for step in range(3):
            bar.update(1, f"loss {step}")
    text = out.getvalue()
    assert "\r" in text and text.count("\n") == 1 and "sft: 100%" in text and "3/3" in text and "loss 2" in text


@pytest.mark.parametrize("out", [io.StringIO(), Terminal()])
def test_a_total_of_nothing_shows_nothing(out):
    with contextlib.redirect_stdout(out), Progress() as bar:
        bar.update(2, "text")
    assert out.getvalue() == ""
