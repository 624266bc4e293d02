"""The classes of a network's outputs, by name: a list in the settings, or a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

from nni_haloc.utils.files import read_text


def read_lines(path: str | Path) -> list[str]:
    """Read the lines of a text file in UTF-8, without those that are empty.

    Raises:
        ValueError: if it is no text file; the message names it.
    """
    try:
        text = read_text(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def class_names(listed: Sequence[str] | str | Path) -> list[str]:
    """Return the class of each output, in order.

    Args:
        listed: the names, or a file that has one in each line.

    Raises:
        OSError: if the file can't be read.
        ValueError: if there is no name, or one stands twice.
    """
    if isinstance(listed, (str, Path)):
        names, where = read_lines(listed), str(listed)
    else:
        names, where = list(listed), "classes"
    if wrong := what_is_wrong(names):
        raise ValueError(f"{where}: {wrong}")
    return names


def what_is_wrong(names: Sequence[str]) -> str:
    """Say why these are not the classes of outputs; empty if they may be."""
    places: dict[str, int] = {}
    for place, name in enumerate(names):
        if not isinstance(name, str) or not name:
            return f"expected names in quotes, one for each output, found {name!r}"
        if name in places:
            return f"expected a name once, found {name!r} for outputs {places[name]} and {place}"
        places[name] = place
    return "" if places else "expected a name for each of the network's outputs, found none"


def places_of(classes: Iterable[str], listed: Sequence[str], where: str) -> dict[str, int]:
    """Return the output of each of the data's classes.

    Args:
        classes: names of the data's classes.
        listed: the class of each output.
        where: the folder or the data set, for messages.

    Raises:
        ValueError: names a class that is not listed.
    """
    places = {name: place for place, name in enumerate(listed)}
    for name in classes:
        if name not in places:
            unknown = f"class {name!r} is none of the {len(places)} names of data.classes"
            close = get_close_matches(name, places, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{where}: {unknown}{hint}")
    return {name: places[name] for name in classes}


def check_same_classes(folders: Mapping[str, Sequence[str]], where: str | Path) -> None:
    """Check that all splits have the same classes.

    Args:
        folders: name of a split's folder to its classes.
        where: the folder that they are in.

    Raises:
        ValueError: names the classes that only one of two folders has.
    """
    (first, expected), *others = folders.items()
    for name, classes in others:
        sides = {first: set(expected) - set(classes), name: set(classes) - set(expected)}
        if any(sides.values()):
            only = "; ".join(
                f"only {side!r} has {some_of(sorted(names))}"
                for side, names in sides.items()
                if names
            )
            remedy = "or name the class of each output in data.classes"
            raise ValueError(
                f"{where}: the classes of {first!r} and {name!r} differ: {only}; "
                f"expected the same folders in both, {remedy}"
            )


def some_of(names: Sequence[str], most: int = 5) -> str:
    """Write a few of the names, and how many there are beyond."""
    shown = ", ".join(map(repr, names[:most]))
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
