"""The generated part of the page on commands: what each `haloc COMMAND --help` says."""

from __future__ import annotations

import re
from typing import Any

from markdown_table import table
from typer.main import get_command

from nni_haloc.cli.costs import as_app
from nni_haloc.cli.main import app
from nni_haloc.costs.measure import measure_parser


def list_commands() -> dict[str, Any]:
    """Return typer's commands by name, those that the help lists."""
    commands = {n: c for n, c in get_command(app).commands.items() if not c.hidden}
    measure = get_command(as_app(measure_parser()))
    measure.rich_help_panel = commands["measure"].rich_help_panel
    return commands | {"measure": measure}


def commands() -> str:
    """Return a heading for each group, and in it for each command with its options."""
    parts, group = [], None
    for name, command in list_commands().items():
        if command.rich_help_panel != group:
            group = command.rich_help_panel
            parts.append(f"## {group}")
        parts += [
            f"### haloc {name}",
            _text(command.help),
            _usage(name, command),
            _options(command),
        ]
    return "\n\n".join(parts)


def option_names(command: Any) -> list[str]:
    """Return the options of a command, such as `--out`, `--help` too."""
    names = [name for parameter in command.params for name in _names(parameter)]
    return [*(name for name in names if name.startswith("-")), "--help"]


def _names(parameter: Any) -> list[str]:
    return [*parameter.opts, *parameter.secondary_opts]


_CODE = re.compile(
    r"(?<![\w`])(haloc [a-z]+(?: --rule search)?(?: --[a-z][\w-]*)*(?= |[.;,:])"
    r"|--[a-z][\w-]*|[\w/]+\.(?:json|csv|png|yml))\b"
)
"""What is code in the help: commands, options and files."""


def _text(text: str) -> str:
    """Return help as Markdown."""
    return _CODE.sub(r"`\1`", text)


def _usage(name: str, command: Any) -> str:
    words = ["haloc", name]
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            word = parameter.metavar + ("..." if parameter.nargs == -1 else "")
            words.append(word if parameter.required else f"[{word}]")
        elif parameter.required:
            words.append(f"{parameter.opts[0]} {parameter.metavar}")
    return f"```\n{' '.join(words)} [OPTIONS]\n```"


def _options(command: Any) -> str:
    rows = [_row(parameter) for parameter in command.params]
    return table(["option", "meaning", "default"], rows) if rows else ""


def _row(parameter: Any) -> list[str]:
    """Return an option with its values, its meaning and its default."""
    if parameter.param_type_name == "argument":
        names, shown = [parameter.metavar], ""
    else:
        value = f" {parameter.metavar}" if parameter.metavar else ""
        names = [f"{name}{value}" for name in _names(parameter)]
        plain = parameter.default is not None and not parameter.is_flag
        shown = "required" if parameter.required else f"`{parameter.default}`" if plain else ""
    meaning = parameter.help or ""
    if said := re.fullmatch(r"(.*) \(default: (.*)\)\.", meaning):
        meaning, shown = f"{said[1]}.", _text(said[2])
    return [", ".join(f"`{name}`{{ .name }}" for name in names), _text(meaning), shown]
