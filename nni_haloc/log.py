"""The log of a run: one logger, to a file and to standard error."""

from __future__ import annotations

import logging
from pathlib import Path

from .processes import is_first
from .yaml_files import ConfigError

logger = logging.getLogger("nni_haloc")


def log_to(path: Path) -> None:
    """Send the run's log to ``path`` (its folder is made) and to standard error. `ConfigError` where nothing can be written there.

    Of several processes the first one logs.
    """
    if not is_first():
        logger.disabled = True
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        to_file = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path.parent}: expected a folder that can be written to, found: {error.strerror}") from None
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in (to_file, logging.StreamHandler()):
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
