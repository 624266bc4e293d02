"""The report of a run, and NNI's web page of the quickstart, in a real browser."""

import json
import shutil

import pytest
from helpers.nni_experiments import get
from helpers.paths import DIGITS

from nni_haloc.inputs.config import load_config
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.results.html_report import html_report
from nni_haloc.results.watched import write_page
from nni_haloc.training.curves import add_epoch
from nni_haloc.utils.locks import hold_folder

playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs the program chromium")

ATTACK = "<script>document.title = 'run'</script><img src=x onerror=\"document.title = 'run'\">"
SERIES = """points => {
    for (const chart of document.querySelectorAll("[_echarts_instance_]")) {
        const key = Object.keys(chart).find(
            name => name.startsWith("__reactFiber") || name.startsWith("__reactInternalInstance"));
        for (let node = chart[key]; node; node = node.return) {
            const option = node.memoizedProps && node.memoizedProps.option;
            const lines = option && option.series && [option.series].flat().map(line => line.data);
            if (lines && lines.length && lines.every(line => line && line.length == points))
                return lines;
        }
    }
}"""
"""JavaScript that returns the numbers of the chart of NNI's page that has so many points a line."""


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = started.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The address of a report whose layers, parameters and settings carry scripts."""
    folder = tmp_path_factory.mktemp("run")
    RankPlan({"conv1": (8, 8), ATTACK: None, "x" * 200: (4, 4)}, {"rule": ATTACK}).save(
        folder / "ranks.json"
    )
    config = load_config(DIGITS).model_dump(mode="json") | {ATTACK: ATTACK}
    stages = {
        "original": {"top1": 0.9375, "macs": 886016},
        "finetune": {"top1": 0.9125, "latency_ms": 2.125, "macs": 443008},
    }
    content = {
        "version": 2,
        "stages": stages,
        "parameters": {"search.lam": ATTACK},
        "config": config,
        "versions": {ATTACK: ATTACK},
    }
    (folder / "metrics.json").write_text(json.dumps(content))
    for epoch in range(3):
        add_epoch(folder / "finetuning" / "history.csv", epoch, 1.0, 0.5)
    (folder / "report.html").write_text(html_report(folder), encoding="utf-8")
    return (folder / "report.html").as_uri()


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_report_opens_alone_and_runs_nothing(browser, report, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    complaints, requests = [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(report)
    assert complaints == []
    assert [url for url in requests if not url.startswith("data:")] == [report]
    images = page.evaluate(
        "[...document.images].map(image => image.complete && image.naturalWidth > 0)"
    )
    assert images == [True, True]  # ranks and fine-tuning
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.title().endswith("HALOC")
    assert page.locator("script").count() == 0
    assert (
        page.get_by_text(ATTACK, exact=True).count() >= 4
    )  # a layer, a rule, a parameter, a version: as text
    table = page.locator("#metrics table").inner_text()
    assert all(number in table for number in ("91.25 %", "93.75 %", "2.125", "443,008", "886,016"))
    page.close()


def test_a_page_under_way_loads_itself_again_until_the_run_has_ended(browser, tmp_path):
    def state(epoch, finished=False):
        row = {
            "r8": {"probability": 0.75, "cost": [2.0]},
            "dense": {"probability": 0.25, "cost": [4.0]},
        }
        curve = [
            {"epoch": 1 + i, "top1": 0.9, "train_loss": 0.1, "expected_cost": 0.3}
            for i in range(epoch)
        ]
        limits = [{"metric": "macs", "original_cost": 10.0}]
        content = {
            "version": 1,
            "finished": finished,
            "epochs": 3,
            "curve": curve,
            "limits": limits,
        }
        (tmp_path / "search.json").write_text(json.dumps({**content, "layers": {ATTACK: row}}))

    page, complaints = browser.new_page(viewport={"width": 400, "height": 900}), []
    page.on("console", lambda message: complaints.append(message.text))
    with hold_folder(tmp_path):
        state(1)
        write_page(tmp_path, refresh=3600)
        page.goto((tmp_path / "report.html").as_uri())
        assert "search, 1 of 3 epochs done" in page.locator(".status").inner_text()
        cells = page.locator("#likely td:visible").all_inner_texts()
        assert [cell for cell in cells if cell] == ["r8", "75.0 %", "25.0 %"]
        images = "[...document.images].map(image => image.naturalWidth > 0)"
        assert page.evaluate(images) == [True]
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        state(2)
        write_page(tmp_path, refresh=1)
        page.reload()
        page.get_by_text("search, 2 of 3 epochs done").wait_for(timeout=30_000)
        state(3)
        write_page(tmp_path, refresh=1)
        page.get_by_text("search, 3 of 3 epochs done").wait_for(timeout=30_000)  # by itself
    RankPlan({ATTACK: (8, 8)}, {"rule": "search"}).save(tmp_path / "ranks.json")
    state(3, finished=True)
    write_page(tmp_path, refresh=1)
    page.locator("#ranks").wait_for(timeout=30_000)
    assert page.locator(".status, meta[http-equiv=refresh], script").count() == 0
    assert complaints == []
    assert page.title().endswith("HALOC")
    page.close()


@pytest.fixture
def trials(browser, experiment):
    """NNI's page of the trials' details, and what the trials reported as the page is to show it."""
    port, _, _ = experiment
    page = browser.new_page(viewport={"width": 1400, "height": 1100})
    page.goto(f"http://127.0.0.1:{port}/detail")
    page.get_by_text("SUCCEEDED").nth(1).wait_for()
    metrics = get(port, "metric-data")
    reported = {
        trial["trialJobId"]: {
            kind: [
                json.loads(json.loads(m["data"]))
                for m in metrics
                if m["trialJobId"] == trial["trialJobId"] and m["type"] == kind
            ]
            for kind in ("PERIODICAL", "FINAL")
        }
        for trial in get(port, "trial-jobs")
    }
    yield page, reported
    page.close()


def test_nni_shows_the_quickstart_as_done(browser, experiment):
    port, number, _ = experiment
    page = browser.new_page(viewport={"width": 1400, "height": 1100})
    page.goto(f"http://127.0.0.1:{port}/oview")
    page.get_by_text("SUCCEEDED").nth(1).wait_for()
    shown = page.locator("body").inner_text()
    assert "DONE" in shown
    assert number in shown
    assert all(trial["trialJobId"] in shown for trial in get(port, "trial-jobs"))
    page.close()


def test_nni_shows_parameters_and_final_metrics_as_columns(trials):
    page, reported = trials
    page.get_by_role("button", name="Add/Remove columns").click()
    for column in ("budget.fraction (space)", "speedup (metric)", "macs_reduction (metric)"):
        page.get_by_text(column, exact=True).click()
    page.get_by_role("button", name="Save").click()
    page.get_by_text("speedup (metric)", exact=True).wait_for()
    rows = page.locator(".ms-DetailsRow")
    for budget, (trial, metrics) in zip((0.5, 0.3), reported.items(), strict=True):
        (final,) = metrics["FINAL"]
        cells = rows.filter(has_text=trial).inner_text().split("\n")
        shown = f"{final['default']:.6f}".rstrip("0").removesuffix(".")  # 0.975000 as 0.975
        assert f"{shown} (FINAL)" in cells
        assert {str(budget), repr(final["speedup"]), repr(final["macs_reduction"])} <= set(cells)


def test_nni_draws_the_intermediate_results(trials):
    page, reported = trials
    page.get_by_role("tab", name="Intermediate result").click()
    curves = [
        [point["default"] for point in metrics["PERIODICAL"]] for metrics in reported.values()
    ]
    assert [len(curve) for curve in curves] == [
        3,
        3,
    ]  # after compression, two epochs of fine-tuning
    assert page.wait_for_function(SERIES, arg=3).json_value() == curves
    assert page.locator("[_echarts_instance_] canvas:visible").count() == 1
