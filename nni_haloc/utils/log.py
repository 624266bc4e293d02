"""Log a run with one logger, to a file and to standard error."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path

from nni_haloc.utils.errors import HalocError, printable
from nni_haloc.utils.files import make_folder, not_a_folder, open_to_append
from nni_haloc.utils.processes import is_first

logger = logging.getLogger("nni_haloc")

_ERROR = {"levelno": logging.ERROR, "levelname": "ERROR"}
_LONGEST = 10_000
"""Characters of a line of the log; what is beyond is cut off."""


class OneLine(logging.Formatter):
    """Write each record on one line: time, level, message.

    Line breaks and control characters in a message, such as a class's name or another library's
    error, are escaped, so that they neither look like another line nor reach the terminal.
    """

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        return printable(super().format(record), _LONGEST)


class _File(logging.FileHandler):
    """A log file that says once if it can no longer be written, and lets the run go on.

    `logging` itself would print a traceback for each line. Nothing is written through a link.
    """

    refused = False

    def _open(self) -> TextIOWrapper:
        return open(open_to_append(self.baseFilename), "a", encoding=self.encoding)

    def handleError(self, record: logging.LogRecord) -> None:
        if not self.refused:
            self.refused = True
            print(f"{self.baseFilename}: no log from here on: {sys.exc_info()[1]}", file=sys.stderr)


@contextmanager
def log_to(path: Path | None = None) -> Iterator[None]:
    """Log what happens in the block to standard error and, if one is named, to a file.

    The file also has the error that ends the block, if it is one of `HalocError`. Of several
    processes only the first one logs.

    Args:
        path: the file; its folder is made. None is standard error alone.

    Raises:
        SettingsError: if nothing can be written there.
    """
    before = logger.level, logger.propagate, logger.disabled
    handlers = _handlers(path) if is_first() else []
    logger.disabled = not handlers
    logger.propagate = False
    logger.setLevel(logging.INFO)
    for handler in handlers:
        handler.setFormatter(OneLine())
        logger.addHandler(handler)
    try:
        yield
    except HalocError as error:  # standard error has it from whoever catches it
        for handler in handlers:
            if isinstance(handler, _File):
                handler.handle(logging.makeLogRecord(_ERROR | {"msg": str(error)}))
        raise
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            with suppress(OSError):  # a full disk, of which `_File` has told
                handler.close()
        level, logger.propagate, logger.disabled = before
        logger.setLevel(level)


def _handlers(path: Path | None) -> list[logging.Handler]:
    if path is None:
        return [logging.StreamHandler()]
    try:
        make_folder(path.parent)
        return [_File(path, encoding="utf-8"), logging.StreamHandler()]
    except OSError as error:
        raise not_a_folder(path.parent, error) from None
