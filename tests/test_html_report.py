"""The page of a run: what it says, and that nothing of a run's files can harm who opens it. A browser opens it in test_browser.py."""

import base64
import json
import shutil
import string
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cli import DIGITS, haloc

from nni_haloc.config import load_config
from nni_haloc.history import EPOCH_COLUMNS, add_epoch, read
from nni_haloc.html_report import html_report
from nni_haloc.ranks import RankPlan

METRICS = {"default": 0.8532, "baseline_top1": 0.8589, "latency_ms": 2.125, "speedup": 1.42, "macs": 12_345_678, "macs_reduction": 0.7}


class Page(HTMLParser):
    """Tags and their attributes, and the texts between them; ``rows`` of the tables."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.rows, self.addresses = [], [], [], []
        self.feed(text)
        self.text = " ".join(self.texts)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        assert not any(name.startswith("on") for name, _ in attributes)
        if tag == "tr":
            self.rows.append([])

    def handle_data(self, data):
        if self.lasttag == "style" or not data.strip():
            return
        self.texts.append(data.strip())
        if self.lasttag in ("td", "th"):
            self.rows[-1].append(data.strip())


@pytest.fixture
def folder(tmp_path):
    """Of a run by a rule: neither search nor history."""
    RankPlan({"a": (8, 8), "b": None, "c": (4, 6)}, {"rule": "uniform", "budget": 12.5}).save(tmp_path / "ranks.json")
    config = load_config(DIGITS, {"rule": "uniform", "search.clip": None, "rank_space.pin": {"block1.*": [2, 4]}, "scale": 0.25})
    content = {
        "metrics": METRICS,
        "parameters": {"rule": "uniform"},
        "config": config.model_dump(mode="json"),
        "versions": {"torch": "9.8.7"},
    }
    (tmp_path / "metrics.json").write_text(json.dumps(content))
    costs = {"a": {"dense": 100.0, "r8": 25.0}, "b": {"dense": 50.0}, "c": {"dense": 10.0, "r4x6": 5.0}}
    (tmp_path / "costs.json").write_text(json.dumps({"version": 1, "metric": "macs", "fixed": 0, "costs": costs}))
    return tmp_path


def test_a_page_says_what_the_folder_holds_and_leaves_out_the_rest(folder):
    page = Page(html_report(folder))
    rows = {row[0]: row[1:] for row in page.rows}
    assert rows["original"] == ["85.89 %", "1.00", f"{12_345_678 / 0.3:,.0f}"]  # nothing is invented for its latency
    assert rows["compressed"] == ["85.32 %", "2.125", "1.42", "12,345,678"]
    assert rows["a"] == ["8", "2", "100", "25", "25.0 %"]
    assert rows["b"] == ["dense", "1", "50", "50", "100.0 %"]
    assert rows["c"] == ["4 x 6", "2", "10", "5", "50.0 %"]
    assert all(text in page.text for text in ("digits_cnn", "9.8.7", "uniform", "12.5", "0.8532"))
    assert page.tags.count("img") == 1  # the ranks
    assert "Curves" not in page.text
    assert "haloc front" not in page.text


def test_the_original_is_counted_back_from_what_was_reduced(folder):
    content = json.loads((folder / "metrics.json").read_text())
    content["metrics"] = {"macs": 443008, "macs_reduction": 1 - 443008 / 1493632, "params": 5, "params_reduction": 1.0}
    (folder / "metrics.json").write_text(json.dumps(content))
    rows = {row[0]: row[1:] for row in Page(html_report(folder)).rows}
    assert rows["original"] == ["1,493,632"]
    assert rows["compressed"] == ["443,008", "5"]


def test_the_settings_repeat_the_run(folder, tmp_path):
    """`scale` is already in the numbers of epochs and images: taken again, they would be fewer."""
    page = Page(html_report(folder))
    (download,) = [address for address in page.addresses if address.startswith("data:application/yaml;base64,")]
    (tmp_path / "run.yml").write_bytes(base64.b64decode(download.partition(",")[2]))
    ran = load_config(DIGITS, {"rule": "uniform", "search.clip": None, "rank_space.pin": {"block1.*": [2, 4]}, "scale": 0.25})
    assert ran.search.epochs == 5
    assert load_config(tmp_path / "run.yml") == ran.model_copy(update={"scale": 1.0})


def test_what_is_done_to_the_network_afterwards_is_a_row_each(folder):
    for name, top1 in (("pruned", 0.84), ("quantized", 0.83)):
        (folder / name).mkdir()
        (folder / name / "metrics.json").write_text(json.dumps({"metrics": {"default": top1, "latency_ms": 1.5}}))
    rows = [row for row in Page(html_report(folder)).rows if row[0] in ("original", "compressed", "pruned", "quantized")]
    assert [row[0] for row in rows] == ["original", "compressed", "pruned", "quantized"]
    assert rows[2][1:3] == ["84.00 %", "1.5"]


def test_curves_of_a_search_and_of_fine_tuning_are_drawn(folder):
    (folder / "search").mkdir()
    (folder / "search" / "history.csv").write_text(
        "iteration,train_loss,approach_loss,expected_cost,expected_params\n0,1,1,1,1\n1,0.5,1,1,1\n"
    )
    for epoch in range(3):
        add_epoch(folder / "finetuning" / "history.csv", epoch, 1.0 - epoch / 4, 0.5)
    page = html_report(folder)
    assert Page(page).tags.count("img") == 4
    assert f"haloc front {folder} --budgets" in page
    assert page == html_report(folder)  # not of the time it is made at


def test_an_epoch_that_is_done_again_replaces_the_rows_from_there(tmp_path):
    file = tmp_path / "finetuning" / "history.csv"
    for epoch, top1 in ((0, 0.1), (1, 0.2), (2, 0.3), (2, 0.4), (3, 0.5)):
        add_epoch(file, epoch, 1.0, top1)
    assert read(file, EPOCH_COLUMNS)["val_top1"] == [0.1, 0.2, 0.4, 0.5]
    add_epoch(file, 0, 1.0, 0.9)
    assert read(file, EPOCH_COLUMNS)["val_top1"] == [0.9]
    file.write_text("damaged")
    add_epoch(file, 1, 1.0, 0.8)
    assert read(file, EPOCH_COLUMNS)["epoch"] == [1.0]


def test_a_trials_folder_has_the_runs_in_it(folder, tmp_path):
    trial = tmp_path / "TRIAL"
    shutil.copytree(folder, trial / "haloc", ignore=shutil.ignore_patterns("TRIAL"))
    assert "85.32 %" in html_report(trial)
    done = haloc("report", trial)
    assert done.returncode == 0, done.stderr
    assert (trial / "report.html").read_text() == html_report(trial)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("ranks.json", None, "ranks.json: no such file; expected the folder of a finished run"),
        ("ranks.json", "{", "ranks.json: not a JSON file"),
        ("ranks.json", f'{{"version": 1, "ranks": {{"a": [{10**400}]}}}}', "numbers too large to draw"),
        ("metrics.json", "[" * 10**5, "metrics.json: not a JSON file"),
        ("metrics.json", "[]", "metrics.json: expected keys and values, found list"),
        ("metrics.json", '{"config": 3}', "metrics.json: config: expected keys and values, found int"),
        ("costs.json", "{}", "costs.json: expected a cost table"),
        ("search/history.csv", "a,b\n", "search/history.csv: expected the columns"),
    ],
)
def test_a_damaged_file_is_named_on_one_line(folder, file, content, message):
    (folder / "search").mkdir()
    path = folder / file
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError) as found:
        html_report(folder)
    assert message in str(found.value)
    assert "\n" not in str(found.value)


def test_a_page_that_cannot_be_written_is_one_line(folder):
    done = haloc("report", folder, "--out", folder / "ranks.json" / "x.html")
    assert done.returncode == 2
    assert "x.html: expected a file that can be written" in done.stderr
    assert done.stderr.count("\n") == 1


TEXT = st.one_of(
    st.text(max_size=60),
    st.sampled_from(["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "$\\frac$", "x" * 3000, "\x00", "\ud800"]),
    st.text(string.printable, max_size=30),
)
PLAIN = st.one_of(TEXT, st.none(), st.booleans(), st.integers(), st.floats(), st.lists(st.integers(), max_size=2))


def test_a_layer_of_any_name_is_drawn(tmp_path):
    """``$`` begins a formula in figures, a control character ends an SVG file."""
    names = ["<script>alert(1)</script>", "$\\frac$", "$x", "a$", "x" * 3000, "x" * 2999 + "y", "\x00", "\ud800", "名", "-->"]
    (tmp_path / "ranks.json").write_text(json.dumps({"version": 1, "ranks": {name: [4] for name in names}}))
    (address,) = [address for address in Page(html_report(tmp_path)).addresses if address.startswith("data:image/svg+xml;base64,")]
    image = base64.b64decode(address.partition(",")[2])
    ElementTree.fromstring(image)
    assert sum(b"<script" in line for line in image.splitlines()) == 0
    assert len(image) < 300_000


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    layers=st.dictionaries(TEXT, st.one_of(st.none(), st.tuples(st.integers(1, 10**6))), max_size=4),
    facts=st.dictionaries(TEXT, PLAIN, max_size=3),
    metrics=st.dictionaries(st.one_of(TEXT, st.sampled_from(sorted(METRICS))), PLAIN, max_size=4),
    config=st.dictionaries(TEXT, PLAIN, max_size=3),
)
def test_names_and_values_of_files_are_text_whatever_they_are(tmp_path, layers, facts, metrics, config):
    known = {"html", "head", "meta", "title", "style", "body", "header", "h1", "h2", "h3", "p", "ul", "li", "span", "strong", "section",
            "div",
            "table", "thead", "tbody", "tr", "th", "td", "dl", "dt", "dd", "figure", "img", "figcaption", "pre", "code",
            "a"}  # fmt: skip
    (tmp_path / "ranks.json").write_text(
        json.dumps({"version": 1, "ranks": {k: "dense" if v is None else list(v) for k, v in layers.items()}, "chosen_by": facts})
    )
    content = {"metrics": metrics, "config": config, "parameters": metrics, "versions": facts}
    (tmp_path / "metrics.json").write_text(json.dumps(content))
    with pytest.MonkeyPatch.context() as patch:  # drawing is slow, and tested above
        patch.setattr("nni_haloc.html_report._drawn", lambda plan, folder: {"ranks": ("", "data:image/svg+xml;base64,")})
        page = html_report(tmp_path)
    page.encode()
    parsed = Page(page)
    assert set(parsed.tags) <= known
    assert all(address.startswith("data:") for address in parsed.addresses)
