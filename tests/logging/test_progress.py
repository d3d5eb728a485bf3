"""Progress bars on terminals and log lines elsewhere."""

import io
import itertools
import logging
import os
import re
import select

import pytest

from dinov2_custom import distributed
from dinov2_custom.logging import MetricLogger, ProgressBar, track
from dinov2_custom.logging.progress import bar_is_open, duration


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    """A clock that advances by three seconds per call."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 3.0
        return self.now


def test_no_terminal_no_bar():
    stream = io.StringIO()
    with ProgressBar(3, stream=stream) as bar:
        bar.update()
        bar.show("x")
        assert not bar.visible and not bar_is_open()
    assert stream.getvalue() == ""


def test_bar_on_a_terminal():
    stream = Terminal()
    with ProgressBar(30, initial=10, description="Training", stream=stream) as bar:
        assert bar.visible and bar_is_open()
        bar.show("total_loss=1.5")
        bar.update(20)
    assert not bar.visible and not bar_is_open()
    assert "30/30" in stream.getvalue() and "total_loss=1.5" in stream.getvalue()


def test_a_loop_by_the_clock_shows_percent_and_time_left(monkeypatch):
    """The loop is limited by hours, and its number of iterations is unknown."""
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    now = [75.0]

    def left_s():
        return now[0]

    metrics = MetricLogger()
    loop = metrics.log_every(itertools.count(), 1, "Training", None, 7, left_s=left_s, limit_s=100.0)
    for iteration in loop:
        now[0] -= 25.0
        metrics.update(total_loss=1.0)
        if iteration == 1:
            metrics.end_after_this()
    first, last = stream.getvalue().strip().split("\r")
    assert " 25%|" in first and " 75%|" in last and "it=8" in last
    assert re.search(r"\d\d:\d\d<\d\d:\d\d", last)


def test_only_the_main_process_draws(monkeypatch):
    monkeypatch.setattr(distributed, "get_global_rank", lambda: 1)
    assert not ProgressBar(3, stream=Terminal()).visible


def test_track_writes_lines_without_a_terminal(caplog):
    caplog.set_level(logging.INFO, logger="dinov2")
    items = list(track(range(10), "reading", unit="images", every_s=10, stream=io.StringIO(), clock=Clock()))
    assert items == list(range(10))
    assert caplog.messages == [
        "reading: 4/10 images, 0.3 images/s, eta: 0:00:18",
        "reading: 8/10 images, 0.3 images/s, eta: 0:00:06",
    ]


def test_track_without_length(caplog):
    caplog.set_level(logging.INFO, logger="dinov2")
    list(track(iter(range(4)), "reading", every_s=1, stream=io.StringIO(), clock=Clock()))
    assert caplog.messages[0] == "reading: 1 it, 0.3 it/s"


def test_track_closes_its_bar_when_the_loop_fails():
    steps = track([1, 2], "reading", stream=Terminal())
    next(steps)
    assert bar_is_open()
    steps.close()
    assert not bar_is_open()


@pytest.mark.parametrize(
    "seconds, text", [(59.9, "0:00:59"), (3661, "1:01:01"), (90000, "1 day, 1:00:00"), (-5, "0:00:00")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_terminal_that_does_not_know_its_width():
    reader, writer = os.openpty()  # its size is 0 x 0 until it is set
    drawn = b""
    with os.fdopen(writer, "w") as stream, os.fdopen(reader, "rb", buffering=0) as screen:
        with ProgressBar(10, description="Training", stream=stream) as bar:
            bar.update(10)
        while b"10/10" not in drawn and select.select([screen], [], [], 2)[0]:
            drawn += screen.read(10_000)
    assert b"10/10" in drawn
