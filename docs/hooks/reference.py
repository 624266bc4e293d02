"""Write the generated parts of pages, at each place `<!-- NAME -->`, and show top-level files."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import yaml
from commands_page import commands
from errors_page import family, messages
from settings_page import preset, settings


def on_page_markdown(markdown: str, page, **_) -> str:
    """Do it while mkdocs builds a page."""
    return with_captions(written_out(page.file.src_uri, markdown))


def written_out(address: str, markdown: str) -> str:
    """Return a page with its generated parts.

    Args:
        address: the page's path in `docs/`.
        markdown: its text.

    Raises:
        ValueError: if the page lacks the place for one of its parts.
    """
    if address in COPIES:
        return _from_the_top(COPIES[address])
    for name, write in PARTS.get(address, {}).items():
        place = f"<!-- {name} -->"
        if markdown.count(place) != 1:
            raise ValueError(f"docs/{address}: expected {place} once")
        text = re.sub(r"\]\((?!https?:|#)", "](../", write())  # links are relative to docs/
        markdown = markdown.replace(place, text)
    return markdown


def with_captions(markdown: str) -> str:
    """Say below each picture what made it: command, commit and date."""
    made = yaml.safe_load((TOP / "docs" / "images" / "figures.yml").read_text(encoding="utf-8"))

    def caption(found: re.Match[str]) -> str:
        note = made[found[1]]
        if note["command"] == "drawn by hand":
            return found[0]
        told = f"`{note['command']}`, commit {note['commit']}, {note['date']}"
        return f"{found[0]}\n<small>Made by {told}.</small>\n"

    return re.sub(r"^!\[[^\]]*\]\([./]*images/([^)]+)\)$", caption, markdown, flags=re.M)


def _from_the_top(name: str) -> str:
    """Return a file of the top level, its links as a page of the site has them."""
    pages = {file: page for page, file in COPIES.items()}

    def link(found: re.Match[str]) -> str:
        path = found[1]
        if path.startswith("docs/"):
            return f"]({path.removeprefix('docs/')})"
        file, hash_, anchor = path.partition("#")
        return f"]({pages.get(file, f'{REPOSITORY}/{file}')}{hash_}{anchor})"

    text = (TOP / name).read_text(encoding="utf-8")
    return re.sub(r"\]\((?!https?:|#|mailto:)([^)\s]+)\)", link, text)


TOP = Path(__file__).parents[2]
REPOSITORY = "https://github.com/nni-haloc/nni-haloc/blob/main"
COPIES = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "leaderboard.md": "tests/benchmarks/README.md",
}
"""Pages that show a file of the top level."""
PARTS: dict[str, dict[str, Callable[[], str]]] = {
    "reference/settings.md": {"settings": settings, "preset": preset},
    "reference/commands.md": {"commands": commands},
    "reference/errors.md": {"family": family, "messages": messages},
}
"""Pages to the names of their generated parts and what writes them."""
