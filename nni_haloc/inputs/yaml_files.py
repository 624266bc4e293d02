"""YAML files that a user writes, and the one line that says what is wrong with them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from nni_haloc.utils.errors import SettingsError


class _Loader(yaml.SafeLoader):
    """Numbers as everybody writes them: YAML 1.1, and so PyYAML, takes 1e-3 for a string."""


_Loader.yaml_implicit_resolvers = {
    k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"),
    list("-+0123456789."),
)


_MOST = 100_000
"""Values of a file. A few lines of aliases of aliases can stand for billions, which nobody means to write."""


def _written_out(value: Any, known: dict[int, int], most: int) -> int:
    """Number of values in a document with its aliases written out; more than ``most`` where one contains itself."""
    inner = (
        [*value, *value.values()]
        if isinstance(value, dict)
        else value
        if isinstance(value, list)
        else ()
    )
    if inner and id(value) not in known:
        known[id(value)] = most + 1  # while it is being counted: it is inside itself
        known[id(value)] = 1 + sum(_written_out(v, known, most) for v in inner)
    return known[id(value)] if inner else 1


def parse_yaml(text: str) -> Any:
    """The value of a YAML text."""
    return yaml.load(text, _Loader)  # a safe loader


def read_yaml(path: Path, key: str | None = None, *, exponents: bool = True) -> dict[str, Any]:
    """The keys and values of a YAML file; `SettingsError` names the file, and ``key`` where it is given.

    ``exponents=False`` reads numbers as PyYAML, and so NNI, does.
    """
    where = f"{key}: " if key else ""
    try:
        content = (parse_yaml if exponents else yaml.safe_load)(path.read_text(encoding="utf-8"))
        size = _written_out(content, {}, _MOST)
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"{where}{path}: {getattr(error, 'strerror', None) or 'not a text file'}"
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise SettingsError(
            f"{where}{path}{line}: not valid YAML ({getattr(error, 'problem', None) or 'syntax'})"
        ) from None
    except RecursionError:
        raise SettingsError(f"{where}{path}: nested too deeply") from None
    if size > _MOST:
        raise SettingsError(
            f"{where}{path}: expected at most {_MOST} values, its aliases written out; found more"
        )
    if not isinstance(content, dict):
        raise SettingsError(
            f"{where}{path}: expected keys and values, found {type(content).__name__}"
        )
    return content
