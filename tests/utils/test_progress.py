"""The lines that tell how far a long task is."""

import io
import threading

import pytest

from nni_haloc.utils import progress
from nni_haloc.utils.progress import logged_progress, shows_bars


@pytest.fixture
def told(monkeypatch):
    """The lines of the log; a clock in seconds stands beside them."""
    lines, clock = [], [0.0]
    monkeypatch.setattr("nni_haloc.utils.progress.time.monotonic", lambda: clock[0])
    monkeypatch.setattr(
        "nni_haloc.utils.log.logger.info", lambda text, *args: lines.append(text % args)
    )
    return lines, clock


def test_a_long_task_is_told_every_half_minute(told):
    lines, clock = told
    report = logged_progress("measuring latency_ms")
    for done in range(101):  # a second each
        report(done, 100)
        clock[0] += 1
    assert lines == [
        "measuring latency_ms: 10 of 100, about 0:01:30 to go",
        "measuring latency_ms: 40 of 100, about 0:01:00 to go",
        "measuring latency_ms: 70 of 100, about 0:00:30 to go",
    ]


def test_a_short_task_is_not_told_of_and_another_round_counts_anew(told):
    lines, clock = told
    report = logged_progress("measuring latency_ms")
    for _ in range(3):
        for done in range(10):
            report(done, 9)
            clock[0] += 1
    assert lines == []


def test_a_task_of_minutes_says_once_how_it_takes_less_time(told):
    lines, clock = told
    report = logged_progress("measuring latency_ms", "a larger step has fewer")
    for done in range(50):
        report(done, 1000)
        clock[0] += 1
    assert lines == [
        "measuring latency_ms: 10 of 1000, about 0:16:30 to go (a larger step has fewer)",
        "measuring latency_ms: 40 of 1000, about 0:16:00 to go",
    ]


@pytest.mark.parametrize("seconds", [0.0, 60.0])
def test_a_silent_block_says_a_line_once_it_is_long(monkeypatch, caplog, seconds):
    monkeypatch.setattr(progress, "_SILENT", seconds)
    with progress.told_if_long("verbose=True says more"):
        for timer in threading.enumerate():
            if isinstance(timer, threading.Timer) and not seconds:
                timer.join()
    assert caplog.messages == ["verbose=True says more"] * (seconds == 0)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("out", "shown"), [(Terminal(), True), (io.StringIO(), False)])
def test_progress_bars_are_for_terminals(monkeypatch, out, shown):
    for variable in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("sys.stdout", out)
    assert shows_bars() == shown
