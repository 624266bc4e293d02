"""Write the generated parts of pages, at each line that ends in `<!-- NAME -->`; show other files.

`python docs/hooks/reference.py PAGE` prints a page of `docs/` with its generated parts.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import yaml
from addresses import COPIES, TOP, dead_links, lead_html, lead_markdown
from commands_page import commands
from errors_page import family, messages
from settings_page import preset, settings


def on_page_markdown(markdown, page, files, **_) -> str:
    """Do it while mkdocs builds a page."""
    address = page.file.src_uri
    text = written_out(address, markdown)
    source = TOP / COPIES.get(address, f"docs/{address}")
    return with_captions(lead_markdown(text, source, address, _urls(files)))


def on_page_content(html, page, files, **_) -> str:
    """Make the links of a notebook's page lead to pages, as mkdocs does it in Markdown alone."""
    address = page.file.src_uri
    return lead_html(html, address, _urls(files)) if address.endswith(".ipynb") else html


def on_post_build(config, **_) -> None:
    """Refuse a site with dead links; mkdocs looks at those of Markdown alone."""
    from mkdocs.exceptions import PluginError  # tests import this file without mkdocs

    if dead := list(dead_links(Path(config.site_dir))):
        raise PluginError("links that lead nowhere:\n" + "\n".join(dead))


def _urls(files) -> dict[str, str]:
    """Return path in `docs/` to place in the site, for all that is in the site."""
    return {file.src_uri: file.url for file in files if not file.inclusion.is_excluded()}


def written_out(address: str, markdown: str) -> str:
    """Return a page with its generated parts.

    Args:
        address: the page's path in `docs/`.
        markdown: its text.

    Raises:
        ValueError: if the page lacks the place for one of its parts.
    """
    if address in COPIES:
        return (TOP / COPIES[address]).read_text(encoding="utf-8")
    for name, write in PARTS.get(address, {}).items():
        place = rf"^.*<!-- {name} -->$"  # with the words that stand there for readers of the file
        if len(re.findall(place, markdown, re.MULTILINE)) != 1:
            raise ValueError(f"docs/{address}: expected a line that ends in <!-- {name} --> once")
        text = re.sub(r"\]\((?!https?:|#)", "](../", write())  # links are relative to docs/
        markdown = re.sub(place, lambda _, text=text: text, markdown, flags=re.MULTILINE)
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


PARTS: dict[str, dict[str, Callable[[], str]]] = {
    "reference/settings.md": {"settings": settings, "preset": preset},
    "reference/commands.md": {"commands": commands},
    "reference/errors.md": {"family": family, "messages": messages},
}
"""Pages to the names of their generated parts and what writes them."""

if __name__ == "__main__":
    print(written_out(sys.argv[1], (TOP / "docs" / sys.argv[1]).read_text(encoding="utf-8")))
