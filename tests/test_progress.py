"""A line now and then, where nothing can be drawn."""

import io

import pytest
from rich.console import Console

from sb3_klip import progress
from sb3_klip.progress import PipedProgress, duration


def test_lines_now_and_then(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    output = io.StringIO()
    piped = PipedProgress(Console(file=output))
    for seconds, share in ((10, 0.1), (30, 0.25), (40, 0.3), (100, 0.5), (200, 1.0)):
        clock[0] = seconds
        piped.tell("some", share)
    assert output.getvalue().splitlines() == ["25%: some, about 2 min left", "50%: some, about 2 min left", "100%: some"]


def test_a_terminal_gets_none():
    output = io.StringIO()
    piped = PipedProgress(Console(file=output, force_terminal=True))
    piped.told -= 1000
    piped.tell("some", 0.5)
    assert output.getvalue() == ""


@pytest.mark.parametrize(("seconds", "expected"), [(3.2, "3 s"), (90, "2 min"), (5399, "90 min"), (5400, "1.5 h")])
def test_durations(seconds, expected):
    assert duration(seconds) == expected
