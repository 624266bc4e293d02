"""Write files whole and never through a link; read text and JSON files of a bounded size."""

from __future__ import annotations

import codecs
import errno
import json
import os
import re
import shutil
import stat
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nni_haloc.utils.errors import HalocError, SettingsError
from nni_haloc.utils.json_text import parse_json

MOST_BYTES = 64 << 20
"""Bytes that a JSON file may have, unless its reader says otherwise."""
_ABANDONED = 3600.0
"""Age in seconds at which a partly written file is taken to be abandoned."""
_NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)

own_folders: dict[Path, bool] = {}
"""Folders that this process works in, where no link is followed, and whether it is sure to be alone
there (see `nni_haloc.utils.locks`)."""


def read_text(path: str | Path, most: int = MOST_BYTES) -> str:
    """Read a text file in UTF-8; a byte order mark before it is dropped.

    Args:
        path: the file.
        most: the most bytes that it may have.

    Raises:
        OSError: if it can't be read.
        ValueError: if it is larger, or in another encoding; the message does not name the file.
    """
    with open(path, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"expected at most {most:,} bytes, found more")
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("expected text in UTF-8, found UTF-16; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{data[error.start]:02x}"
        raise ValueError(f"line {line}: expected text in UTF-8, found {found}") from None


def read_json(
    path: str | Path,
    what: str = "",
    version: int | None = None,
    *,
    finite: bool = True,
    most: int = MOST_BYTES,
) -> dict[str, Any]:
    """Read a JSON file of keys and values.

    Args:
        path: the file.
        what: what the file is, for messages.
        version: the expected ``version`` in it (None: any, or none).
        finite: whether NaN and infinity are refused.
        most: the most bytes that it may have.

    Raises:
        OSError: if it can't be read.
        SettingsError: if it is no such file, is of another version, or has a key twice; the
            message names the file and, where it is known, line and key.
    """
    try:
        content = parse_json(read_text(path, most), finite=finite)
    except ValueError as error:
        raise SettingsError(f"{path}: {error}") from None
    if version is None:
        if not isinstance(content, dict):
            kind = type(content).__name__
            raise SettingsError(f"{path}: expected keys and values, found {kind}")
        return content
    found = content.get("version") if isinstance(content, dict) else None
    if isinstance(found, bool) or found != version:
        expected = f"expected a {what} of version {version}"
        raise SettingsError(f"{path}: {expected}, found version {found!r}")
    return content


def why_unreadable(error: OSError) -> str:
    """Return the reason why a file could not be read, in a few words."""
    return "no such file" if isinstance(error, FileNotFoundError) else str(error.strerror)


def not_a_folder(path: str | Path, error: OSError) -> SettingsError:
    """Make the error of a folder that can't be made, or written to."""
    is_file = isinstance(error, (FileExistsError, NotADirectoryError))
    found = "a file" if is_file else str(error.strerror)
    return SettingsError(f"{path}: expected a folder that can be written to, found: {found}")


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file in one step; several processes may write the same one.

    Raises:
        OSError: if it can't be written; the error names it.
        HalocError: if JSON can't hold the content, such as NaN that somebody else's file had.
    """
    try:
        text = json.dumps(content, indent=2, allow_nan=False)
    except (ValueError, TypeError) as error:
        raise HalocError(f"{path}: can't be written ({error})") from None
    with whole(path) as part:
        part.write_text(text + "\n", encoding="utf-8")


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """Write a file in one step: it is never seen half written, after a power cut neither.

    The block writes to a new file beside it, which no other process knows. At the end it is synced
    to the disk and takes the place of ``path``, with the permissions of the file that was there
    (of a new one, those that the process gives); a link there is replaced, not followed. If the
    block fails, the old file stays.

    Args:
        path: the file.

    Yields:
        The file to write to, empty at first.

    Raises:
        OSError: if the system refuses (a full disk, a read-only folder); the error names ``path``.
        SettingsError: if a link in a run's folder leads out of it.
    """
    path = Path(path)
    check_no_link(path.parent)
    part = _unique(path)
    try:
        _remove_left(path)
        kept = _permissions(path)
        first = 0o666 if kept is None else kept | stat.S_IRUSR | stat.S_IWUSR
        os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINK, first))
        made = stat.S_IMODE(part.stat().st_mode)
        yield part  # the block may replace it: safetensors does, by a file for this user alone
        _sync(part, os.O_RDWR | _NO_LINK, made if kept is None else kept)
        os.replace(part, path)
        with suppress(OSError):  # not every system can sync a folder
            _sync(path.parent, os.O_RDONLY)
    except BaseException as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        refused = _refused(error)
        if refused is None or refused.filename not in (None, str(part)):
            raise
        raise OSError(refused.errno, refused.strerror, str(path)) from None


@contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """Make a folder for a block's time, beside the file that the block makes.

    Args:
        path: the file.

    Yields:
        The folder, which no other user can look into.
    """
    folder = _unique(path)
    folder.mkdir(0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_folder(path: str | Path) -> None:
    """Make a folder, and those above it, where they are not there yet.

    Raises:
        OSError: if the system refuses.
        SettingsError: if a link in a run's folder leads out of it.
    """
    check_no_link(Path(path))
    Path(path).mkdir(parents=True, exist_ok=True)


def check_no_link(folder: Path) -> None:
    """Check that a folder is reached without a link, from the one that this process works in on.

    The folder that a user names may be a link; what lies in it is the run's own, and a link there
    would have files replaced that are somewhere else.

    Raises:
        SettingsError: names the link.
    """
    place = Path(os.path.abspath(folder))
    for own in own_folders:
        if not place.is_relative_to(own):
            continue
        for part in (place, *place.parents):
            if part == own:
                break
            if part.is_symlink():
                refused = f"expected a folder of its own, found a link to {os.readlink(part)}"
                raise SettingsError(f"{part}: {refused}; delete it")


def open_to_append(path: str | Path) -> int:
    """Open a file to read it and to append to it; make it if it is not there.

    Returns:
        A file descriptor.

    Raises:
        OSError: if the system refuses.
        SettingsError: if it is a link, of either kind, or no file: what is appended would end up
            somewhere else.
    """
    path = Path(path)
    check_no_link(path.parent)
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_NONBLOCK", 0) | _NO_LINK
    try:
        number = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno != errno.ENOENT and path.is_symlink():
            raise SettingsError(f"{path}: expected a file, found a link; delete it") from None
        raise
    found = os.fstat(number)
    if stat.S_ISREG(found.st_mode) and found.st_nlink > 1:
        why = "found one that has another name elsewhere, too"
    elif not stat.S_ISREG(found.st_mode) and not stat.S_ISCHR(found.st_mode):
        why = "found something else"
    else:
        return number
    os.close(number)
    raise SettingsError(f"{path}: expected a file of its own, {why}; delete it")


def _unique(path: Path) -> Path:
    """Return a name beside a file that nothing has: of this process, and drawn by chance."""
    return path.with_name(f"{path.name}.{os.getpid()}-{os.urandom(4).hex()}.part")


def _permissions(path: Path) -> int | None:
    """Return who may read, write and execute a file; None if there is none, or a link."""
    try:
        mode = path.lstat().st_mode
    except OSError:
        return None
    # Not the bits by which a program runs with its owner's rights: what is written is another's.
    return mode & 0o777 if stat.S_ISREG(mode) else None


def _sync(path: Path, flags: int, permissions: int | None = None) -> None:
    """Wait until a file or a folder is on the disk, with permissions if they are given."""
    number = os.open(path, flags)
    try:
        if permissions is not None and hasattr(os, "fchmod"):
            os.fchmod(number, permissions)
        os.fsync(number)
    finally:
        os.close(number)


def _remove_left(path: Path) -> None:
    """Remove what processes have left that were killed while they wrote.

    Where this process works alone that is removed at once, elsewhere when it is old: another
    process may be writing. Files of earlier versions go, too; folders only with names of ours.
    """
    place = Path(os.path.abspath(path))
    alone = any(alone and place.is_relative_to(own) for own, alone in own_folders.items())
    age = 0.0 if alone else _ABANDONED
    name = re.escape(path.name)
    ours, earlier = re.compile(rf"{name}\.\d+-[0-9a-f]+\.part"), rf"{name}\.\d+\.part"
    if alone:
        earlier += rf"|{name}\.part"
    for part in path.parent.iterdir():
        of_today = ours.fullmatch(part.name) and f".{os.getpid()}-" not in part.name
        if of_today or (re.fullmatch(earlier, part.name) and not part.is_dir()):
            with suppress(OSError):
                if time.time() - part.lstat().st_mtime < age:
                    continue
                if of_today and part.is_dir() and not part.is_symlink():
                    shutil.rmtree(part)
                else:
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
    """Tell whether a value is a finite number, and no larger than a float can be."""
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max
    )
