"""Write the generated parts of the reference into its pages, at each place `<!-- NAME -->`."""

from __future__ import annotations

import re
from collections.abc import Callable

from commands_page import commands
from errors_page import family, messages
from settings_page import preset, settings


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


PARTS: dict[str, dict[str, Callable[[], str]]] = {
    "reference/settings.md": {"settings": settings, "preset": preset},
    "reference/commands.md": {"commands": commands},
    "reference/errors.md": {"family": family, "messages": messages},
}
"""Pages to the names of their generated parts and what writes them."""
