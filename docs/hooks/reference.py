"""Write the generated parts of the reference into its pages, at each place `<!-- NAME -->`."""

from __future__ import annotations

import re
from collections.abc import Callable

from nni_haloc.inputs.config import PRESETS
from nni_haloc.inputs.reference import Setting, as_yaml, list_settings


def on_page_markdown(markdown: str, page, **_) -> str:
    """Do it while mkdocs builds a page."""
    return written_out(page.file.src_uri, markdown)


def written_out(address: str, markdown: str) -> str:
    """Return a page with its generated parts.

    Args:
        address: the page's path in `docs/`.
        markdown: its text.

    Raises:
        ValueError: if the page lacks the place for one of its parts.
    """
    for name, write in PARTS.get(address, {}).items():
        place = f"<!-- {name} -->"
        if markdown.count(place) != 1:
            raise ValueError(f"docs/{address}: expected {place} once")
        text = re.sub(r"\]\((?!https?:|#)", "](../", write())  # links are relative to docs/
        markdown = markdown.replace(place, text)
    return markdown


def table(columns: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    )


def settings() -> str:
    """Return the keys: those at the top, then a heading and a table for each section."""
    groups: dict[str, list[Setting]] = {"": []}
    titles: dict[str, Setting] = {}
    for setting in list_settings():
        section = setting.key.partition(".")[0] if "." in setting.key else ""
        if setting.is_section:
            titles[setting.key] = setting
        else:
            groups.setdefault(section, []).append(setting)
    parts = ["### At the top", _keys(groups.pop(""))]
    for name, keys in groups.items():
        parts += [f"### `{name}` {{ #{name} }}", titles[name].meaning, _keys(keys)]
    return "\n\n".join(parts)


def _keys(settings: list[Setting]) -> str:
    rows = []
    for setting in settings:
        key = f"[`{setting.key}`](#{setting.key}){{ #{setting.key} .key }}"
        default = setting.default if setting.default in ("", "required") else f"`{setting.default}`"
        rows.append([key, setting.values, default, setting.meaning])
    return table(["key", "takes", "default", "meaning"], rows)


def preset() -> str:
    """Return what `preset: paper` sets."""
    rows = [
        [f"[`{section}.{key}`](#{section}.{key})", f"`{as_yaml(value) or 'null'}`"]
        for section, values in PRESETS["paper"].items()
        for key, value in values.items()
    ]
    return table(["key", "value"], rows)


PARTS: dict[str, dict[str, Callable[[], str]]] = {
    "reference/settings.md": {"settings": settings, "preset": preset},
}
"""Pages to the names of their generated parts and what writes them."""
