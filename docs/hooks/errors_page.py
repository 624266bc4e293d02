"""The generated parts of the page on errors: the family, and every message of it."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

from markdown_table import table

import nni_haloc
from nni_haloc.utils import errors
from nni_haloc.utils.errors import HalocError

PACKAGE = Path(nni_haloc.__file__).parent
GAP = "…"
"""Stands for what a message says of the case at hand."""
_LEAST = 6
"""Pairs of letters of a message that says something by its literal parts."""


def family() -> str:
    """Return the classes, and what each means."""
    rows = [
        [f"`{kind.__name__}`", " ".join(inspect.getdoc(kind).split("\n\n")[0].split())]
        for kind in _kinds()
    ]
    return table(["error", "meaning"], rows)


def messages() -> str:
    """Return every message that the source raises, by class and module."""
    everything = sorted(set(raised()))
    parts = []
    for kind in _kinds():
        rows = [
            [f"`` {message} ``", f"`{place}`{{ .name }}"]
            for name, place, message in everything
            if name == kind.__name__
        ]
        if rows:
            parts += [f"### {kind.__name__}", table(["message", "raised in"], rows)]
    return "\n\n".join(parts)


def _kinds() -> list[type[HalocError]]:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    return [kind for kind in kinds if issubclass(kind, HalocError)]


def raised() -> Iterator[tuple[str, str, str]]:
    """Yield the class, the module and the message of every error of the family."""
    names = {kind.__name__ for kind in _kinds()}
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(function, ast.FunctionDef):
                continue
            words = _assigned(function)
            for node in ast.walk(function):
                if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                    name = ast.unparse(node.exc.func)
                    if name in names and node.exc.args:
                        message = re.sub(f"{GAP}+", GAP, text_of(node.exc.args[0], words))
                        if len(re.findall(r"[a-z]{2}", message)) >= _LEAST:
                            yield name, place, message


def _assigned(function: ast.FunctionDef) -> dict[str, ast.expr]:
    """Return the variables of a function that are assigned once."""
    found: dict[str, list[ast.expr]] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found.setdefault(node.targets[0].id, []).append(node.value)
    return {name: values[0] for name, values in found.items() if len(values) == 1}


def text_of(node: ast.expr, words: dict[str, ast.expr]) -> str:
    """Return the literal parts of a text, with a gap for each value in it.

    Args:
        node: the expression.
        words: variables, whose texts are written out.
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part, words) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return text_of(node.value, words)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left, words) + text_of(node.right, words)
    if isinstance(node, ast.Name) and node.id in words:
        rest = {name: value for name, value in words.items() if name != node.id}
        return text_of(words[node.id], rest)
    return GAP
