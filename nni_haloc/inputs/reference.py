"""List the keys of the settings with what they take, their default and their meaning."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from nni_haloc.inputs.config import Config
from nni_haloc.inputs.schema.section import Section, Words
from nni_haloc.inputs.schema.values import MOST_FACTOR, Between, OneOf
from nni_haloc.utils.errors import SettingsError, brief

_NULL = type(None)
_BOUNDS = {"ge": "from", "gt": "above", "le": "at most", "lt": "below"}


@dataclass(frozen=True)
class Setting:
    """A key of the settings.

    Attributes:
        key: dotted name, such as ``search.lam``.
        values: what it takes, in words; code is in backticks.
        default: the default as YAML, ``required``, or nothing where the meaning says what happens.
        meaning: Markdown, with links relative to ``docs/``.
        is_section: whether it holds keys of its own.
    """

    key: str
    values: str
    default: str
    meaning: str
    is_section: bool = False


def list_settings(section: type[BaseModel] = Config, place: str = "") -> Iterator[Setting]:
    """Yield every key, each section before the keys in it.

    Args:
        section: the settings; a section of another package's stage, too.
        place: what the keys are prefixed with.
    """
    for name, field in section.model_fields.items():
        key = f"{place}{name}"
        kind, *_ = [*_sections(field.annotation), None]
        default = "required" if field.is_required() else "" if kind else as_yaml(field.default)
        of_class = vars(kind).get("__doc__") if kind else None  # a stage of another package
        text = field.description or (of_class or "").split("\n\n")[0]
        meaning = " ".join(text.split())
        values = _words(field.annotation, field.metadata, without_null=field.default is None)
        is_list = get_origin(field.annotation) is list
        yield Setting(key, values, default, meaning, kind is not None and not is_list)
        if kind:
            yield from list_settings(kind, f"{key}[]." if is_list else f"{key}.")


def find_settings(key: str, settings: Sequence[Setting]) -> list[Setting]:
    """Return a key, or a section with all its keys.

    Raises:
        SettingsError: if there is no such key; it names the nearest ones.
    """
    found = [s for s in settings if s.key == key or s.key.startswith((f"{key}.", f"{key}[]"))]
    if not found:
        near = _nearest(key, [setting.key for setting in settings])
        suggestion = f"; did you mean {' or '.join(near)}?" if near else ""
        remedy = "" if near else "; haloc settings lists all"
        raise SettingsError(f"{brief(key)}: unknown key{suggestion}{remedy}")
    return found


def without_links(markdown: str) -> str:
    """Return Markdown with the text of a link in the place of the link.

    A remark in brackets that is a link alone points to a page, which is not at hand: it is dropped.
    """
    link = r"\[([^][]*)\]\([^)]*\)"
    return re.sub(link, r"\1", re.sub(rf"\s*\({link}\)", "", markdown))


def _nearest(key: str, known: list[str]) -> list[str]:
    """Return three keys at most: those of the same last name, then those that are like it."""
    last = key[:100].rpartition(".")[2]
    same = [name for name in known if name.rpartition(".")[2] == last]
    like = get_close_matches(key[:100], known, 3)
    names = {name.rpartition(".")[2]: name for name in known}
    alike = [names[name] for name in get_close_matches(last, names, 3)]
    return list(dict.fromkeys([*same, *like, *alike]))[:3]


def _sections(annotation: Any) -> list[type[Section]]:
    """Return the sections that may stand somewhere in a type."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections(part)]


def _words(annotation: Any, metadata: Sequence[Any] = (), *, without_null: bool = False) -> str:
    """Say what a type takes.

    Args:
        annotation: the type.
        metadata: bounds and checks of it.
        without_null: whether ``null`` goes without saying, because it is the default.
    """
    annotation, checks = _unwrapped(annotation, metadata)
    names = _names(annotation, checks)
    if isinstance(names, str):
        return names
    if names:
        return _either([f"`{name}`" for name in names])
    if get_origin(annotation) in (Union, UnionType):
        parts = [part for part in get_args(annotation) if not (without_null and part is _NULL)]
        return _either([_words(part, metadata if len(parts) == 1 else ()) for part in parts])
    if get_origin(annotation) is list:
        return f"list of {_words(*get_args(annotation))}"
    if annotation in (int, float):
        return _number("integer" if annotation is int else "number", checks)
    return {bool: "`true` or `false`", _NULL: "`null`", str: "text"}.get(annotation, "section")


def _unwrapped(annotation: Any, metadata: Sequence[Any]) -> tuple[Any, list[Any]]:
    """Return a type without ``Annotated``, and all its bounds and checks, the inner ones first."""
    if get_origin(annotation) is Annotated:
        inner, *further = get_args(annotation)
        return _unwrapped(inner, [*further, *metadata])
    checks = []
    for each in metadata:
        checks += each.metadata if isinstance(each, FieldInfo) else [getattr(each, "func", each)]
    return annotation, checks


def _names(annotation: Any, checks: list[Any]) -> str | list[str]:
    """Return the words that are given for a type, or the names that it takes, or nothing."""
    for check in reversed(checks):
        if isinstance(check, Words):
            return check.text
        if isinstance(check, OneOf):
            return check.names()
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):  # of Literals, as one
        parts = [_unwrapped(part, ())[0] for part in get_args(annotation)]
        if all(get_origin(part) is Literal for part in parts):
            return [name for part in parts for name in get_args(part)]
    return []


def _number(noun: str, checks: list[Any]) -> str:
    """Say between which bounds a number lies."""
    bounds: dict[str, Any] = {}
    for check in checks:
        if isinstance(check, Between):
            bounds |= {"ge": check.low, "le": check.high}
        bounds |= {name: getattr(check, name) for name in _BOUNDS if hasattr(check, name)}
    if bounds.get("le") == MOST_FACTOR:
        return f"{noun}, 0 or more" if bounds["ge"] == 0 else f"{noun} above 0"
    if noun == "integer" and "lt" in bounds:
        bounds["le"] = bounds.pop("lt") - 1
    if bounds.keys() == {"ge", "le"}:
        return f"{noun} from {_figure(bounds['ge'])} to {_figure(bounds['le'])}"
    said = [f"{_BOUNDS[name]} {_figure(bounds[name])}" for name in _BOUNDS if name in bounds]
    return f"{noun} {', '.join(said)}".rstrip()


def _figure(number: Any) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}".replace("e+", "e")


def _either(parts: Sequence[str]) -> str:
    *first, last = parts
    return f"{', '.join(first)} or {last}" if first else last


def as_yaml(value: Any) -> str:
    """Write a default as a file would have it; nothing for an empty one."""
    if value is None or value in ([], {}):
        return ""
    if isinstance(value, float):
        return f"{value:g}"
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
