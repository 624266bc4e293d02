"""Parse JSON text strictly: each key once, whole characters, no NaN, no numbers without end."""

from __future__ import annotations

import json
import math
import re
from typing import Any

_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\],]|[^\s{}\[\]:,"]+', re.DOTALL)
_HALF = re.compile("[\ud800-\udfff]")
"""Half of a character in UTF-16, which no file can hold."""
_HALF_ESCAPED = re.compile(r"\\u[dD][89a-fA-F]")
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
        ValueError: if it is no JSON, has a key twice in one object, such numbers, or half of a
            character; the message names the line: ``line 7: costs.conv1: given twice``.
    """
    try:
        content = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_float if finite else float,
            parse_constant=_constant if finite else float,
        )
        if _HALF_ESCAPED.search(text) and (problem := _first_problem(text, finite)):
            raise _Refused(problem)
        return content
    except _Refused as error:
        problem = str(error) or _first_problem(text, finite)
        raise ValueError(problem or "not a JSON file") from None
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


def half_of_a_character(text: str) -> str:
    """Return why a text is refused that has half of a character; an empty text if it has none.

    >>> half_of_a_character(chr(0xD800) + "a")
    "expected text, found half of a character, '\\\\ud800'; write the character itself"
    """
    if found := _HALF.search(text):
        return f"expected text, found half of a character, {found[0]!r}; write the character itself"
    return ""


def _first_problem(text: str, finite: bool) -> str:
    """Return the line and the dotted key of the first thing that `parse_json` refuses.

    The text is valid JSON up to there; it is empty if nothing is refused.
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
            keys, value = seen[-1] if seen else None, json.loads(token)
            problem = half_of_a_character(value)
            if keys is not None and not _is_value(text, match.start()):
                place[-1] = "" if problem else value
                problem = problem or ("given twice" if value in keys else "")
                keys.add(value)
        else:
            problem = _why_refused(token, finite)
        if problem:
            line = text.count("\n", 0, match.start()) + 1
            where = ".".join(str(part) for part in place if part != "")
            return f"line {line}: {where}: {problem}" if where else f"line {line}: {problem}"
    return ""


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
