"""The command settings: what the keys of RUN.yml mean."""

from __future__ import annotations

import shutil
from textwrap import TextWrapper
from typing import Annotated

import typer

from nni_haloc.cli.options import COMPRESS

settings = typer.Typer()


@settings.command("settings", rich_help_panel=COMPRESS)
def settings_command(
    key: Annotated[
        str | None,
        typer.Argument(
            metavar="KEY",
            help="A key or a section, such as search.lam or search (default: all keys).",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Explain the keys of RUN.yml: values, default, meaning."""
    from nni_haloc.inputs.config import config_type
    from nni_haloc.inputs.reference import find_settings, list_settings, without_links

    found = list(list_settings(config_type()))
    if key is not None:
        found = find_settings(key, found)
    width = min(100, shutil.get_terminal_size().columns)
    wrapper = TextWrapper(  # names such as nni-haloc[energy] stay whole
        width, subsequent_indent="    ", break_on_hyphens=False, break_long_words=False
    )
    for setting in found:
        default = (
            setting.default if setting.default in ("", "required") else "default " + setting.default
        )
        facts = "; ".join(filter(None, [setting.values.replace("`", ""), default]))
        lines = wrapper.wrap(f"{setting.key}: {facts}")
        meaning = without_links(setting.meaning)
        lines += wrapper.wrap(f"    {meaning}") if meaning else []
        typer.echo("\n".join(lines))
