"""Notice reentrant checkpointing in a network, where it would be wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.checkpoint import CheckpointFunction

from nni_haloc.utils.errors import HalocError


@contextmanager
def no_reentrant_checkpoints(what: str) -> Iterator[None]:
    """Refuse a network's reentrant checkpointing for the time of a block.

    It runs a part of the network without gradients, and again in the backward pass, apart from the
    rest: gradients can't be asked for one by one, and what is compared between is lost.

    Args:
        what: what can't work with it, for the message: ``the search``.

    Raises:
        HalocError: when the network calls `torch.utils.checkpoint.checkpoint` so.
    """

    def refuse(*args: Any) -> None:
        raise HalocError(
            f"the network uses reentrant checkpointing, which {what} can't work with: have it call"
            " torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
        )

    before = vars(CheckpointFunction).get("apply")
    setattr(CheckpointFunction, "apply", staticmethod(refuse))  # noqa: B010
    try:
        yield
    finally:
        if before is None:
            delattr(CheckpointFunction, "apply")
        else:
            setattr(CheckpointFunction, "apply", before)  # noqa: B010
