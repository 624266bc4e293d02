"""Write files whole, and read JSON files of a known version."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_ABANDONED = 3600.0
"""Age in seconds at which a partly written file is taken to be abandoned."""


def read_json(path: str | Path, what: str, version: int) -> dict[str, Any]:
    """Read a JSON file of a known version.

    Args:
        path: the file.
        what: what the file is, for messages.
        version: the expected ``version`` in it.

    Raises:
        ValueError: if it is no JSON file, or of another version; the message names it.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from None
    its_version = content.get("version") if isinstance(content, dict) else None
    if isinstance(its_version, bool) or its_version != version:
        raise ValueError(
            f"{path}: expected a {what} of version {version}, found version {its_version!r}"
        )
    return content


def why_unreadable(error: OSError) -> str:
    """Return the reason why a file could not be read, in a few words."""
    return "no such file" if isinstance(error, FileNotFoundError) else str(error.strerror)


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file in one step; several processes may write the same one.

    Raises:
        OSError: if it can't be written; the error names it.
    """
    with whole(path, shared=True) as part:
        part.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


@contextmanager
def whole(path: str | Path, *, shared: bool = False) -> Iterator[Path]:
    """Write a file in one step: it is never seen half written.

    The block writes to a file beside it, which takes its place at the end. If the block fails, the
    old file stays.

    Args:
        path: the file.
        shared: whether other processes may write the same file meanwhile.

    Yields:
        The file to write to.

    Raises:
        OSError: if the system refuses (a full disk, a read-only folder); the error names ``path``.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part" if shared else f"{path.name}.part")
    try:
        if shared:
            _remove_left(path)
        yield part
        os.replace(part, path)
    except BaseException as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        refused = _refused(error)
        if refused is None or refused.filename not in (None, str(part)):
            raise
        raise OSError(refused.errno, refused.strerror, str(path)) from None


def _remove_left(path: Path) -> None:
    """Remove files of processes that were killed while they wrote.

    Such a file is named after its process, so no other process replaces it.
    """
    for part in path.parent.iterdir():
        if re.fullmatch(re.escape(path.name) + r"\.\d+\.part", part.name):
            with suppress(OSError):
                if time.time() - part.stat().st_mtime > _ABANDONED:
                    part.unlink()


def _refused(error: BaseException | None) -> OSError | None:
    """Find the system's error in another one.

    Torch raises its own on top of it, and safetensors has it in the text.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error
        if number := re.search(r"\(os error (\d+)\)", str(error)):
            return OSError(int(number[1]), os.strerror(int(number[1])))
        error = error.__context__
    return None


def is_number(value: Any) -> bool:
    """Tell whether a value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf
