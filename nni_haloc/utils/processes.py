"""Several processes, one a device: Lightning starts the others when the first has come to a training, and they do the same up to there."""

from __future__ import annotations

import os
import sys
from typing import Any

_RANKS = ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK")
"""Variables by which Lightning and torchrun number processes; a scheduler sets its own for single ones, too."""


def is_first() -> bool:
    """Whether this is the process that writes files, logs and reports; the only one, where there is one."""
    return all(os.environ.get(key, "0") == "0" for key in _RANKS) and (
        not start_together() or os.environ.get("RANK", "0") == "0"
    )


def start_together() -> bool:
    """Whether torchrun starts the processes, all at once, and not Lightning, the others after the first."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def wait_for_all() -> None:
    """Where several processes have started: each waits here until all of them come, so that none works while another takes the time."""
    import torch.distributed as dist  # not above: a command without torch starts in no time

    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def check_startable(trainer: Any) -> None:
    """ValueError where a Lightning ``trainer`` is to start other processes and can't: by running again a program that is in no file."""
    main, script = sys.modules["__main__"], sys.argv[0]
    started = (
        trainer.num_devices > 1
        and trainer.strategy.launcher is not None
        and "LOCAL_RANK" not in os.environ
    )
    if started and main.__spec__ is None and not os.path.isfile(script):
        found = {"-c": "python -c", "-": "standard input", "": "standard input"}.get(
            script, f"{script}, which is no file here"
        )
        raise ValueError(
            f"devices: {trainer.num_devices} processes run a script each, or python -m MODULE; found {found}"
        )
