"""Several processes, one for each device.

Lightning starts the others when the first one comes to a training; each re-executes the script up
to that point. torchrun starts all of them at once.
"""

from __future__ import annotations

import os
import sys
from typing import Any

_RANKS = ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK")
"""Variables by which Lightning and torchrun number processes. A scheduler may set others."""


def is_first() -> bool:
    """Tell if this is the process that writes files, logs and reports."""
    return all(os.environ.get(key, "0") == "0" for key in _RANKS) and (
        not start_together() or os.environ.get("RANK", "0") == "0"
    )


def start_together() -> bool:
    """Tell if torchrun has started the processes, all at once."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def scheduler_step() -> str | None:
    """Return the step of SLURM that this process is one of several tasks of; None without one.

    All tasks of a step start together. Those of one run each take themselves for the first.
    """
    alone = os.environ.get("SLURM_NTASKS", "1") in ("", "0", "1")
    if alone or "SLURM_PROCID" not in os.environ:
        return None
    return f"{os.environ.get('SLURM_JOB_ID')}.{os.environ.get('SLURM_STEP_ID')}"


def wait_for_all() -> None:
    """Wait until all processes are here, so that none computes while another measures time."""
    import torch.distributed as dist  # here, because commands without torch start quickly

    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def check_startable(trainer: Any) -> None:
    """Check that Lightning can start the other processes, by running the same program again.

    Args:
        trainer: a Lightning ``Trainer``.

    Raises:
        ValueError: if the program is in no file.
    """
    main, script = sys.modules["__main__"], sys.argv[0]
    started = (
        trainer.num_devices > 1
        and trainer.strategy.launcher is not None
        and "LOCAL_RANK" not in os.environ
    )
    if started and main.__spec__ is None and not os.path.isfile(script):
        names = {"-c": "python -c", "-": "standard input", "": "standard input"}
        program = names.get(script, f"{script}, which is no file here")
        raise ValueError(
            f"devices: {trainer.num_devices} processes can only be started from a script or "
            f"python -m MODULE, found {program}"
        )
