"""The progress of a long stage: plain lines, with a clock that is set by hand, and a bar on a terminal."""

import io
import sys

import pytest

from rac3.execution import progress as module
from rac3.execution.progress import LINE_EVERY, Progress, progress


class Clock:
    """A clock that is set by hand, in seconds."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


Captured = pytest.CaptureFixture[str]


def test_a_line_has_rate_time_and_what_is_left(clock: Clock, capsys: Captured):
    """30 of 120 in a minute: 0.5/s, and three minutes for the other 90."""
    with Progress("ingest", 120, "shards") as bar:
        clock.now += 60
        bar.update(30, "5 rejects")
        assert capsys.readouterr().err == "ingest: 30/120 shards, 0.5/s, 01:00, ETA 03:00  5 rejects\n"
        clock.now += 60
        bar.update(60)
        assert capsys.readouterr().err == "ingest: 90/120 shards, 0.75/s, 02:00, ETA 00:40  5 rejects\n"
        clock.now += 5
        bar.update(30)
        assert capsys.readouterr().err == ""
    assert capsys.readouterr().err == "ingest: 120/120 shards, 0.96/s, 02:05  5 rejects\n"


def test_what_was_done_before_is_counted_but_takes_no_time(clock: Clock, capsys: Captured):
    """A run that resumes at 80 of 100 and makes 10 more in 20 seconds: 0.5/s, not 4.5."""
    with Progress("embed", 100, "shards", initial=80) as bar:
        clock.now += 20
        bar.update(10)
        assert capsys.readouterr().err == "embed: 90/100 shards, 0.5/s, 00:20, ETA 00:20\n"


def test_lines_come_no_oftener_than_every_15_seconds(clock: Clock, capsys: Captured):
    assert LINE_EVERY == 15
    with Progress("train", 100, "steps") as bar:
        for _ in range(16):
            clock.now += 1
            bar.update()
        assert capsys.readouterr().err == "train: 16/100 steps, 1/s, 00:16, ETA 01:24\n"
        for _ in range(15):
            clock.now += 1
            bar.update()
        assert capsys.readouterr().err == ""
        clock.now += 1
        bar.update()
        assert capsys.readouterr().err.startswith("train: 32/100 steps")


def test_nothing_done_has_no_rate_and_no_end(clock: Clock, capsys: Captured):
    with Progress("index", 1, "parts") as bar:
        clock.now += 100
        bar.update(0, "slow")
    assert capsys.readouterr().err == "index: 0/1 parts, 0/s, 01:40  slow\n" * 2


def test_what_is_not_shown_says_nothing(clock: Clock, capsys: Captured):
    """Of many processes that do the same, one speaks."""
    with Progress("train", 4, "steps", shown=False) as bar:
        clock.now += 100
        bar.update(2)
    assert capsys.readouterr().err == ""


def test_a_failure_ends_without_a_line(clock: Clock, capsys: Captured):
    with pytest.raises(ValueError, match="stop"), Progress("index", 1, "parts"):
        raise ValueError("stop")
    assert capsys.readouterr().err == ""


def test_items_are_counted_after_they_are_worked_on(clock: Clock, capsys: Captured):
    for number, item in enumerate(progress("abc", "read", 3, "shards")):
        assert item == "abc"[number]
        clock.now += 20
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"read: {n}/3 shards" for n in (1, 2, 3, 3)]


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with Progress("fit", 10, "steps", initial=4) as bar:
        bar.update(2, "loss 1.5")
        bar.update(0, "loss 1.25")
        assert bar.bar is not None
        assert (bar.bar.n, bar.bar.total, bar.bar.initial) == (6, 10, 4)
    shown = screen.getvalue()
    assert "fit:" in shown
    assert "6/10" in shown
    assert "loss 1.25" in shown
    assert "steps, " not in shown  # no plain lines
