"""A run that can be watched: its loggers, `search.json` after each epoch, the page under way."""

import csv
import json
import logging

import pytest
from helpers.pages import Page
from helpers.paths import DIGITS

from nni_haloc.costs.table import CostTable
from nni_haloc.inputs.config import load_config
from nni_haloc.results import watched
from nni_haloc.results.html_report import html_report
from nni_haloc.results.watched import watch_run
from nni_haloc.runs.folder import RunFolder
from nni_haloc.runs.run import run
from nni_haloc.runs.under_way import look
from nni_haloc.training import curves
from nni_haloc.utils.errors import SettingsError
from nni_haloc.utils.locks import hold_folder, is_held

CHANGES = {
    "data.share": 0.25,
    "rank_space": {"step": 8, "calibration_images": 32},
    "search.epochs": 3,
    "finetune.epochs": 2,
    "recalibration_batches": 1,
    "trainer.logger": "csv",
}


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Return what was seen of a run that was killed twice and resumed, and its folder.

    That is, at each report of an epoch, ``search.json`` and the page; after each death, the page.
    Places of the fine-tuning go on behind the search's.
    """
    folder = RunFolder(tmp_path_factory.mktemp("run") / "mine")
    seen, places = [], []

    def report(stage, figures, place):
        place += 3 if stage == "finetune" else 0
        state = json.loads(folder.search_file.read_text())
        seen.append((place, figures, state, Page(html_report(folder.path, refresh=7))))
        if place in (1, 5) and place not in places:
            places.append(place)
            raise Killed

    pages, config = [], load_config(DIGITS, CHANGES)
    for _ in range(2):
        with pytest.raises(Killed):
            run(config, folder.path, report, resume=True)
        pages.append(Page(html_report(folder.path, refresh=7)))
    run(config, folder.path, report, resume=True)
    return folder, seen, pages


def rows_of(folder, version, column):
    """Return the rows of one start of a training that have a column."""
    with (folder / "csv" / f"version_{version}" / "metrics.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row[column]]


def test_search_json_is_the_state_after_each_epoch(stopped):
    """A report comes before the epoch's own file; place 1 comes twice, after the resume."""
    _, seen, _ = stopped
    done = [(place, len(s["curve"]), s["finished"], s.get("epochs")) for place, _, s, _ in seen]
    searching = [(0, 0, False, 3), (1, 1, False, 3), (1, 1, False, 3), (2, 2, False, 3)]
    assert done[:4] == searching
    assert {row[1:] for row in done[4:]} == {(3, True, None)}
    probabilities = [
        [c["probability"] for row in state["layers"].values() for c in row.values()]
        for _, _, state, _ in (seen[0], seen[1], seen[3], seen[4])
    ]
    assert len(set(map(tuple, probabilities))) == 4


def test_its_curve_is_what_was_reported_as_if_nothing_had_happened(stopped, tmp_path):
    folder, seen, _ = stopped
    curve = json.loads(folder.search_file.read_text())["curve"]
    reported = {place: figures for place, figures, _, _ in seen if place < 3}
    assert [point["epoch"] for point in curve] == [1, 2, 3]
    for place, point in enumerate(curve):
        figures = reported[place]
        assert point["top1"] == figures["default"]
        assert {k: point[k] for k in ("train_loss", "expected_cost")} == {
            k: figures[k] for k in ("train_loss", "expected_cost")
        }


def test_the_page_under_way_says_how_far_the_run_is(stopped):
    _, seen, pages = stopped
    texts = [(place, page.text) for place, _, _, page in seen]
    assert "Under way: search, 0 of 3 epochs done" in texts[0][1]
    assert "Under way: search, 1 of 3 epochs done" in texts[1][1]
    assert all("loads itself again every 7 seconds" in text for _, text in texts)
    assert "Under way: fine-tuning, 0 epochs done" in dict(texts)[3]
    assert "Under way: fine-tuning, 1 of 2 epochs done" in dict(texts)[5]
    (row,) = (row for row in seen[1][3].rows if row[:1] == ["block2.conv"])
    layer = seen[1][2]["layers"]["block2.conv"]
    best = max(layer, key=lambda name: layer[name]["probability"])
    original = seen[1][2]["limits"][0]["original_cost"]
    expected = sum(c["probability"] * c["cost"][0] for c in layer.values()) / original
    assert row[1:] == [
        best,
        str(len(layer)),
        f"{100 * layer[best]['probability']:.1f} %",
        f"{100 * expected:.1f} %",
    ]
    assert "Search: expected cost, and top-1 of the sampled networks" in seen[1][3].texts
    for page, where in zip(pages, ("search, 1 of 3", "fine-tuning, 1 of 2"), strict=True):
        assert f"Not finished: {where} epochs done" in page.text
        assert "loads itself again" not in page.text


def test_the_page_of_the_finished_run_is_a_report_and_the_same_each_time(stopped):
    folder, _, _ = stopped
    page = html_report(folder.path, refresh=7)
    assert look(folder) is None
    assert 'http-equiv="refresh"' not in page
    assert "Under way" not in page
    assert html_report(folder.path) == page


def test_the_logger_has_the_expected_cost_and_the_most_probable_of_each_layer(stopped):
    folder, seen, _ = stopped
    share = "search/expected_cost_share"
    first, resumed = (rows_of(folder.searching.path, version, share) for version in range(2))
    table = CostTable.load(folder.costs)
    for row, state in ((first[-1], seen[1][2]), (resumed[-1], seen[4][2])):
        share = 0.0
        for layer, candidates in state["layers"].items():
            p = {name: each["probability"] for name, each in candidates.items()}
            cost = sum(p[name] * table.costs[layer][name] for name in p) / table.original
            assert float(row[f"top_probability/{layer}"]) == pytest.approx(max(p.values()))
            assert float(row[f"expected_cost/{layer}"]) == pytest.approx(cost)
            share += cost
        alone = sum(r["dense"] for n, r in table.costs.items() if n not in state["layers"])
        share += (table.fixed + alone) / table.original
        assert float(row["search/expected_cost_share"]) == pytest.approx(share)
        assert float(row["search/val_top1"]) == pytest.approx(state["curve"][-1]["top1"])
        assert float(row["search/train_loss"]) == pytest.approx(state["curve"][-1]["train_loss"])


def test_every_training_of_the_run_has_the_logger(stopped):
    folder, _, _ = stopped
    history = curves.read(folder.finetuning.history, curves.EPOCH_COLUMNS)
    for column in ("train_loss", "val_top1"):
        starts = [rows_of(folder.finetuning.path, version, column) for version in range(2)]
        values = [float(row[column]) for rows in starts for row in rows]
        # The second epoch was logged before the run was killed in its report, and again.
        assert values[:1] + values[-1:] == pytest.approx(history[column][1:], rel=1e-5)


def test_a_finished_run_starts_no_logger_again(stopped):
    folder, _, _ = stopped
    before = sorted(folder.path.rglob("version_*"))
    run(load_config(DIGITS, CHANGES), folder.path, resume=True)
    assert sorted(folder.path.rglob("version_*")) == before


@pytest.mark.parametrize(
    "content",
    [
        {"version": 1, "finished": False},
        {"version": 1, "finished": False, "epochs": 3, "curve": [], "limits": [], "layers": []},
        {
            "version": 1,
            "finished": False,
            "epochs": 3,
            "curve": [],
            "limits": [],
            "layers": {"a": 1},
        },
        {"version": 7},
    ],
)
def test_a_damaged_search_json_is_named(tmp_path, content):
    (tmp_path / "search.json").write_text(json.dumps(content))
    with pytest.raises(SettingsError, match=r"search\.json: .*expected"):
        html_report(tmp_path)


def test_a_folder_is_held_as_long_as_a_process_works_there(tmp_path):
    assert not is_held(tmp_path)
    with hold_folder(tmp_path):
        assert is_held(tmp_path)
    assert not is_held(tmp_path)
    (tmp_path / "run.lock").write_text("{}")  # of a process that was killed
    assert not is_held(tmp_path)


def test_a_run_that_prepares_its_search_has_a_page_with_its_log(tmp_path):
    with hold_folder(tmp_path):
        (tmp_path / "log.txt").write_text("16:00:00 INFO measuring <b>latency</b>\n")
        page = Page(html_report(tmp_path, refresh=5))
    assert "Under way." in page.text
    assert "16:00:00 INFO measuring <b>latency</b>" in page.text


def test_a_watched_run_is_written_when_it_gets_further_and_once_it_has_ended(tmp_path, monkeypatch):
    """The clock's steps: nothing new, a file that can't be read once, a new line, the end."""
    pages, lock = [], hold_folder(tmp_path)
    make = watched.html_report

    def log(text):
        (tmp_path / "log.txt").write_text(text)

    def damage():
        (tmp_path / "search.json").write_text("{}")

    def mend():
        (tmp_path / "search.json").unlink()
        log("second line\n")

    steps = iter(
        [lambda: None, damage, mend, lambda: None, lambda: lock.__exit__(None, None, None)]
    )
    monkeypatch.setattr(
        watched, "html_report", lambda *a, **o: pages.append(make(*a, **o)) or pages[-1]
    )
    monkeypatch.setattr(watched.time, "sleep", lambda seconds: next(steps)())
    lock.__enter__()
    log("first line\n")
    started = []
    assert watch_run(tmp_path, None, started.append) == tmp_path / "report.html"
    assert started == [tmp_path / "report.html"]
    assert ["first line" in page for page in pages] == [True, False, False]
    assert ['http-equiv="refresh"' in page for page in pages] == [True, True, False]
    assert (tmp_path / "report.html").read_text() == pages[-1]
    assert "Not finished" in pages[-1]


def test_a_page_that_can_never_be_made_ends_the_watching(tmp_path, monkeypatch):
    monkeypatch.setattr(watched.time, "sleep", lambda seconds: None)
    (tmp_path / "search.json").write_text("{}")
    with hold_folder(tmp_path), pytest.raises(SettingsError, match=r"search\.json: expected"):
        watch_run(tmp_path)


def test_a_run_that_nobody_works_at_is_written_once_with_a_warning(stopped, caplog):
    folder, _, _ = stopped
    with caplog.at_level(logging.WARNING, "nni_haloc"):
        assert watch_run(folder.path) == folder.report
    assert "no process works here; the page is written once" in caplog.text


def test_the_former_spelling_is_taken_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING, "nni_haloc"):
        config = load_config(DIGITS, {"search.tensorboard": True})
    assert config.logger == "tensorboard"
    assert "search.tensorboard: deprecated; write trainer.logger: tensorboard" in caplog.text
    with pytest.raises(SettingsError, match=r"search\.tensorboard: expected false .* 'csv'"):
        load_config(DIGITS, {"search.tensorboard": True, "trainer.logger": "csv"})
    with pytest.raises(SettingsError, match=r"trainer\.logger: expected one of none, tensorboard"):
        load_config(DIGITS, {"trainer.logger": "tensorbord"})
