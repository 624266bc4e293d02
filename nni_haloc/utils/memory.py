"""What glibc does with memory that was freed: keep it, or give it back to the system."""

from __future__ import annotations

import ctypes
import os

_KEPT = ((-3, 1 << 30), (-1, (1 << 31) - 1), (-2, 1 << 28))
"""glibc's M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_TOP_PAD, and the bytes that they are set to."""


def keep_freed() -> bool:
    """Have glibc keep freed memory for the rest of the process, if there is glibc.

    By default it may give an activation of some megabytes back to the system and take it anew in
    each pass, zeroed page by page. Whether it does depends on what was allocated before, and it can
    treble a layer's time.

    Returns:
        Whether it will.
    """
    try:
        library = ctypes.CDLL(None)
        return all(library.mallopt(option, size) for option, size in _KEPT)
    except (OSError, AttributeError, TypeError):
        return False


def give_back_freed() -> bool:
    """Have glibc give the freed memory that it has kept so far back to the system.

    Where the sizes of buffers change again and again, what it keeps for each size adds up. Nothing
    is done where the environment says what glibc is to keep.

    Returns:
        Whether any was given back.
    """
    tuned = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if tuned or "MALLOC_TRIM_THRESHOLD_" in os.environ:
        return False
    try:
        return bool(ctypes.CDLL(None).malloc_trim(0))
    except (OSError, AttributeError, TypeError):
        return False
