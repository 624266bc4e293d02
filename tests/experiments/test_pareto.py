"""The front of an experiment's trials."""

import base64

import pytest
from helpers.pages import Page
from hypothesis import given
from hypothesis import strategies as st

from nni_haloc.experiments.front import draw_front, front_of
from nni_haloc.utils.errors import SettingsError


def row(number, top1, cost, original=100.0, **figures):
    trial = {"trial": f"t{number}", "status": "SUCCEEDED", "budget.fraction": 0.5, "default": top1}
    return {
        **trial,
        "top1": top1,
        "original_top1": 0.9,
        "macs": cost,
        "original_macs": original,
    } | figures


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 6)), min_size=1, max_size=12))
def test_a_trial_is_on_the_front_if_no_other_is_better_in_one_figure_and_no_worse_in_the_other(
    figures,
):
    rows = [row(n, top1, cost) for n, (top1, cost) in enumerate(figures)]
    best = {point.trial for point in front_of(rows, "macs") if point.on_front}
    for n, (top1, cost) in enumerate(figures):
        better = [(t, c) for t, c in figures if t >= top1 and c <= cost and (t, c) != (top1, cost)]
        assert (f"t{n}" in best) == (not better)


def test_latencies_are_compared_with_the_original_timed_beside_them():
    """On a machine that was busy during the second trial, the milliseconds say the opposite."""
    rows = [
        row(0, 0.8, 1, latency_ms=5.0, original_latency_ms=10.0),
        row(1, 0.8, 1, latency_ms=8.0, original_latency_ms=40.0),
    ]
    points = front_of(rows)
    assert [(p.trial, p.share, p.on_front) for p in points] == [
        ("t1", 0.2, True),
        ("t0", 0.5, False),
    ]


def test_a_pruned_trial_is_placed_by_its_pruned_network():
    pruned = row(0, 0.8, 50.0, pruned_top1=0.7, pruned_macs=20.0)
    (point,) = front_of([pruned], "macs")
    assert (point.share, point.top1) == (0.2, 0.7)
    assert point.parameters == {"budget.fraction": 0.5}


def test_trials_without_figures_are_left_out():
    running = {"trial": "t1", "status": "RUNNING", "budget.fraction": 0.3}
    assert [point.trial for point in front_of([running, row(0, 0.8, 50.0)], "macs")] == ["t0"]
    with pytest.raises(
        SettingsError, match="^--by: no finished trial has top1 and latency_ms; .* macs"
    ):
        front_of([running, row(0, 0.8, 50.0)])


def test_a_picture_has_a_known_suffix(tmp_path):
    points = front_of([row(0, 0.8, 50.0), row(1, 0.7, 60.0)], "macs")
    draw_front(points, "macs", tmp_path / "front.svg")
    text = (tmp_path / "front.svg").read_text()
    assert text.startswith("<?xml")
    with pytest.raises(SettingsError, match="expected a picture"):
        draw_front(points, "macs", tmp_path / "front.doc")
    assert [file.name for file in tmp_path.iterdir()] == ["front.svg"]


def test_a_front_is_a_page_of_its_own_with_every_trial(tmp_path):
    """The page is read as a browser does; what a tuner set is text in it, not markup."""
    rows = [row(0, 0.8, 50.0), row(1, 0.7, 60.0) | {"budget.fraction": "<b>"}]
    draw_front(front_of(rows, "macs"), "macs", tmp_path / "front.html", "Experiment a1b2")
    page = Page((tmp_path / "front.html").read_text())
    assert "Experiment a1b2" in page.texts
    assert page.rows[1:] == [["t0", "0.5", "50.0", "80.00", "yes"], ["t1", "<b>", "60.0", "70.00"]]
    (picture,) = page.addresses
    assert base64.b64decode(picture.removeprefix("data:image/svg+xml;base64,")).startswith(b"<?xml")
    assert "script" not in page.tags
