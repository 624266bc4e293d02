"""The log of a run: one logger, to a file and to standard error."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nni_haloc.utils.errors import SettingsError
from nni_haloc.utils.processes import is_first

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
    """Send what is logged here to ``path`` (its folder is made) and to standard error. `SettingsError` where nothing can be written there.

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
        raise SettingsError(
            f"{path.parent}: expected a folder that can be written to, found: {error.strerror}"
        ) from None
