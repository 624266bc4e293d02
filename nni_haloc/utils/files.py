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
"""Seconds after which nobody writes to a part of a file any more."""


def read_json(path: str | Path, what: str, version: int) -> dict[str, Any]:
    """The keys and values of a JSON file of this version; ValueError names the file."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from None
    found = content.get("version") if isinstance(content, dict) else None
    if isinstance(found, bool) or found != version:
        raise ValueError(f"{path}: expected a {what} of version {version}, found version {found!r}")
    return content


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Replace a JSON file at once; several processes may. OSError names it."""
    with whole(path, shared=True) as part:
        part.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


@contextmanager
def whole(path: str | Path, *, shared: bool = False) -> Iterator[Path]:
    """A file to write to beside ``path``, whose place it takes at the end of the block: so none is ever half written.

    Where the block fails, the old file stays. What the system refuses (a full disk, a read-only folder) is an OSError that names ``path``.
    ``shared``: other processes may write the same file meanwhile.
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
    """Remove what a process left that was killed while it wrote the file; its name is of that process alone, so nothing replaces it."""
    for part in path.parent.iterdir():
        if re.fullmatch(re.escape(path.name) + r"\.\d+\.part", part.name):
            with suppress(OSError):
                if time.time() - part.stat().st_mtime > _ABANDONED:
                    part.unlink()


def _refused(error: BaseException | None) -> OSError | None:
    """The system's error in another one: torch raises its own on top of it, safetensors has it in the text."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            return OSError(int(found[1]), os.strerror(int(found[1])))
        error = error.__context__
    return None


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf
