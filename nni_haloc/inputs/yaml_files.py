"""Read the YAML files that a user writes, and say in one line what is wrong with them."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any, NoReturn

import yaml
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.reader import ReaderError

from nni_haloc.utils.errors import SettingsError, first_line
from nni_haloc.utils.files import read_text, why_unreadable
from nni_haloc.utils.json_text import half_of_a_character, parse_json

_MOST_BYTES = 1 << 20
"""Bytes that a file may have; PyYAML takes seconds for so many."""
_MOST = 100_000
"""Values that a file may have, its aliases written out: a few lines can stand for billions."""
_LONGEST_NUMBER = 310
"""Characters that a number may have; long ones take time that grows with the square."""
_TAG = "tag:yaml.org,2002:"
_MERGE = f"{_TAG}merge"
_PLAIN = [_TAG + name for name in ("null", "bool", "int", "float", "str", "seq", "map")]

_KINDS = {
    f"{_TAG}null": "null (nothing)",
    f"{_TAG}bool": "a boolean (true or false)",
    f"{_TAG}int": "a number",
    f"{_TAG}float": "a number",
    f"{_TAG}timestamp": "a date",
}
"""What YAML takes keys for that look like text: ``on``, ``no``, ``~``, ``1e5``."""

Pairs = list[tuple[Node, Node]]


class _AsNni(yaml.SafeLoader):
    """Load YAML as NNI does, but refuse a key that is given twice, and what takes too long."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._nodes = self._pairs = 0
        self._place: list[str] = []
        self._flat: dict[int, Pairs | None] = {}

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        """Compose a node; count it, and note the keys that lead to it."""
        self._nodes += 1
        if self._nodes > _MOST:
            problem = f"expected at most {_MOST:,} values, found more"
            raise ConstructorError(None, None, problem, self.peek_event().start_mark)
        key = index.value if isinstance(index, ScalarNode) else index
        self._place.append("" if key is None else str(key))
        node = super().compose_node(parent, index)
        if isinstance(node, ScalarNode) and node.tag in (f"{_TAG}int", f"{_TAG}float"):
            size = len(node.value)
            if size > _LONGEST_NUMBER:
                self._refuse(f"expected a number, found one of {size:,} characters", node)
        if isinstance(node, ScalarNode) and (problem := half_of_a_character(node.value)):
            self._refuse(problem, node)
        self._place.pop()
        return node

    def _refuse(self, problem: str, node: Node, *keys: str) -> NoReturn:
        """Raise an error that names the keys that lead to what is composed."""
        place = ".".join(filter(None, [*self._place, *keys]))
        problem = f"{place}: {problem}" if place else problem
        raise ConstructorError(None, None, problem, node.start_mark)

    def compose_mapping_node(self, anchor: Any) -> MappingNode:
        """Compose a mapping; refuse a key that is given twice, or is no text."""
        node: MappingNode = super().compose_mapping_node(anchor)
        keys = set()
        for key, _ in node.value:
            if not isinstance(key, ScalarNode):
                continue  # `construct_mapping` refuses it
            value = self._value_of(key)
            if value in keys:
                remedy = "; write <<: [*one, *other]" if key.tag == _MERGE else ""
                self._refuse(f"given twice{remedy}", key, key.value)
            keys.add(value)
        for key, _ in node.value:
            kind = _KINDS.get(key.tag) if isinstance(key, ScalarNode) else None
            if kind is not None:
                shown = json.dumps(key.value, ensure_ascii=False)
                remedy = f"put the key in quotes: {shown}"
                self._refuse(f"expected text as a key, found {kind}; {remedy}", key, key.value)
        return node

    def _value_of(self, key: ScalarNode) -> Any:
        """Return the value of a key, so that 1 and 01 are the same."""
        if key.tag not in self.yaml_constructors or key.tag == f"{_TAG}str":
            return key.value
        return self.construct_object(key, deep=True)

    def flatten_mapping(self, node: MappingNode) -> None:
        """Replace ``<<`` by what it stands for, each key once."""
        node.value = self._flattened(node)

    def _flattened(self, node: MappingNode) -> Pairs:
        """Return a mapping's pairs and those that it merges, of which the first ones count."""
        if id(node) in self._flat:
            known = self._flat[id(node)]
            if known is None:
                raise ConstructorError(None, None, "<<: merges itself", node.start_mark)
            return known
        self._flat[id(node)] = None
        own = [pair for pair in node.value if pair[0].tag != _MERGE]
        keys = {_identity(key) for key, _ in own}
        merged: Pairs = []
        for key, value in node.value:
            for source in _sources(key, value):
                for pair in self._flattened(source):
                    self._pairs += 1
                    if self._pairs > _MOST:
                        problem = f"<<: expected at most {_MOST:,} values in all, found more"
                        raise ConstructorError(None, None, problem, key.start_mark)
                    if _identity(pair[0]) not in keys:
                        keys.add(_identity(pair[0]))
                        merged.append(pair)
        self._flat[id(node)] = merged + own
        return merged + own

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        """Construct a mapping; an error of a plain value names its key."""
        if not isinstance(node, MappingNode):
            problem = f"expected keys and values, found a {node.id}"
            raise ConstructorError(None, None, problem, node.start_mark)
        self.flatten_mapping(node)
        content: dict[Hashable, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise ConstructorError(None, None, "expected a plain key", key_node.start_mark)
            try:
                content[key] = self.construct_object(value_node, deep=deep)
            except ConstructorError as error:
                if isinstance(value_node, ScalarNode):
                    error.problem = f"{key}: {error.problem}"
                raise
        return content

    def construct_object(self, node: Node, deep: bool = False) -> Any:
        """Construct a value; what PyYAML itself stumbles over is an error with its line."""
        try:
            return super().construct_object(node, deep=deep)
        except yaml.YAMLError:
            raise
        except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
            kind = str(node.tag).removeprefix(_TAG)
            problem = f"not a value of the kind {kind!r} ({first_line(error)})"
            raise ConstructorError(None, None, problem, node.start_mark) from None


class _Loader(_AsNni):
    """Load YAML as JSON has it: no dates, and 1e-3 is a number (YAML 1.1 reads it as text)."""

    def construct_undefined(self, node: Node) -> Any:
        """Refuse a tag."""
        tag = str(node.tag).replace(_TAG, "!!")
        problem = f"the tag {tag} is not known here; write plain values"
        raise ConstructorError(None, None, problem, node.start_mark)


_Loader.yaml_constructors = {
    **{tag: _AsNni.yaml_constructors[tag] for tag in _PLAIN},
    None: _Loader.construct_undefined,
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag != f"{_TAG}timestamp"]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    f"{_TAG}float",
    re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+\Z"),
    list("-+0123456789."),
)


def _sources(key: Node, value: Node) -> list[MappingNode]:
    """Return the mappings that a pair merges; none if its key is not ``<<``."""
    if key.tag != _MERGE:
        return []
    found: list[Any] = value.value if isinstance(value, SequenceNode) else [value]
    for source in found:
        if not isinstance(source, MappingNode):
            problem = f"<<: expected keys and values to merge, found a {source.id}"
            raise ConstructorError(None, None, problem, source.start_mark)
    return found


def _identity(key: Node) -> tuple[str, Any]:
    return key.tag, key.value if isinstance(key, ScalarNode) else id(key)


def _count_values(value: Any, known: dict[int, int], most: int) -> int:
    """Count a document's values with its aliases written out.

    A document that contains itself has more than ``most``.
    """
    inner: list[Any] = []
    if isinstance(value, dict):
        inner = [*value, *value.values()]
    elif isinstance(value, list):
        inner = value
    if not inner:
        return 1
    if id(value) not in known:
        known[id(value)] = most + 1  # for the time of counting, in case it is inside itself
        known[id(value)] = 1 + sum(_count_values(v, known, most) for v in inner)
    return known[id(value)]


def parse_yaml(text: str, where: str = "YAML", *, exponents: bool = True) -> Any:
    """Return the value of a YAML text.

    Args:
        text: the text.
        where: file or option, which messages begin with.
        exponents: see `read_yaml`.

    Raises:
        SettingsError: if it is no YAML, has a key twice, or is too large; names the line, if there
            are several.
    """
    try:
        loader = (_Loader if exponents else _AsNni)(text)
        content = loader.get_single_data()
        size = _count_values(content, {}, _MOST)
    except RecursionError:
        raise SettingsError(f"{where}: nested too deeply") from None
    except ConstructorError as error:
        raise SettingsError(f"{_at(where, text, error)}: {error.problem}") from None
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        found = f"found the character {text[error.position]!a}"
        raise SettingsError(f"{where}, line {line}: expected text, {found}") from None
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or "syntax"
        if problem == "but found another document":
            problem = "expected one document, found another"
        raise SettingsError(f"{_at(where, text, error)}: not valid YAML ({problem})") from None
    except (ValueError, ArithmeticError) as error:  # of an escape or a directive
        line = loader.get_mark().line + 1
        raise SettingsError(f"{where}, line {line}: not valid YAML ({first_line(error)})") from None
    if size > _MOST:
        expected = f"expected at most {_MOST:,} values, its aliases written out"
        raise SettingsError(f"{where}: {expected}; found more")
    return content


def _at(where: str, text: str, error: yaml.YAMLError) -> str:
    """Return the place of an error: file or option, and the line where there are several."""
    mark = getattr(error, "problem_mark", None)
    return f"{where}, line {mark.line + 1}" if mark and "\n" in text else where


def read_yaml(path: Path, key: str | None = None, *, exponents: bool = True) -> dict[str, Any]:
    """Read the keys and values of a YAML file.

    Args:
        path: the file.
        key: the setting that names the file, for messages.
        exponents: whether ``1e-3`` is a number, as everybody writes it, and ``2026-01-02`` is text.
            PyYAML, and so NNI, takes the one for text and the other for a date.

    Raises:
        SettingsError: names the file and, where it is known, line and key.
    """
    where = f"{key}: {path}" if key else f"{path}"
    return _keys_and_values(parse_yaml(_text(path, where), where, exponents=exponents), where)


def read_search_space(path: Path) -> dict[str, Any]:
    """Read the file of an experiment's search space as NNI does: as JSON, or else as YAML.

    Raises:
        SettingsError: see `read_yaml`.
    """
    where = f"searchSpaceFile: {path}"
    text = _text(path, where)
    try:
        content = parse_json(text)
    except ValueError as error:
        if not str(error).startswith("not a JSON file"):
            raise SettingsError(f"{where}, {error}") from None
        content = parse_yaml(text, where, exponents=False)
    return _keys_and_values(content, where)


def _text(path: Path, where: str) -> str:
    try:
        return read_text(path, _MOST_BYTES)
    except OSError as error:
        raise SettingsError(f"{where}: {why_unreadable(error)}") from None
    except ValueError as error:  # also a path that can be none
        raise SettingsError(f"{where}: {error}") from None


def _keys_and_values(content: Any, where: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        kind = "nothing" if content is None else type(content).__name__
        raise SettingsError(f"{where}: expected keys and values, found {kind}")
    return content
