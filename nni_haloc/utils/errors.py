"""The errors that users of the package can catch, each with a message of one line.

`HalocError` is the base. Bad arguments of a Python function raise plain ValueError or TypeError.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class HalocError(ValueError):
    """Something that the user can mend. The message is one line: what, where, the remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class SettingsError(HalocError):
    """A setting, an option or a file of settings is wrong; the message names key and file."""


class DataError(HalocError):
    """Images, labels or classes are missing or damaged, or do not fit the network."""


class InfeasibleBudget(HalocError):
    """No network of the rank space fits the budget; the message names the cheapest cost."""


class Diverged(HalocError, ArithmeticError):
    """A loss, a weight or a logit is no longer finite."""


class UnusableCheckpoint(HalocError):
    """A checkpoint can't be read, or was made with other settings."""


class MissingPackage(HalocError, ImportError):
    """A command or a setting needs a package that is not installed; the message says which."""


@contextmanager
def as_one_line(kind: type[HalocError] = SettingsError, where: str = "") -> Iterator[None]:
    """Turn an OSError or a ValueError of the block into an error of the family.

    Args:
        kind: class of the new error. An error that is of the family already passes unchanged.
        where: key, layer or file that the message begins with.
    """
    try:
        yield
    except HalocError:
        raise
    except (OSError, ValueError) as error:
        raise kind(f"{where}: {reason_of(error)}" if where else reason_of(error)) from None


@contextmanager
def needs(*packages: str, what: str, install: str) -> Iterator[None]:
    """Import optional packages, then run a block; one that is missing is one line.

    Args:
        packages: names to import. The block may import others, which are looked after, too.
        what: the command, setting or function that needs them.
        install: what ``pip install`` is to be given: ``onnxruntime``, ``nni-haloc[onnx]``.

    Raises:
        MissingPackage: if one of the packages is not installed.
    """
    try:
        for package in packages:
            import_module(package)
        yield
    except ModuleNotFoundError as error:
        remedy = f"pip install {install!r}" if "[" in install else f"pip install {install}"
        message = f"{what}: needs the package {error.name}, which is not installed ({remedy})"
        raise MissingPackage(message) from None


def printable(message: str, most: int = 1000) -> str:
    """Put a message on one line of at most ``most`` characters; escape what can't be printed."""
    line = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode()
        for c in message
    )
    return line if len(line) <= most else f"{line[: most - 4]} ..."


def first_line(error: BaseException) -> str:
    """Return the first line of another library's message, or the error's class if it has none."""
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


def first_sentence(error: BaseException) -> str:
    """Return the first sentence of a message: torch adds advice to load the file unsafely."""
    return first_line(error).split(". ")[0]


def reason_of(error: Exception) -> str:
    """Return what went wrong; for the system's errors also the file."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def explain(error: ValidationError) -> str:
    """Return pydantic's first error on one line: key, what was expected, what was found."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    found = first.get("input")
    if first["type"] == "extra_forbidden":
        message = "unknown key"
    elif first["type"] == "missing":
        message = "missing"
    elif first["type"] == "value_error":
        message = str(first["ctx"]["error"])
    else:
        shown = (
            repr(found)
            if isinstance(found, (str, int, float, bool, type(None)))
            else type(found).__name__
        )
        message = f"{first['msg'][:1].lower()}{first['msg'][1:]}, found {shown}"
    more = error.error_count() - 1
    return (f"{key}: " if key else "") + message + (f" (and {more} more)" if more else "")
