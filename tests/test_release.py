"""What a release says of itself: one version, one licence, links that lead somewhere."""

import re
from datetime import date
from distutils.core import run_setup
from types import SimpleNamespace

import pytest
import yaml
from helpers.paths import ROOT

import nni_haloc
from nni_haloc.inputs.registries import DATA


@pytest.fixture(scope="module")
def metadata():
    return run_setup(str(ROOT / "setup.py"), stop_after="init").metadata


def test_setup_and_the_package_have_one_version(metadata):
    assert metadata.version == nni_haloc.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", metadata.version)
    places = [*ROOT.glob("*.py"), *(ROOT / "nni_haloc").rglob("*.py")]
    literal = f'"{metadata.version}"'
    holders = [path.relative_to(ROOT) for path in places if literal in path.read_text()]
    assert [str(path) for path in holders] == ["nni_haloc/__init__.py"]


def test_pythons_of_the_classifiers_are_those_that_are_allowed(metadata):
    pythons = [line.rpartition("3.")[2] for line in metadata.classifiers if ":: 3." in line]
    assert metadata.python_requires == f">=3.{pythons[0]},<3.{int(pythons[-1]) + 1}"


def test_links_of_the_package_index_are_absolute_and_lead_to_files_of_this_repository(metadata):
    readme = (ROOT / "README.md").read_text()
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)\s]+)\)", metadata.long_description)
    assert len(links) == len(re.findall(r"\]\([^)\s]+\)", readme)) > 20
    ours = re.compile(rf"{metadata.url}/(blob|raw)/v{metadata.version}/([^#]+)")
    for image, link in links:
        if link.startswith("#"):
            continue
        assert link.startswith("https://"), link
        if link.startswith(metadata.url):
            kind, place = ours.match(link).groups()
            assert kind == ("raw" if image else "blob")
            assert (ROOT / place).is_file(), link


def read_yaml(place):
    return yaml.safe_load((ROOT / place).read_text())


def test_the_citation_has_what_its_format_requires_and_the_releases_version(metadata):
    citation = read_yaml("CITATION.cff")
    paper = citation["preferred-citation"]
    assert {"cff-version", "message", "title", "authors"} <= {*citation}
    assert {"type", "title", "authors"} <= {*paper}
    assert str(citation["version"]) == metadata.version
    assert citation["license"] == metadata.license
    assert citation["repository-code"] == metadata.url
    names = [f"{each['given-names']} {each['family-names']}" for each in paper["authors"]]
    page = (ROOT / "README.md").read_text()
    assert f"HALOC (AAAI {paper['year']})" in page
    assert [len(names), names[0], names[-1]] == [8, "Jinqi Xiao", "Bo Yuan"]


def test_the_licence_is_the_one_of_the_metadata(metadata):
    first = (ROOT / metadata.license_files[0]).read_text().splitlines()[0]
    assert first == f"{metadata.license} License"


def test_the_changelog_keeps_its_form_and_knows_the_version(metadata):
    text = (ROOT / "CHANGELOG.md").read_text()
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert titles[0] == "[Unreleased]"
    form = re.compile(r"\[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)")
    dated = [form.fullmatch(title) for title in titles[1:]]
    assert all(dated), titles
    versions = [tuple(map(int, match[1].split("."))) for match in dated]
    days = [date.fromisoformat(match[2]) for match in dated]
    assert versions == sorted(versions, reverse=True)
    assert days == sorted(days, reverse=True)
    links = set(re.findall(r"^\[([^\]]+)\]: https://", text, re.MULTILINE))
    assert links == {title.partition("]")[0][1:] for title in titles}
    sections = {*re.findall(r"^### (.*)$", text, re.MULTILINE)}
    assert sections <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    is_out = tuple(map(int, metadata.version.split("."))) in versions
    assert is_out or f"It becomes {metadata.version}." in text


@pytest.mark.parametrize("form", ["bug", "idea"])
def test_forms_for_issues_have_what_their_format_requires(form):
    content = read_yaml(f".github/ISSUE_TEMPLATE/{form}.yml")
    assert {"name", "description", "body"} <= {*content}
    ids = [each["id"] for each in content["body"]]
    assert len(ids) == len({*ids})
    for each in content["body"]:
        assert each["type"] in {"markdown", "input", "textarea", "dropdown", "checkboxes"}
        assert each["attributes"]["label"]


def test_pre_commit_runs_what_ci_runs_beside_the_tests():
    hooks = [
        hook for repo in read_yaml(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]
    ]
    script = (ROOT / ".ci" / "run").read_text()
    lines = re.findall(r"^(?:ruff|mypy|lint-imports)\b.*$", script, re.MULTILINE)
    assert [hook["entry"] for hook in hooks] == lines
    assert all(hook["language"] == "system" and not hook["pass_filenames"] for hook in hooks)


@pytest.mark.parametrize(
    "page", ["CONTRIBUTING.md", "SECURITY.md", "README.md", ".github/pull_request_template.md"]
)
def test_links_between_pages_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\((?![a-z]+:)([^)\s]+)\)", (ROOT / page).read_text()):
        place, _, heading = link.partition("#")
        target = ROOT / (place or page)
        assert target.exists(), link
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if heading else []
        slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}
        assert not heading or heading in slugs, link


def test_the_data_set_of_contributing_is_one():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    try:
        exec(code, {})
        splits = DATA["noise"](SimpleNamespace(shape=(3, 8, 8)))
        images, labels = next(iter(splits.loader("val", 10)))
    finally:
        DATA._added.pop("noise", None)
    assert images.shape == (10, 3, 8, 8)
    assert labels.max() < len(splits.classes)
