"""End a command with one line after Ctrl-C or SIGTERM."""

from __future__ import annotations

import _thread
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from nni_haloc.utils.processes import is_first

_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class _Signals:
    """Make a KeyboardInterrupt of each signal, and another one where Python has dropped it.

    Python drops, with a traceback, what is raised in a destructor or in another function that
    nobody calls; the program would go on as if there had been no signal.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self._over = False
        self._handlers = {number: signal.signal(number, self._stop) for number in _NAMES}
        self._hook, sys.unraisablehook = sys.unraisablehook, self._dropped

    def ignore(self) -> None:
        """Let no other signal disturb what remains to be done."""
        self._over = True
        for number in _NAMES:
            signal.signal(number, signal.SIG_IGN)

    def restore(self) -> None:
        """Put back what was there before."""
        self._over = True
        sys.unraisablehook = self._hook
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: object) -> None:
        self.received.append(number)
        # Lightning sends another SIGTERM where one of several processes has ended first.
        if not self._over and (number == signal.SIGINT or len(self.received) == 1):
            raise KeyboardInterrupt

    def _dropped(self, unraisable: Any) -> None:
        if not self.received:
            self._hook(unraisable)
        elif isinstance(unraisable.exc_value, KeyboardInterrupt):
            # Not a `threading.Thread`: its locks may be held by what was interrupted.
            _thread.start_new_thread(self._interrupt, ())

    def _interrupt(self) -> None:
        time.sleep(0.01)  # until the destructor is left
        if not self._over:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let a signal that comes while the block runs take effect right after it.

    So that a process is never started and then lost before anybody knows of it. In another thread
    than the main one, which gets no signals, nothing is done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    handlers = {n: signal.signal(n, lambda number, _: received.append(number)) for n in _NAMES}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for late in received:
            signal.raise_signal(late)


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
    signals = _Signals()
    try:
        yield
    except BaseException:
        if not signals.received:
            raise
        signals.ignore()
        if is_first():
            by = _NAMES[signal.Signals(signals.received[0])]
            line = "; ".join(filter(None, (f"{command}: stopped by {by}", kept())))
            print(line, file=sys.stderr, flush=True)
        sys.exit(128 + signals.received[0])
    finally:
        signals.restore()


def end_by_signal(status: object) -> None:
    """End the process by the signal itself, if ``status`` is the shell's for Ctrl-C or SIGTERM.

    Some parents tell a program that was stopped from one that failed by this alone. Python's own
    last actions are left out, so everything must be closed. For another status nothing is done.
    """
    for number in _NAMES:
        if status == 128 + number:
            sys.stdout.flush()
            sys.stderr.flush()
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
