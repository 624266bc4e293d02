"""Read the YAML files that a user writes, and say in one line what is wrong with them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from nni_haloc.utils.errors import SettingsError
from nni_haloc.utils.files import why_unreadable


class _Loader(yaml.SafeLoader):
    """Load YAML, reading 1e-3 as a number (YAML 1.1 reads it as text)."""


_Loader.yaml_implicit_resolvers = {
    k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"),
    list("-+0123456789."),
)


_MOST = 100_000
"""Values that a file may have, its aliases written out: a few lines can stand for billions."""


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


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text."""
    return yaml.load(text, _Loader)  # a safe loader


def read_yaml(path: Path, key: str | None = None, *, exponents: bool = True) -> dict[str, Any]:
    """Read the keys and values of a YAML file.

    Args:
        path: the file.
        key: the setting that names the file, for messages.
        exponents: whether ``1e-3`` is a number, as everybody writes it. PyYAML, and so NNI, takes
            it for text.

    Raises:
        SettingsError: names the file and, where it is known, the line.
    """
    where = f"{key}: {path}" if key else f"{path}"
    try:
        text = path.read_text(encoding="utf-8")
        content = parse_yaml(text) if exponents else yaml.safe_load(text)
        size = _count_values(content, {}, _MOST)
    except OSError as error:
        raise SettingsError(f"{where}: {why_unreadable(error)}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"{where}: not a text file") from None
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise SettingsError(f"{where}{line}: not valid YAML ({problem or 'syntax'})") from None
    except RecursionError:
        raise SettingsError(f"{where}: nested too deeply") from None
    if size > _MOST:
        expected = f"expected at most {_MOST} values, its aliases written out"
        raise SettingsError(f"{where}: {expected}; found more")
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise SettingsError(f"{where}: expected keys and values, found {kind}")
    return content
