"""One link serves the repository and the site: where it leads in each, and what is dead."""

import re

import nbformat
import pytest
from helpers.paths import ROOT
from helpers.site import DOCS, addresses

URLS = {
    "index.md": "",
    "leaderboard.md": "leaderboard/",
    "results.md": "results/",
    "how-to/export.md": "how-to/export/",
    "explanation/paper.md": "explanation/paper/",
    "notebooks/own_device.ipynb": "notebooks/own_device/",
    "notebooks/quick_start.ipynb": "notebooks/quick_start/",
    "images/short.png": "images/short.png",
}
"""A site: files in `docs/` to their places."""
BLOB, TREE = (f"{addresses.REPOSITORY}/{kind}/main/" for kind in ("blob", "tree"))
IN_MARKDOWN = {
    ("explanation/paper.md", "../../examples/digits/run.yml"): BLOB + "examples/digits/run.yml",
    ("results.md", "raw/runtimes.jsonl"): BLOB + "docs/raw/runtimes.jsonl",
    ("results.md", "raw"): TREE + "docs/raw",
    ("results.md", "hooks/reference.py#L1"): BLOB + "docs/hooks/reference.py#L1",
    ("results.md", "how-to/export.md#int8"): "how-to/export.md#int8",
    ("how-to/export.md", "../../README.md"): "../index.md",
    ("how-to/export.md", "../images/short.png"): "../images/short.png",
    ("how-to/export.md", "../../LICENSE"): BLOB + "LICENSE",
    ("how-to/export.md", "no-such.md"): "no-such.md",
    ("how-to/export.md", "#int8"): "#int8",
    ("how-to/export.md", "https://pytorch.org/a.md"): "https://pytorch.org/a.md",
    ("how-to/export.md", "mailto:a@b.org"): "mailto:a@b.org",
    ("index.md", "docs/results.md#short"): "results.md#short",
    ("index.md", "docs/images/short.png"): "images/short.png",
    ("index.md", "LICENSE"): BLOB + "LICENSE",
    ("leaderboard.md", "../../docs/results.md"): "results.md",
    ("leaderboard.md", "minutes.py"): BLOB + "tests/benchmarks/minutes.py",
}
IN_NOTEBOOKS = {
    "../how-to/export.md": "../../how-to/export/",
    "../how-to/export.md#int8": "../../how-to/export/#int8",
    "quick_start.ipynb": "../quick_start/",
    "../images/short.png": "../../images/short.png",
    "../index.md": "../../",
    "../raw/short.jsonl": BLOB + "docs/raw/short.jsonl",
    "../../examples/digits/run.yml": BLOB + "examples/digits/run.yml",
    "#Measure": "#Measure",
    "https://pytorch.org": "https://pytorch.org",
    "data:image/png;base64,AA": "data:image/png;base64,AA",
}


@pytest.mark.parametrize(("place", "expected"), IN_MARKDOWN.items())
def test_a_link_in_markdown_leads_to_a_page_or_to_the_repository(place, expected):
    page, link = place
    source = ROOT / addresses.COPIES.get(page, f"docs/{page}")
    text = addresses.lead_markdown(f"see [it]({link}), `x`", source, page, URLS)
    assert text == f"see [it]({expected}), `x`"


@pytest.mark.parametrize(("link", "expected"), IN_NOTEBOOKS.items())
def test_a_link_in_a_notebook_leads_to_a_page_or_to_the_repository(link, expected):
    html = f'<p><a class="x" href="{link}">it</a> and <img src="{link}"></p>'
    found = addresses.lead_html(html, "notebooks/own_device.ipynb", URLS)
    assert found == html.replace(link, expected)


@pytest.mark.parametrize("path", sorted(DOCS.rglob("*.ipynb")), ids=lambda path: path.stem)
def test_links_of_notebooks_lead_to_files(path):
    cells = nbformat.read(path, as_version=4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)\s#]+)", text)
    assert links
    for link in links:
        assert "://" in link or (path.parent / link).is_file(), link


def site(folder, pages):
    """Write pages, each with its links and one heading."""
    for name, links in pages.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        hrefs = "".join(f'<a href="{link}">x</a>' for link in links)
        (folder / name).write_text(f'<h2 id="here">h</h2><a name="old"></a>{hrefs}')
    return folder


LEADS = ["b/", "b/#here", "b/index.html#old", "#here", "file.txt", "b", "https://x.org/a", "?q=1"]
DEAD = ["c/", "b/#there", "../docs/b.md", "b.ipynb", "#there", "file.md", "b/file.txt"]


@pytest.mark.parametrize("link", LEADS + DEAD)
def test_a_dead_link_of_a_built_site_is_found(tmp_path, link):
    site(tmp_path, {"index.html": [link], "b/index.html": ["../", "../#here"], "404.html": ["/z"]})
    (tmp_path / "file.txt").touch()
    expected = [f"index.html: {link}"] if link in DEAD else []
    assert list(addresses.dead_links(tmp_path)) == expected


def test_continuous_integration_lets_warnings_count():
    """`mkdocs -q` silences warnings before strict counts them."""
    for page in (".ci/run", "CONTRIBUTING.md"):
        (line,) = re.findall(r"^.*mkdocs build.*$", (ROOT / page).read_text(), re.MULTILINE)
        assert not re.search(r" (-\w*q|--quiet)\b", line)
    assert "strict: true" in (ROOT / ".mkdocs.yml").read_text()


def test_the_site_has_no_dead_link(tmp_path):
    pytest.importorskip("mkdocs")  # CI builds the site after the tests, as strictly
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    config = load_config(str(ROOT / ".mkdocs.yml"), site_dir=str(tmp_path))
    build(config)  # it raises an error for dead links
    assert (tmp_path / "notebooks/own_device/index.html").is_file()
    assert list(addresses.dead_links(tmp_path)) == []
