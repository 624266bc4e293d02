"""The search space of an experiment: its samplers, and values that a tuner may draw of each."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nni_haloc.utils.errors import SettingsError, expected_one_of

Space = dict[str, Any]

_SAMPLERS = {
    "choice": 1, "randint": 2, "uniform": 2, "quniform": 3, "loguniform": 2, "qloguniform": 3,
    "normal": 2, "qnormal": 3, "lognormal": 2, "qlognormal": 3,
}  # fmt: skip
"""NNI's samplers and how many values each takes."""


_BETWEEN = 0.618
"""Place in a range of a value that, unlike its ends, is seldom a whole number."""


def read_space(path: Path, content: Mapping[str, Any]) -> Space:
    """Return the search space, from the experiment's file itself or from the one that it names.

    Args:
        path: the experiment's file.
        content: what it says.

    Raises:
        SettingsError: if there is none, or two.
    """
    from nni_haloc.inputs.yaml_files import read_search_space

    space, file = content.get("searchSpace"), content.get("searchSpaceFile")
    if space is not None and file is not None:
        why = "NNI would take the file's and drop the other one"
        raise SettingsError(f"{path}: searchSpace: searchSpaceFile is there, too; {why}")
    if file is not None:
        space = read_search_space(path.parent / str(file))
    if space is None:
        raise SettingsError(f"{path}: searchSpace: missing; expected keys with _type and _value")
    if not isinstance(space, dict):
        kind = type(space).__name__
        expected = "expected keys with _type and _value"
        raise SettingsError(f"{path}: searchSpace: {expected}, found {kind}")
    return space


def draw_examples(path: Path, space: Space) -> dict[str, list[Any]]:
    """Return values that a tuner may draw for each key: all of a choice; ends and one more.

    Args:
        path: the experiment's file, for messages.
        space: the search space.

    Raises:
        SettingsError: if a sampler does not exist, or its values make no sense.
    """
    return {key: _examples(f"{path}: searchSpace.{key}", entry) for key, entry in space.items()}


def _examples(where: str, entry: Any) -> list[Any]:
    kind = entry.get("_type") if isinstance(entry, Mapping) else entry
    # a list, because an entry of the file may be of a type without a hash
    if not isinstance(entry, Mapping) or kind not in list(_SAMPLERS):
        likely = kind if isinstance(kind, str) else ""
        expected = expected_one_of(_SAMPLERS, likely).replace(
            f"found {likely!r}", f"found {kind!r}"
        )
        raise SettingsError(f"{where}: _type: {expected}")
    for key in entry:
        if key not in ("_type", "_value"):
            raise SettingsError(f"{where}: {key}: unknown key; expected _type and _value")
    values, count = entry.get("_value"), _SAMPLERS[kind]
    if not isinstance(values, list) or not _enough(kind, values):
        number = f"{count} or more" if kind == "choice" else count
        raise SettingsError(
            f"{where}: _value: expected a list of {number} for {kind}, found {values!r}"
        )
    if kind == "choice":
        _check_sendable(where, values)
        return values
    _check_numbers(where, kind, values)
    _check_range(where, kind, values)
    if kind == "randint":
        return [values[0], values[1] - 1]
    if "normal" in kind:
        mean, spread, *step = values
        near = mean if step else mean + _BETWEEN / 1000 * spread
        drawn = math.exp(near) if "log" in kind else float(near)
        return [round(drawn / step[0]) * step[0] if step else drawn]
    low, high, *step = map(float, values)
    inside = (math.floor(low / step[0]) + 1) * step[0] if step else low + _BETWEEN * (high - low)
    return [low, high, *([inside] if inside < high else [])]


def _enough(kind: str, values: list[Any]) -> bool:
    """Tell if a sampler has as many values as it takes."""
    count = _SAMPLERS[kind]
    return len(values) >= count if kind == "choice" else len(values) == count


def _check_sendable(where: str, values: list[Any]) -> None:
    """Raise `SettingsError` unless NNI can send all values to a trial, which it does as JSON."""
    for value in values:
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            kind = type(value).__name__
            raise SettingsError(
                f"{where}: _value: expected numbers, text, true or false, found {value!r} ({kind})"
            ) from None


def _check_numbers(where: str, kind: str, values: Iterable[Any]) -> None:
    """Raise `SettingsError` unless all are numbers; NNI reads 1e-3 as text (YAML 1.1)."""
    number = int if kind == "randint" else (int, float)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, number):
            raise SettingsError(
                f"{where}: _value: expected numbers for {kind}, found {value!r}{_hint(value)}"
            )
        if not abs(value) < 1e300:
            raise SettingsError(
                f"{where}: _value: expected finite numbers for {kind}, found {str(value)[:20]}"
            )


def _check_range(where: str, kind: str, values: list[float]) -> None:
    """Raise `SettingsError` for a range that is empty, or that has no logarithm or no step."""
    first, second, *step = values
    expected = ""
    if "normal" in kind:
        if not second > 0:
            expected = "a standard deviation above 0 in the second place"
        elif "log" in kind and first > 600:
            expected = "a logarithm in the first place"
    elif not first < second:
        expected = "the lower end before the upper one"
    elif "log" in kind and first <= 0:
        expected = "a lower end above 0"
    if not expected and step and not step[0] > 0:
        expected = "a step above 0 in the third place"
    if expected:
        raise SettingsError(f"{where}: _value: expected {expected} for {kind}, found {values}")


def _hint(value: Any) -> str:
    return (
        " (NNI reads a number with an exponent only with a point, as in 1.0e-3)"
        if isinstance(value, str) and "e" in value.lower()
        else ""
    )
