"""What is wrong, in one line."""

from __future__ import annotations


class ConfigError(ValueError):
    """One line for the user: which key of which file, what was expected, what was found."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(message: str, most: int = 1000) -> str:
    """A message on one line and of bounded length, whatever names and values from a file are in it."""
    line = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode()
        for c in message
    )
    return line if len(line) <= most else f"{line[: most - 4]} ..."


def first_line(error: Exception) -> str:
    """Of what another library says was wrong; the error's class where it says nothing."""
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


def first_sentence(error: Exception) -> str:
    """`first_line` without what follows: torch goes on with advice to load a file unsafely, in bold."""
    return first_line(error).split(". ")[0]


def reason_of(error: Exception) -> str:
    """What went wrong, for the user; of the system's errors, with which file."""
    return (
        f"{error.filename}: {error.strerror}"
        if isinstance(error, OSError) and error.filename and error.strerror
        else str(error)
    )
