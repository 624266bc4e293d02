"""What a tuner maximises: its formulas, where it is reported, and which images it is of."""

import json

import pytest
from helpers.paths import DIGITS
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from nni_haloc.inputs.config import load_config
from nni_haloc.inputs.schema.objective import Objective
from nni_haloc.runs.job import Job
from nni_haloc.runs.objective import objective_value
from nni_haloc.runs.run import run
from nni_haloc.utils.errors import SettingsError

ORIGINAL = {"latency_ms": 4.0, "macs": 100.0, "params": 10.0}
COSTS = {"latency_ms": 3.0, "macs": 40.0, "params": 5.0}
VALUES = {
    "the metric": ({}, 0.8),
    "within a limit": ({"kind": "limit", "fraction": 0.75}, 0.8),
    "above a limit, soft": ({"kind": "limit", "fraction": 0.5}, 0.8 * 2 / 3),
    "above a limit, softer": ({"kind": "limit", "absolute": 1.5, "strength": 0.5}, 0.8 * 0.5**0.5),
    "above a limit, hard": ({"kind": "limit", "absolute": 2.0, "penalty": "hard"}, -0.5),
    "of MACs": ({"kind": "limit", "cost": "macs", "fraction": 0.2, "penalty": "hard"}, -1.0),
    "a sum": ({"kind": "sum", "weights": {"metric": 2.0, "latency_ms": -0.2, "params": -1}}, 0.95),
}


@pytest.mark.parametrize("name", VALUES)
def test_the_value_is_that_of_the_formula(name):
    settings, value = VALUES[name]
    found = objective_value(Objective.model_validate(settings), 0.8, COSTS, ORIGINAL)
    assert found == pytest.approx(value)


SHARES = st.floats(0.01, 3)


@given(st.floats(0, 1), st.floats(0, 1), SHARES, SHARES, st.sampled_from(["soft", "hard"]))
def test_less_cost_is_never_worse_and_hard_puts_no_network_above_one_within(a, b, x, y, penalty):
    objective = Objective(kind="limit", fraction=0.5, penalty=penalty)
    low, high = sorted((x, y))
    value = {
        (metric, cost): objective_value(objective, metric, {"latency_ms": 4 * cost}, ORIGINAL)
        for metric in (a, b)
        for cost in (low, high)
    }
    assert value[a, low] >= value[a, high]
    if penalty == "hard" and low <= 0.5 < high:
        assert value[a, low] >= 0 > value[b, high]


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "limit"},
        {"kind": "limit", "fraction": 0.5, "absolute": 1.0},
        {"fraction": 0.5},
        {"kind": "sum"},
        {"weights": {"metric": 1.0}},
        {"kind": "sum", "weights": {"top1": 1.0}},
    ],
)
def test_settings_that_do_not_fit_are_refused(settings):
    with pytest.raises(ValidationError):
        Objective.model_validate(settings)
    changes = {f"objective.{key}": value for key, value in settings.items()}
    with pytest.raises(SettingsError, match=r"run\.yml: objective"):
        load_config(DIGITS, changes)


def test_a_trial_reports_it_all_along_and_test_figures_beside(tmp_path, monkeypatch):
    monkeypatch.setattr(Job, "time", lambda self, costs=None, **networks: TIMES)
    settings = {
        "rule": "uniform", "data.share": 0.2, "finetune.epochs": 1, "recalibration_batches": 1,
        "objective.kind": "limit", "objective.fraction": 0.5, "objective.penalty": "hard",
    }  # fmt: skip
    points = []
    figures = run(load_config(DIGITS, settings), tmp_path, lambda *point: points.append(point))
    assert figures["default"] == pytest.approx(1 - 3 / 2)
    curve = [figures for stage, figures, _ in points if stage == "finetune"]
    assert [point["default"] for point in curve] == pytest.approx([1 - 3 / 2] * 2)
    assert all(0 <= point["top1"] <= 1 for point in curve)
    job = Job(load_config(DIGITS, settings), tmp_path)
    for prefix, split in (("", "val"), ("test_", "test")):
        found = job.accuracy(job.model, job.loader(split))["top1"]
        assert figures[f"original_{prefix}top1"] == pytest.approx(found)
    saved = json.loads((tmp_path / "metrics.json").read_text())
    assert saved["config"]["objective"]["penalty"] == "hard"


TIMES = {"original": 4.0, "compressed": 3.0, "network": 3.0}
