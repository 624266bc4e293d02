"""Work in a folder, or on a file, alone: another process is told which one works there."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nni_haloc.utils.errors import HalocError
from nni_haloc.utils.files import make_folder, not_a_folder, open_to_append, own_folders
from nni_haloc.utils.log import logger
from nni_haloc.utils.processes import is_first, scheduler_step

try:
    import fcntl
except ImportError:  # a system without it is like a file system without locks
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = "run.lock"
_BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


@dataclass
class _Held:
    """A lock of this process, and how many blocks it is held for."""

    number: int | None
    blocks: int = 1


_held: dict[str, _Held] = {}


@contextmanager
def hold_folder(folder: str | Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a folder for a block's time, so that no other process of this package works in it.

    The lock is the system's and goes with the process, however it ends. Blocks of one process may
    be nested. Of several processes of one run only the first one holds the folder. In the block
    files are written into the folder alone: a link in it is not followed.

    Args:
        folder: the folder; it is made if it is not there.
        wait: whether to wait until the other process is done.

    Raises:
        HalocError: if another process holds it; the message says which, and since when.
        SettingsError: if the folder can't be made or written to.
    """
    if not is_first():
        yield
        return
    folder = Path(folder)
    with ExitStack() as stack:
        try:
            make_folder(folder)
            alone = stack.enter_context(_hold(folder / LOCK_FILE, folder, wait))
        except OSError as error:
            raise not_a_folder(folder, error) from None
        stack.enter_context(_own(folder, alone))
        yield


@contextmanager
def hold_file(file: str | Path) -> Iterator[None]:
    """Hold a file that is written again and again; see `hold_folder`.

    The lock is a file beside it, ``FILE.lock``, which is removed at the end.

    Raises:
        HalocError: see `hold_folder`.
        OSError: if nothing can be written there; the error names ``file``.
    """
    if not is_first():
        yield
        return
    file = Path(file)
    with ExitStack() as stack:
        try:
            stack.enter_context(_hold(file.with_name(f"{file.name}.lock"), file, wait=False))
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(file)) from None
        yield


@contextmanager
def _own(folder: Path, alone: bool) -> Iterator[None]:
    """Note that this process works in a folder, for a block's time."""
    path = Path(os.path.abspath(folder))
    if path in own_folders:
        yield
        return
    own_folders[path] = alone
    try:
        yield
    finally:
        own_folders.pop(path, None)


@contextmanager
def _hold(lock: Path, place: Path, wait: bool) -> Iterator[bool]:
    """Hold a lock file; yield whether the lock is good on this file system."""
    key = os.path.join(os.path.realpath(lock.parent), lock.name)
    process = os.getpid()
    if key in _held:
        _held[key].blocks += 1
    else:
        _held[key] = _Held(_take(lock, place, wait))
    held = _held[key]
    try:
        yield held.number is not None and scheduler_step() is None
    finally:
        held.blocks -= 1
        if not held.blocks and os.getpid() == process:
            del _held[key]
            if held.number is not None:
                _release(lock, held.number)


def _take(lock: Path, place: Path, wait: bool) -> int | None:
    """Take a lock file; return its descriptor, or None where there are no locks."""
    while True:
        number = open_to_append(lock)
        try:
            if not _locked(number, lock, place, wait):
                os.close(number)
                return None
            now = os.fstat(number)
            with suppress(FileNotFoundError):
                if os.path.samestat(now, os.stat(lock, follow_symlinks=False)):
                    _sign(number)
                    return number
        except BaseException:
            os.close(number)
            raise
        os.close(number)  # it was removed in the meantime, and another may be there


def _locked(number: int, lock: Path, place: Path, wait: bool) -> bool:
    """Lock an open file; return False where there are no locks, or a process of one run has it."""
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "no locks on this system")
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _BUSY:
            logger.warning("%s: can't be locked (%s); start one process alone", place, error)
            with suppress(OSError):
                os.unlink(lock)
            return False
        holder = _holder(number)
        if scheduler_step() is not None and holder.get("step") == scheduler_step():
            return False
        if not wait:
            raise HalocError(
                f"{place}: another process works here{_signature(holder)}; "
                "wait for its end, or name another place for the results (--out)"
            ) from None
        logger.info("%s: waiting for the process that works here%s", place, _signature(holder))
        fcntl.flock(number, fcntl.LOCK_EX)
    return True


def is_held(folder: str | Path) -> bool:
    """Tell whether a process holds a folder now; False where there are no locks.

    Args:
        folder: the folder. Nothing is written there.
    """
    try:
        number = os.open(Path(folder) / LOCK_FILE, os.O_RDONLY)
    except OSError:
        return False
    try:
        if fcntl is not None:
            fcntl.flock(number, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _BUSY
    finally:
        os.close(number)  # which lets go of the lock, too
    return False


def _sign(number: int) -> None:
    """Write into a lock file who holds it."""
    facts = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "step": scheduler_step(),
    }
    with suppress(OSError):  # a full disk: the lock holds all the same
        os.ftruncate(number, 0)
        os.write(number, json.dumps(facts).encode())


def _holder(number: int) -> dict[str, Any]:
    """Return what a lock file says about its holder; nothing if it is damaged."""
    try:
        facts = json.loads(os.pread(number, 1000, 0))
    except (OSError, ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _signature(holder: Mapping[str, Any]) -> str:
    """Return pid, host and time of a holder, for messages."""
    if not {"pid", "host", "since"} <= set(holder):
        return ""
    return f" (pid {holder['pid']} on {holder['host']}, since {holder['since']})"


def _release(lock: Path, number: int) -> None:
    with suppress(OSError):
        os.unlink(lock)  # while it is held: who waits for it looks whether it is still there
    os.close(number)


def _forget() -> None:
    """Give up, in a process that was forked, the locks of the one it comes from."""
    for held in _held.values():
        if held.number is not None:
            os.close(held.number)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
