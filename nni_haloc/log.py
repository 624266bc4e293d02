"""The log of a run: one logger, to a file and to standard error."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

from .errors import ConfigError
from .processes import is_first

logger = logging.getLogger("nni_haloc")


class _File(logging.FileHandler):
    """Says once that nothing more can be written, where `logging` would show a traceback for each line; the run goes on."""

    refused = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self.refused:
            self.refused = True
            print(f"{self.baseFilename}: no log from here on: {sys.exc_info()[1]}", file=sys.stderr)


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Send what is logged here to ``path`` (its folder is made) and to standard error. `ConfigError` where nothing can be written there.

    Of several processes the first one logs.
    """
    before = logger.level, logger.propagate, logger.disabled
    handlers = _handlers(path) if is_first() else []
    logger.disabled = not handlers
    logger.propagate = False
    logger.setLevel(logging.INFO)
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            with suppress(OSError):  # what is left in it can't be written; that was said
                handler.close()
        level, logger.propagate, logger.disabled = before
        logger.setLevel(level)


def _handlers(path: Path) -> list[logging.Handler]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return [_File(path, encoding="utf-8"), logging.StreamHandler()]
    except OSError as error:
        raise ConfigError(f"{path.parent}: expected a folder that can be written to, found: {error.strerror}") from None


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
