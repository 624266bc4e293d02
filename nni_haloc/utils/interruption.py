"""End a command with one line after Ctrl-C or SIGTERM."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nni_haloc.utils.processes import is_first

_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


@contextmanager
def stoppable(command: str, kept: Callable[[], str] = lambda: "") -> Iterator[None]:
    """End the process with one line if Ctrl-C or SIGTERM comes while the block runs.

    The line is ``COMMAND: stopped by Ctrl-C; KEPT``, on standard error, from the first of several
    processes. The exit status is the shell's: 130 after Ctrl-C, 143 after SIGTERM. After a signal
    any exception that leaves the block counts as its consequence: Lightning turns Ctrl-C into an
    exit with status 1, and a data loader whose workers are gone raises an error of its own.

    Blocks may be nested; they must be in the main thread.

    Args:
        command: what the line begins with.
        kept: returns what the line ends with: which results stay.
    """
    received: list[int] = []

    def stop(signum: int, frame: object) -> None:
        received.append(signum)
        # Lightning sends one more SIGTERM if another of its processes has ended first
        if signum == signal.SIGINT or len(received) == 1:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in _NAMES}
    try:
        yield
    except BaseException:
        if not received:
            raise
        for number in _NAMES:
            signal.signal(number, signal.SIG_IGN)
        if is_first():
            by = _NAMES[signal.Signals(received[0])]
            line = "; ".join(filter(None, (f"{command}: stopped by {by}", kept())))
            print(line, file=sys.stderr, flush=True)
        sys.exit(128 + received[0])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
