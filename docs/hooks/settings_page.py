"""The generated parts of the page on settings."""

from __future__ import annotations

from markdown_table import table

from nni_haloc.inputs.config import PRESETS, RECIPES
from nni_haloc.inputs.reference import Setting, as_yaml, list_settings


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
    parts = ["### Top level", _keys(groups.pop(""))]
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
    rows = []
    for name, values in {**PRESETS["paper"], **RECIPES["paper"]}.items():
        for key, value in values.items() if isinstance(values, dict) else [("", values)]:
            dotted = f"{name}.{key}".rstrip(".")
            if isinstance(value, dict):
                text = ", ".join(f"`{each}` for {size} images" for size, each in value.items())
            else:
                text = f"`{as_yaml(value) or 'null'}`"
            fixed = "yes" if name in PRESETS["paper"] else ""
            rows.append([f"[`{dotted}`](#{dotted})", text, fixed])
    return table(["key", "value", "fixed"], rows)
