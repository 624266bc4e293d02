"""Say how far a long task is, and how long the rest will take."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import timedelta

from nni_haloc.utils.log import logger


class TimeLeft:
    """Logs about how long the rest of some steps takes: by the first, and by some more, because the first are slower."""

    FIRST, LAST = 5, 25
    """Steps between which the time is taken for the second line, or up to half of them."""

    def __init__(self, what: str) -> None:
        self.what, self.since, self.start = what, 0, 0.0

    def __call__(self, done: int, of: int) -> None:
        """``done`` of the steps are over; to be called with 0 first."""
        if done == 1 < of or done == min(self.LAST, of // 2) > self.FIRST:
            seconds = (time.monotonic() - self.start) / (done - self.since) * (of - done)
            logger.info("%s: about %s to go", self.what, timedelta(seconds=round(seconds)))
        if done in (0, self.FIRST):
            self.since, self.start = done, time.monotonic()


Progress = Callable[[int, int], None]


def progress(done_what: str) -> Progress:
    """A line with the time left, rewritten on a terminal, now and then elsewhere."""
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
