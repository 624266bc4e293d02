"""A budget in a metric that is measured: what the finished network really takes of it."""

import json
import logging

import pytest
import torch
from helpers.paths import DIGITS
from helpers.short_runs import SETTINGS
from hypothesis import example, given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from nni_haloc import compress_model, load_config, run
from nni_haloc.cli.summary import print_summary
from nni_haloc.costs.analytic import mac_table
from nni_haloc.costs.device.torch_runtime import TorchRuntime, hardware
from nni_haloc.costs.table import CostTable
from nni_haloc.inputs.models import build_model
from nni_haloc.inputs.registries import RUNTIMES
from nni_haloc.results.html_report import html_report
from nni_haloc.runs.folder import RunFolder
from nni_haloc.runs.kept import measured_of_budget
from nni_haloc.space.ranks import AllowedRanks
from nni_haloc.utils.log import logger

SHORT = SETTINGS | {"finetune.epochs": 1, "finetune.schedule": "constant", "rule": "uniform"}


@pytest.fixture
def warnings(caplog, monkeypatch):
    """Call for the warnings so far, but for those of settings that a rule does not use."""
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.INFO, logger.name)

    def warned():
        found = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
        return [text for text in found if "not used by the rule" not in text]

    return warned


positive = st.floats(1e-6, 1e6)
METRICS = ("latency_ms", "energy_mj", "macs", "cycles")


@given(st.lists(st.tuples(st.sampled_from(METRICS), positive, st.booleans())), positive, positive)
@example([("latency_ms", 2.0, True), ("energy_mj", 1.0, True)], 2.0, 2.0)
def test_the_figure_is_the_measured_cost_over_the_smallest_budget_of_this_device(
    limits, milliseconds, millijoules
):
    taken = {"latency_ms": milliseconds, "energy_mj": millijoules}
    found = measured_of_budget(
        [
            ({"metric": metric, "budget": budget, "cost": 1.0}, {} if here else {"device": "other"})
            for metric, budget, here in limits
        ],
        "here",
        taken.__getitem__,
    )
    expected = {}
    for metric, cost in taken.items():
        budgets = [budget for name, budget, here in limits if here and name == metric]
        if budgets:
            expected[f"{metric}_of_budget"] = cost / min(budgets)
    if expected:
        expected["budget_met"] = float(max(expected.values()) <= 1.03)
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("share", "warned"), [(0.3, False), (1.0, False), (1.0299, False), (1.0301, True), (2.07, True)]
)
def test_more_than_three_percent_above_it_is_a_warning_with_the_number(warnings, share, warned):
    facts = {"metric": "latency_ms", "budget": 8.0, "cost": 7.9}
    found = measured_of_budget([(facts, {})], "here", lambda metric: 8.0 * share)
    assert found == {"latency_ms_of_budget": pytest.approx(share), "budget_met": not warned}
    assert len(warnings()) == warned
    if warned:
        line = f"takes {8 * share:.4g} ms, {share:.2f} times its budget of 8 ms; by the cost table"
        assert line in warnings()[0]
        assert "7.9 of 8 ms" in warnings()[0]


def test_a_slower_machine_than_the_tables_is_no_missed_budget(warnings):
    """The table has 10 ms for the original; now both networks take twice as long."""
    facts = {"metric": "latency_ms", "budget": 5.0, "cost": 4.9, "fraction": 0.5}
    found = measured_of_budget([(facts, {})], "here", lambda metric: 9.9, {"latency_ms": 20.0})
    assert found["latency_ms_of_budget"] == pytest.approx(0.99)
    assert found["budget_met"] == 1.0
    assert not warnings()
    measured_of_budget([(facts, {})], "here", lambda metric: 12.0, {"latency_ms": 20.0})
    assert "1.20 times its budget, 50.0 % of the original's 20 ms" in warnings()[0]


@given(st.floats(0.01, 1), positive, positive, positive)
def test_a_fraction_is_one_of_the_original_as_it_is_timed_beside_the_network(
    fraction, by_table, original, compressed
):
    facts = {"metric": "latency_ms", "budget": fraction * by_table, "cost": 1.0}
    found = measured_of_budget(
        [({**facts, "fraction": fraction}, {})],
        "here",
        lambda metric: compressed,
        {"latency_ms": original},
    )
    assert found["measured_share"] == pytest.approx(compressed / original)
    assert found["budget_met"] == (compressed <= 1.03 * (fraction * original))
    assert found["latency_ms_of_budget"] == pytest.approx(compressed / (fraction * original))


def test_what_cant_be_measured_here_costs_no_finished_run(warnings):
    def measure(metric):
        raise ValueError("energy_mj: expected a runtime that measures energy")

    facts = {"metric": "energy_mj", "budget": 8.0, "cost": 7.9}
    assert measured_of_budget([(facts, {})], "here", measure) == {}
    assert "energy_mj: the network can't be measured here: energy_mj: expected" in warnings()[0]


def digits_table(path, metric, total, **identity):
    """A cost table of the digits network whose original takes ``total``: MACs by another name."""
    counted = mac_table(build_model("digits_cnn"), torch.zeros(1, 1, 8, 8), AllowedRanks(4))
    scale = total / counted.original
    costs = {
        layer: {name: cost * scale for name, cost in row.items()}
        for layer, row in counted.costs.items()
    }
    table = CostTable(metric, costs, counted.fixed * scale, {"input": [4, 1, 8, 8], **identity})
    table.save(path)
    return table


def changes(table, **others):
    section = {"cost.metric": "latency_ms", "cost.table": str(table), "cost.batch_size": 4}
    return SHORT | section | {"budget.fraction": 0.5, "budget.check": "skip"} | others


def test_a_run_by_a_table_that_is_wrong_says_so_everywhere(tmp_path, warnings, capsys):
    """The table has a thousandth of what such a network takes, so no network keeps the budget."""
    digits_table(tmp_path / "costs.json", "latency_ms", 1e-6)
    settings = changes(tmp_path / "costs.json")
    del settings["budget.fraction"]
    config = load_config(DIGITS, settings | {"budget": {"absolute": 0.5e-6, "check": "skip"}})
    flat = run(config, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    figures = json.loads(folder.metrics_file.read_text())["stages"]["finetune"]
    budget = json.loads(folder.ranks.read_text())["chosen_by"]["budget"]
    assert budget == pytest.approx(0.5e-6)
    share = figures["latency_ms"] / budget
    assert figures["latency_ms_of_budget"] == flat["latency_ms_of_budget"] == pytest.approx(share)
    assert share > 1.05
    (line,) = [text for text in warnings() if "times its budget" in text]
    assert f"{share:.2f} times its budget of 5e-07 ms" in line
    print_summary(folder.path, folder.metrics())
    assert f"{100 * share:.1f} %" in capsys.readouterr().out
    page = html_report(folder.path)
    assert "latency, of the budget" in page
    assert page.count(f"{100 * share:.1f} %") == 3  # in the table, on the card and in a doubt


@pytest.mark.parametrize(("taken", "missed"), [(0.51, False), (0.6, True)])
def test_a_run_says_whether_it_meets_a_fraction(tmp_path, warnings, monkeypatch, taken, missed):
    """By a clock that gives the original 10 ms, whatever the table says."""
    clock = lambda networks, *_, **__: dict.fromkeys(networks, 10 * taken) | {"original": 10.0}  # noqa: E731
    monkeypatch.setattr("nni_haloc.runs.job.measure_latency", clock)
    digits_table(tmp_path / "costs.json", "latency_ms", 1e6, device=hardware("cpu"))
    flat = run(load_config(DIGITS, changes(tmp_path / "costs.json")), tmp_path / "run")
    assert flat["latency_ms_of_budget"] == pytest.approx(taken / 0.5)
    assert flat["budget_met"] == 1 - missed
    assert any("times its budget" in line for line in warnings()) == missed


@pytest.mark.parametrize(
    ("metric", "identity"),
    [("macs", {}), ("latency_ms", {"device": "a board", "runtime": "torch 2", "threads": 1})],
)
def test_a_count_or_another_devices_table_has_no_such_figure(tmp_path, warnings, metric, identity):
    digits_table(tmp_path / "costs.json", metric, 1.0, **identity)
    settings = changes(tmp_path / "costs.json", **{"cost.metric": metric})
    flat = run(load_config(DIGITS, settings), tmp_path / "run")
    assert not any("of_budget" in key for key in flat)
    assert not warnings()


def test_each_limit_is_looked_at_and_energy_is_measured(tmp_path, warnings, monkeypatch):
    """By a runtime of another package that has a meter: a millijoule for each million weights."""

    class Metered(TorchRuntime):
        def ready(self, module, *shapes, copied=True):
            pass_ = super().ready(module, *shapes, copied=copied)
            run = lambda: pass_()  # noqa: E731
            run.weights = sum(p.numel() for p in module.parameters())
            return run

        def energy(self, run, min_run_time=0.0):
            return run.weights / 1e6

    monkeypatch.setitem(RUNTIMES._added, "metered", Metered)
    digits_table(tmp_path / "ms.json", "latency_ms", 1e9)
    digits_table(tmp_path / "mj.json", "energy_mj", 0.02)
    also = [{"metric": "energy_mj", "table": str(tmp_path / "mj.json"), "fraction": 0.9}]
    settings = changes(tmp_path / "ms.json", **{"cost.runtime": "metered", "budget.also": also})
    flat = run(load_config(DIGITS, settings), tmp_path / "run")
    assert flat["energy_mj_of_budget"] == pytest.approx(flat["params"] / 1e6 / (0.9 * 0.02))
    asked = 0.5 * flat["original_latency_ms"]
    assert flat["latency_ms_of_budget"] == pytest.approx(flat["latency_ms"] / asked)
    assert ("energy_mj" in "".join(warnings())) == (flat["energy_mj_of_budget"] > 1.05)


@pytest.mark.parametrize(("taken", "missed"), [(0.61, False), (0.7, True)])
def test_one_call_says_it_too(net, images, warnings, monkeypatch, taken, missed):
    clock = lambda networks, *_, **__: {"original": 10.0, "compressed": 10 * taken}  # noqa: E731
    monkeypatch.setattr("nni_haloc.runs.compress_model.measure_latency", clock)
    loader = DataLoader(TensorDataset(images, torch.zeros(64, dtype=torch.long)), 16)
    allowed = AllowedRanks()
    counted = mac_table(net, images[:1], allowed)
    table = CostTable("latency_ms", counted.costs, counted.fixed)
    result = compress_model(
        net, loader, budget=0.6, costs=table, allowed=allowed, epochs=0, check="skip"
    )
    assert result.metrics["compressed"]["latency_ms_of_budget"] == pytest.approx(taken / 0.6)
    assert "latency_ms_of_budget" not in result.metrics["original"]
    assert "latency, of the budget" in result.report()
    assert any("times its budget" in line for line in warnings()) == missed


def test_one_call_that_counts_has_no_such_figure(net, images):
    result = compress_model(net, DataLoader(images, 16), budget=0.6, metric="macs", epochs=0)
    assert not any("of_budget" in key for key in result.metrics["compressed"])


def test_a_latency_of_zero_is_one_and_no_reason_to_measure_energy(net, images, monkeypatch):
    """As a clock that is too coarse for the network measures it."""
    monkeypatch.setattr(
        "nni_haloc.runs.compress_model.measure_latency",
        lambda networks, *_, **__: dict.fromkeys(networks, 0.0),
    )
    monkeypatch.setattr(
        "nni_haloc.runs.compress_model.measure_energy", lambda *_: pytest.fail("energy")
    )
    allowed = AllowedRanks()
    counted = mac_table(net, images[:1], allowed)
    table = CostTable("latency_ms", counted.costs, counted.fixed)
    loader = DataLoader(TensorDataset(images, torch.zeros(64, dtype=torch.long)), 16)
    result = compress_model(
        net, loader, budget=0.6, costs=table, allowed=allowed, epochs=0, check="skip"
    )
    assert result.metrics["compressed"]["latency_ms_of_budget"] == 0.0
