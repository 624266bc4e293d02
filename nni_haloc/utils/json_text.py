"""Parse JSON text strictly: each key once, no NaN, no numbers without end."""

from __future__ import annotations

import json
import math
import re
from typing import Any

_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\],]|[^\s{}\[\]:,"]+', re.DOTALL)
_MOST_DIGITS = 4000
"""Digits that an integer may have: long ones take time that grows with the square."""


class _Refused(Exception):
    """Something that JSON's grammar allows, and this parser does not."""


def parse_json(text: str, *, finite: bool = True) -> Any:
    """Return the value of a JSON text.

    Args:
        text: the text.
        finite: whether NaN, infinity and 1e999 are refused.

    Raises:
        ValueError: if it is no JSON, has a key twice in one object, or such numbers; the
            message names the line: ``line 7: costs.conv1: given twice``.
    """
    try:
        return json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_float if finite else float,
            parse_constant=_constant if finite else float,
        )
    except _Refused:
        raise ValueError(_explain(text, finite)) from None
    except RecursionError:
        raise ValueError("not a JSON file (nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"not a JSON file ({error})") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise _Refused
    return content


def _integer(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise _Refused
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise _Refused
    return value


def _constant(text: str) -> float:
    raise _Refused


def _explain(text: str, finite: bool) -> str:
    """Return the line and the dotted key of the first thing that `parse_json` refuses.

    The text is valid JSON up to there.
    """
    place: list[str | int] = []  # the key or the index in each open object or list
    seen: list[set[str] | None] = []  # the keys of each open object; None for a list
    for match in _TOKEN.finditer(text):
        token, problem = match[0], ""
        if token in "{[":
            seen.append(set() if token == "{" else None)
            place.append("" if token == "{" else 0)
        elif token in "}]":
            seen.pop()
            place.pop()
        elif token == ",":
            last = place[-1]
            place[-1] = last + 1 if isinstance(last, int) else ""
        elif token[0] == '"':
            keys = seen[-1] if seen else None
            if keys is not None and not _is_value(text, match.start()):
                key = json.loads(token)
                place[-1] = key
                problem = "given twice" if key in keys else ""
                keys.add(key)
        else:
            problem = _why_refused(token, finite)
        if problem:
            line = text.count("\n", 0, match.start()) + 1
            where = ".".join(map(str, place))
            return f"line {line}: {where}: {problem}" if where else f"line {line}: {problem}"
    return "not a JSON file"


def _is_value(text: str, start: int) -> bool:
    """Tell whether the string that begins at ``start``, in an object, is a value."""
    while text[start - 1].isspace():
        start -= 1
    return text[start - 1] == ":"


def _why_refused(token: str, finite: bool) -> str:
    """Return why a number is refused; an empty text if it is not."""
    if token.lstrip("-").isdigit():
        digits = len(token)
        return "" if digits <= _MOST_DIGITS else f"expected a number, found one of {digits} digits"
    if token in ("true", "false", "null") or not finite:
        return ""
    return "" if math.isfinite(float(token)) else f"expected a finite number, found {token.lower()}"
