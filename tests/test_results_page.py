"""The arithmetic of docs/results.md, and that its tables are those of the published rows."""

import hashlib
import json
import re
from types import SimpleNamespace

import pytest
from benchmarks import figures, report
from helpers.paths import ROOT
from scipy import stats

DOCS = ROOT / "docs"


def row(method, top1, seed=0, **changes):
    facts = {"part": "short", "network": "vgg16", "metric": "macs", "fraction": 0.12}
    return facts | {"method": method, "seed": seed, "test_top1": top1, "epochs": 4.0} | changes


def cells(table, method):
    (line,) = [text for text in table.splitlines() if f"| {method} |" in text]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_lead_is_the_mean_of_differences_seed_by_seed_with_students_interval():
    _, high = stats.ttest_rel([84, 85, 86], [83, 83, 86]).confidence_interval(0.95)
    ours, theirs = (0.84, 0.85, 0.86), (0.83, 0.83, 0.86)
    assert report.lead(ours, theirs) == f"+1.00 ± {high - 1:.2f}"
    assert report.lead(ours[:2], theirs[:2]) == "+1.50"
    assert report.lead([], []) == ""


def test_only_seeds_that_both_have_are_compared():
    rows = [row("haloc", 0.84, 1), row("uniform", 0.80, 0), row("uniform", 0.83, 1)]
    found = cells(report.short(rows), "uniform")
    assert found[2:5] == ["81.50 (2)", "+1.00", ""]


def test_a_row_that_was_made_again_takes_the_place_of_the_first():
    rows = [row("haloc", 0.5), row("haloc", 0.84)]
    assert cells(report.short(rows), "the search")[2] == "84.00 (1)"


@pytest.mark.parametrize("images", [250, 10_000])
@pytest.mark.parametrize("points", [1, 3, 9, 18])
def test_with_one_seed_a_lead_counts_outside_the_binomial_interval_of_the_images(points, images):
    ours, theirs = 0.7, 0.7 - points / 100
    spread = stats.binom(images, ours).var() + stats.binom(images, theirs).var()
    outside = points / 100 * images > 1.96 * spread**0.5
    assert report.leads({0: ours}, {0: theirs}, images) is outside
    assert not report.leads({0: theirs}, {0: ours}, images)


@pytest.mark.parametrize("theirs", [[0.83, 0.83, 0.83], [0.80, 0.85, 0.83], [0.85, 0.86, 0.88]])
def test_with_three_seeds_a_lead_counts_outside_students_interval_of_the_differences(theirs):
    ours = [0.84, 0.85, 0.86]
    low, _ = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    found = report.leads(dict(enumerate(ours)), dict(enumerate(theirs)), 10_000)
    assert bool(found) is bool(low > 0)


def test_the_leaderboard_is_bold_only_outside_the_error():
    far, near = {"a": {0: 0.9}, "b": {0: 0.7}, "c": {}}, {"a": {0: 0.829}, "b": {0: 0.828}}
    assert report.mark(far, 250) == ["**90.0**", "70.0", ""]
    assert report.mark(near, 10_000) == ["82.9", "82.8"]
    assert report.mark({"a": {0: 0.9}}, 250) == ["90.0"]


def test_the_leaderboard_is_that_of_the_published_rows():
    page = report.BOARD.read_text()
    assert report.put(page, "leaderboard", report.leaderboard(DOCS / "raw")) == page


def test_a_page_without_the_place_for_a_table_is_refused():
    page = "<!-- short -->\nold\n<!-- end of short -->\n"
    assert report.put(page, "short", "new") == page.replace("old", "new")
    with pytest.raises(ValueError, match="short: expected the page to have its two comments once"):
        report.put(page + page, "short", "new")


def test_the_published_tables_are_those_of_the_published_rows():
    page = (DOCS / "results.md").read_text()
    for name, table in report.tables(DOCS / "raw").items():
        assert report.put(page, name, table) == page, name


@pytest.mark.parametrize(
    ("file", "keys"),
    [
        ("minutes.jsonl", ("network", "method", "budget", "weights")),
        (
            "short.jsonl",
            ("part", "network", "metric", "fraction", "method", "seed", "rate", "start"),
        ),
    ],
)
def test_the_published_rows_are_each_there_once(file, keys):
    rows = [json.loads(line) for line in (DOCS / "raw" / file).read_text().splitlines()]
    named = [tuple(row.get(key) for key in keys) for row in rows]
    assert len(named) == len(set(named)) > 10


PICTURES = sorted(
    {
        found
        for page in [ROOT / "README.md", *DOCS.rglob("*.md")]
        for found in re.findall(r"\]\([./\w-]*images/([^)]+)\)", page.read_text())
    }
)


def test_every_picture_is_shown_somewhere():
    files = {file.relative_to(figures.IMAGES).as_posix() for file in figures.IMAGES.rglob("*.*")}
    assert files - {"figures.yml"} == set(PICTURES) == set(figures.notes())


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_was_drawn_from_the_rows_as_they_are_now(name):
    made = figures.notes()[name]
    assert {"command", "commit", "date", "inputs"} == made.keys()
    for file, digest in made["inputs"].items():
        assert figures.digest(ROOT / file) == digest, f"{file} has changed: {made['command']}"


def test_what_made_a_picture_is_noted_again_when_its_rows_change(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    monkeypatch.setattr(figures.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="abc\n"))
    file, rows = tmp_path / "figures.yml", tmp_path / "rows.jsonl"
    rows.write_text("1")
    figures.note(tmp_path / "a.png", "draw", [rows], file)
    first = figures.notes(file)
    assert first["a.png"]["inputs"] == {"rows.jsonl": hashlib.sha256(b"1").hexdigest()[:16]}
    monkeypatch.setattr(figures.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="def\n"))
    figures.note(tmp_path / "a.png", "draw", [rows], file)
    assert figures.notes(file) == first
    rows.write_text("2")
    figures.note(tmp_path / "a.png", "draw", [rows], file)
    assert figures.notes(file)["a.png"]["commit"] == "def"
