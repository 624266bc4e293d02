"""Show how far a long task is, and how long the rest will take."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from threading import Timer

from nni_haloc.utils.log import logger


class TimeLeft:
    """Logs about how long the remaining steps will take.

    It does so after the first step, and again after some more, because the first steps are slower.

    Args:
        what: the task, for the log.
    """

    FIRST, LAST = 5, 25
    """The second line is from the time between these steps, or up to half of all steps."""

    def __init__(self, what: str) -> None:
        self.what, self.since, self.start = what, 0, 0.0

    def __call__(self, done: int, of: int) -> None:
        """Note that ``done`` of ``of`` steps are done; call it with 0 first."""
        if done == 1 < of or done == min(self.LAST, of // 2) > self.FIRST:
            seconds = (time.monotonic() - self.start) / (done - self.since) * (of - done)
            logger.info("%s: about %s to go", self.what, timedelta(seconds=round(seconds)))
        if done in (0, self.FIRST):
            self.since, self.start = done, time.monotonic()


Progress = Callable[[int, int], None]
"""Called with the numbers of steps done and of all steps."""
_FIRST_LINE, _BETWEEN_LINES = 10, 30
"""Seconds until progress is logged for the first time, and from then on."""
_LONG = timedelta(minutes=3)
"""What is left of a task that is told how it takes less time."""
_SILENT = 60.0
"""Seconds after which a call that logs nothing says how it says more."""


@contextmanager
def told_if_long(line: str) -> Iterator[None]:
    """Warn with a line, once, if a block takes longer than a minute.

    Args:
        line: the line, such as how to learn more.
    """
    timer = Timer(_SILENT, logger.warning, ("%s", line))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def shows_bars() -> bool:
    """Tell whether standard output can show a progress bar: a terminal, or a notebook's page.

    In a file each step of a bar would be a line; there the log says how far a run is.
    """
    from rich.console import Console  # slow to import

    console = Console()
    return console.is_terminal or console.is_jupyter


def logged_progress(done_what: str, shorter: str = "") -> Progress:
    """Return a function that logs progress and the time left, for a run with a log.

    It logs now and then, and nothing of a task of a few seconds.

    Args:
        done_what: the words before the numbers: ``measured latency_ms``.
        shorter: how the task takes less time; said with the first line of one of several minutes.
    """
    hint = f" ({shorter})" if shorter else ""
    start = next_line = time.monotonic()

    def report(done: int, of: int) -> None:
        nonlocal start, next_line, hint
        now = time.monotonic()
        if done == 0:
            start, next_line = now, now + _FIRST_LINE
        elif now >= next_line and done < of:
            left = timedelta(seconds=round((now - start) / done * (of - done)))
            told = hint if left > _LONG else ""
            hint = "" if told else hint
            logger.info("%s: %d of %d, about %s to go%s", done_what, done, of, left, told)
            next_line = now + _BETWEEN_LINES

    return report


def progress(done_what: str) -> Progress:
    """Return a function that shows progress and the time left on standard error.

    On a terminal it rewrites one line; elsewhere it prints a line now and then.

    Args:
        done_what: the word before the numbers: ``measured``.
    """
    terminal = sys.stderr.isatty()
    start = time.monotonic()
    shown = [float("-inf") if terminal else start]

    def report(done: int, of: int) -> None:
        now = time.monotonic()
        if now - shown[0] < (0.2 if terminal else 30) and done < of:
            return
        shown[0] = now
        left = f", {round((now - start) / done * (of - done))} s left" if 0 < done < of else ""
        end = "\r" if terminal and done < of else "\n"
        print(f"{done_what} {done} of {of}{left}".ljust(50), end=end, file=sys.stderr, flush=True)

    return report
