"""The log of a run: one logger, to a file and to standard error."""

from __future__ import annotations

import logging
from pathlib import Path

logger = logging.getLogger("nni_haloc")


def log_to(path: Path) -> None:
    """Send the run's log to ``path`` (its folder is made) and to standard error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in (logging.FileHandler(path, encoding="utf-8"), logging.StreamHandler()):
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
