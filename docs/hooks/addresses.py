"""Where links lead: one link for the repository and the site, and a check of the built site."""

from __future__ import annotations

import os
import re
from collections.abc import Container, Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOP = Path(__file__).parents[2]
DOCS = TOP / "docs"
REPOSITORY = "https://github.com/nni-haloc/nni-haloc"
_IN_MARKDOWN = re.compile(r"(\]\()([^()\s]+)(?=\))")
_IN_HTML = re.compile(r"""(\b(?:href|src)=")([^"]+)(?=")""")


def lead_markdown(text: str, source: Path, page: str, site: Container[str]) -> str:
    """Return Markdown whose links are a page's of the site.

    Args:
        text: Markdown, with links as the repository has them.
        source: the file that the text is from.
        page: path in `docs/` of the page that shows it.
        site: paths in `docs/` of all that is in the site.
    """
    return _IN_MARKDOWN.sub(lambda link: link[1] + address(link[2], source, page, site), text)


def lead_html(html: str, page: str, urls: dict[str, str]) -> str:
    """Return the HTML of a notebook, whose links mkdocs leaves as they are.

    Args:
        html: its links lead to files, as those of the notebook do.
        page: path of the notebook in `docs/`.
        urls: path in `docs/` to place in the site, for all that is in the site.
    """

    def lead(link: re.Match[str]) -> str:
        there = address(link[2], DOCS / page, page, urls)
        path, hash_, anchor = there.partition("#")
        file = os.path.normpath(os.path.join(os.path.dirname(page), path))
        if not _is_path(there) or file not in urls:
            return link[1] + there
        url = urls[file] or "./"
        slash = "/" if url.endswith("/") else ""
        return link[1] + os.path.relpath(url, urls[page]) + slash + hash_ + anchor

    return _IN_HTML.sub(lead, html)


def address(link: str, source: Path, page: str, site: Container[str]) -> str:
    """Return where a link leads in the site: a page, or the repository for all other files.

    Args:
        link: as the file `source` has it. What leads to no file stays as it is.
        source: the file that has the link.
        page: path in `docs/` of the page that shows the file.
        site: paths in `docs/` of all that is in the site.
    """
    path, hash_, anchor = link.partition("#")
    target = Path(os.path.normpath(source.parent / unquote(path)))
    if not _is_path(link) or not target.exists():
        return link
    file = target.relative_to(TOP).as_posix()
    in_docs = _PAGES.get(file) or os.path.relpath(target, DOCS)
    if in_docs in site:
        return os.path.relpath(in_docs, os.path.dirname(page)) + hash_ + anchor
    return f"{REPOSITORY}/{'tree' if target.is_dir() else 'blob'}/main/{file}{hash_}{anchor}"


def _is_path(link: str) -> bool:
    """Whether a link names a file, beside an anchor perhaps."""
    parts = urlsplit(link)
    return bool(parts.path) and not parts.scheme and not parts.netloc


COPIES = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "leaderboard.md": "tests/benchmarks/README.md",
}
"""Pages that show a file from outside of `docs/`."""
_PAGES = {file: page for page, file in COPIES.items()}


class _Page(HTMLParser):
    """The links of a page, and the places in it that links can name."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Note what the tag links to and what it is called."""
        for name, value in attributes:
            if name in ("href", "src") and value:
                self.links.append(value)
            elif name == "id" or (name == "name" and tag == "a"):
                self.places.add(value or "")


def dead_links(site: Path) -> Iterator[str]:
    """Yield `PAGE: LINK` for each link of a built site that leads nowhere in it.

    Args:
        site: the folder of the site. Links to other hosts are not followed.
    """
    pages = {file: _Page(file.read_text(encoding="utf-8")) for file in sorted(site.rglob("*.html"))}
    for file, page in pages.items():
        if file.name == "404.html":
            continue  # its links are absolute, for whatever address was asked for
        for link in sorted(set(page.links)):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (
                Path(os.path.normpath(file.parent / unquote(parts.path))) if parts.path else file
            )
            target = target / "index.html" if target.is_dir() else target
            places = pages[target].places if target in pages else set()
            anchor = unquote(parts.fragment)
            if not target.exists() or (anchor and target in pages and anchor not in places):
                yield f"{file.relative_to(site)}: {link}"
