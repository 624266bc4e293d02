"""Ctrl-C and SIGTERM: a command ends with one line, and with the shell's exit status for it, 130 or 143."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nni_haloc.utils.processes import is_first

_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


@contextmanager
def stoppable(command: str, kept: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Ends the process with one line, ``COMMAND: stopped by Ctrl-C; KEPT``, where one of the signals comes meanwhile; may be nested.

    Whatever leaves the block after a signal is taken for its consequence: Lightning makes an exit of it, with status 1, and a loader whose
    workers are gone an error. In the main thread alone. Of several processes the first says the line.
    """
    received: list[int] = []

    def stop(signum: int, frame: object) -> None:
        received.append(signum)
        if (
            signum == signal.SIGINT or len(received) == 1
        ):  # Lightning sends one more where another process has ended first
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
            print(
                "; ".join(filter(None, (f"{command}: stopped by {by}", kept()))),
                file=sys.stderr,
                flush=True,
            )
        sys.exit(128 + received[0])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
