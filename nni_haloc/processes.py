"""Several processes, one a device: Lightning starts the others when the first has come to a training, and they do the same up to there."""

from __future__ import annotations

import os

_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
"""Variables that launchers number processes by, Lightning's among them."""


def is_first() -> bool:
    """Whether this is the process that writes files, logs and reports; the only one, where there is one."""
    return all(os.environ.get(key, "0") == "0" for key in _RANKS)


def start_together() -> bool:
    """Whether torchrun or SLURM starts the processes, all at once, and not Lightning, the others after the first."""
    return "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("SLURM_NTASKS", "1")) > 1
