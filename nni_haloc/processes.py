"""Several processes, one a device: Lightning starts the others when the first has come to a training, and they do the same up to there."""

from __future__ import annotations

import os

_RANKS = ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK")
"""Variables by which Lightning and torchrun number processes; a scheduler sets its own for single ones, too."""


def is_first() -> bool:
    """Whether this is the process that writes files, logs and reports; the only one, where there is one."""
    return all(os.environ.get(key, "0") == "0" for key in _RANKS) and (not start_together() or os.environ.get("RANK", "0") == "0")


def start_together() -> bool:
    """Whether torchrun starts the processes, all at once, and not Lightning, the others after the first."""
    return "TORCHELASTIC_RUN_ID" in os.environ
