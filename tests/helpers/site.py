"""The documentation as it is published: pages with their generated parts."""

import re
import sys
from functools import cache

from helpers.paths import ROOT

sys.path.insert(0, str(ROOT / "docs" / "hooks"))
import addresses
import commands_page
import errors_page
import reference

__all__ = [
    "DOCS",
    "PAGES",
    "addresses",
    "anchors",
    "code",
    "commands_page",
    "errors_page",
    "fences",
    "links",
    "reference",
]

DOCS = ROOT / "docs"


def _pages():
    yield from ((name, (ROOT / name).read_text()) for name in ("README.md", "CHANGELOG.md"))
    for path in sorted(DOCS.rglob("*.md")):
        address = path.relative_to(DOCS).as_posix()
        if address in reference.COPIES:  # the files themselves are there
            continue
        yield f"docs/{address}", reference.written_out(address, path.read_text())


PAGES = dict(_pages())
"""Paths in the repository to Markdown."""
_FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


def fences(name):
    """Return the fenced blocks of a page, with their languages."""
    return [(language, text) for _, language, text in _FENCE.findall(PAGES[name])]


def prose(name):
    """Return a page without its fenced blocks."""
    return _FENCE.sub("", PAGES[name])


def code(name):
    """Return what is code in the sentences of a page."""
    return re.findall(r"(?<!`)`([^`]+)`(?!`)", " ".join(prose(name).split("\n")))


def links(name):
    """Return the targets of a page's links and images."""
    text = re.sub(r"``.*?``|`[^`]*`", "", prose(name))
    return re.findall(r"\]\(([^()\s]+)\)", text)


@cache
def anchors(name):
    """Return the places of a page that links can name."""
    found = set()
    for line in re.findall(r"^#{1,6} (.+)$", prose(name), re.MULTILINE):
        title, _, given = line.partition("{ #")
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title)
        words = re.sub(r"[^\w\s-]", "", words).strip().lower()
        found.add(given.strip(" }") or re.sub(r"[-\s]+", "-", words))
    found |= set(re.findall(r"\{ #([\w.\[\]-]+)", prose(name)))
    return found | set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", prose(name)))
