"""The memory format is chosen by measurement where a latency is: the better plan wins, once."""

import json
import logging
import math
import random

import pytest
import torch
from helpers.format_clock import FORMATS, FormatClock, formats_of
from helpers.paths import DIGITS
from helpers.short_runs import SETTINGS
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

from nni_haloc import InfeasibleBudget, compress_model, html_report, load, load_config, run
from nni_haloc.cli.main import app
from nni_haloc.costs import latency
from nni_haloc.costs.device import measure
from nni_haloc.costs.table import CostTable
from nni_haloc.inputs.models import build_model
from nni_haloc.inputs.registries import RUNTIMES
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.runs import promise
from nni_haloc.runs.folder import RunFolder
from nni_haloc.runs.job import Job
from nni_haloc.runs.memory_format import FAR, MACS_KEPT, Formats, in_format, time_formats
from nni_haloc.runs.run import search_only
from nni_haloc.runs.saved import save
from nni_haloc.space.ranks import AllowedRanks
from nni_haloc.utils.errors import SettingsError
from nni_haloc.utils.log import logger

SHORT = SETTINGS | {"finetune.epochs": 1, "finetune.schedule": "constant", "search.epochs": 2}
OTHER = dict(zip(FORMATS, reversed(FORMATS), strict=True))
RULES = ["sensitivity-knapsack", "uniform", "search"]


@pytest.fixture
def clock(monkeypatch):
    """Call to set a clock's factors on dense and on low-rank layers, by memory format."""
    at_once = measure.time_together

    def time_together(runs, runtime, min_run_time, clock=None):
        return at_once(runs, runtime, 0.0, clock)

    monkeypatch.setattr(promise, "_RUN_TIME", 0.0)
    for module in (measure, latency):
        monkeypatch.setattr(module, "time_together", time_together)

    def register(contiguous=(1.0, 1.0), channels_last=(1.0, 1.0)):
        class Clock(FormatClock):
            measured, timed = [], []

        Clock.dense, Clock.low = (
            dict(zip(FORMATS, factors, strict=True))
            for factors in zip(contiguous, channels_last, strict=True)
        )
        monkeypatch.setitem(RUNTIMES._added, "format_clock", Clock)
        return Clock

    return register


@pytest.fixture
def told(caplog, monkeypatch):
    """Call for the lines of the log so far."""
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.INFO, logger.name)
    return lambda: [record.getMessage() for record in caplog.records]


def digits(rule="error-knapsack", **others):
    section = {"cost.metric": "latency_ms", "cost.runtime": "format_clock", "rule": rule}
    return load_config(DIGITS, SHORT | section | {"budget.fraction": 0.7} | others)


def facts_in(folder):
    return json.loads(RunFolder(folder).ranks.read_text())["chosen_by"]


FAR_APART = {"channels_last": ((1.0, 1.0), (0.5, 0.5)), "contiguous": ((1.0, 1.0), (1.6, 1.6))}


@pytest.mark.parametrize(
    ("rule", "faster"),
    [("error-knapsack", "channels_last"), ("uniform", "contiguous"), ("search", "channels_last")],
)
def test_a_format_that_is_far_slower_gets_no_cost_table(clock, tmp_path, told, rule, faster):
    found = clock(*FAR_APART[faster])
    flat = run(digits(rule), tmp_path)
    assert set(found.measured) == {faster}
    metrics = json.loads(RunFolder(tmp_path).metrics_file.read_text())
    formats = facts_in(tmp_path)["formats"]
    assert metrics["config"]["cost"]["memory_format"] == faster
    assert metrics["timing"]["memory_format"] == faster
    assert metrics["timing"]["formats"] == formats
    assert CostTable.load(tmp_path / "costs.json").identity["formats"] == formats
    assert formats["original_ms"][faster] == pytest.approx(flat["original_latency_ms"])
    assert formats["times"] == pytest.approx(
        formats["original_ms"][OTHER[faster]] / formats["original_ms"][faster]
    )
    line = f"{formats['times']:.3g} times as much: no cost table was measured in {OTHER[faster]}"
    assert any(line in each for each in told())
    network = load(tmp_path)
    assert formats_of(network) == {faster}
    assert flat["measured_share"] <= 0.721


# Factors on dense and low-rank layers in contiguous and in channels_last; the better plan
NEAR = {
    "the faster original": ((1.1, 1.1), (1.0, 1.0), "channels_last"),
    "the slower original": ((1.0, 1.0), (1.1, 0.5), "channels_last"),
    "the other way round": ((1.1, 0.5), (1.0, 1.0), "contiguous"),
    "two alike": ((1.0, 1.0), (1.0, 1.0), "contiguous"),
}


@pytest.mark.parametrize(
    ("rule", "case"),
    [
        *(("error-knapsack", case) for case in NEAR),
        *((rule, "the slower original") for rule in RULES),
    ],
)
def test_of_two_that_are_near_the_better_plan_wins(clock, tmp_path, rule, case):
    """The oracle: runs in either format that is given, within the same milliseconds."""
    *speeds, best = NEAR[case]
    found = clock(*speeds)
    flat = run(digits(rule), tmp_path / "auto")
    facts = facts_in(tmp_path / "auto")
    assert set(found.measured) == set(FORMATS)
    assert facts["memory_format"] == best
    assert formats_of(load(tmp_path / "auto")) == {best}
    table = CostTable.load(tmp_path / "auto" / "costs.json")
    assert table.identity["memory_format"] == best
    least = min(facts["formats"]["original_ms"].values())
    assert facts["budget"] == pytest.approx(0.7 * least)
    assert facts["original_cost"] == pytest.approx(least)
    assert flat["original_latency_ms"] == pytest.approx(least)
    assert flat["measured_share"] == pytest.approx(flat["latency_ms"] / least)
    assert flat["budget_met"] == 1
    assert facts["timed"]["original_ms"] == pytest.approx(least)
    given = {}
    for each in FORMATS if rule != "search" else ():
        absolute = {"budget.absolute": facts["budget"], "budget.fraction": None}
        config = digits(rule, **absolute, **{"cost.memory_format": each})
        found.measured.clear()
        run(config, tmp_path / each)
        assert set(found.measured) == {each}
        given[each] = RankPlan.load(tmp_path / each / "ranks.json").ranks
    if given:
        assert RankPlan.load(tmp_path / "auto" / "ranks.json").ranks == given[best]
    objective = facts["formats"]["objective"]
    order = max if rule == "uniform" else min
    assert objective[best] == order(objective.values())
    if case != "two alike":
        assert objective[best] != objective[OTHER[best]]


@pytest.mark.parametrize(
    ("rule", "speeds"),
    [("error-knapsack", ((1.0, 1.0), (0.5, 0.5))), ("search", ((1.0, 1.0), (1.1, 0.5)))],
)
def test_a_resumed_run_keeps_the_format(clock, tmp_path, rule, speeds):
    """Chosen again, by a clock that has turned round, it would be the other one."""
    clock(*speeds)
    run(digits(rule), tmp_path)
    before = facts_in(tmp_path)
    turned = clock(*reversed(speeds))
    run(digits(rule), tmp_path, resume=True)
    after = facts_in(tmp_path)
    assert not turned.measured
    assert before["memory_format"] == after["memory_format"] == "channels_last"
    assert before["formats"] == after["formats"]
    metrics = json.loads(RunFolder(tmp_path).metrics_file.read_text())
    assert metrics["timing"]["formats"] == before["formats"]
    assert formats_of(load(tmp_path)) == {"channels_last"}


@pytest.mark.parametrize("rule", ["error-knapsack", "search"])
def test_a_run_that_was_stopped_before_it_had_a_plan_keeps_the_format(
    clock, tmp_path, monkeypatch, rule
):
    clock((1.0, 1.0), (1.1, 0.5))
    where = "choose_ranks.run_search" if rule == "search" else "by_rule.plan"

    def stop(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"nni_haloc.runs.stages.{where}", stop)
        with pytest.raises(KeyboardInterrupt):
            run(digits(rule), tmp_path)
    turned = clock((1.1, 0.5), (1.0, 1.0))
    run(digits(rule), tmp_path, resume=True)
    assert set(turned.measured) == {"channels_last"}
    assert facts_in(tmp_path)["memory_format"] == "channels_last"


def test_a_search_and_the_run_that_goes_on_from_it_have_one_format(clock, tmp_path):
    clock((1.0, 1.0), (1.1, 0.5))
    search_only(digits("search"), tmp_path)
    clock((1.1, 0.5), (1.0, 1.0))
    run(digits("search"), tmp_path, resume=True)
    assert facts_in(tmp_path)["memory_format"] == "channels_last"


def test_a_new_run_in_the_folder_chooses_anew(clock, tmp_path):
    clock((1.0, 1.0), (0.5, 0.5))
    run(digits(), tmp_path)
    clock((0.5, 0.5), (1.0, 1.0))
    run(digits(), tmp_path)
    assert facts_in(tmp_path)["memory_format"] == "contiguous"


@pytest.mark.parametrize(
    ("rule", "best"), [("error-knapsack", "channels_last"), ("search", "contiguous")]
)
def test_a_table_that_is_given_decides(clock, tmp_path, rule, best):
    """The trials of an experiment so have one format, and one original to refer to."""
    speeds = ((1.0, 1.0), (1.1, 0.5)) if best == "channels_last" else ((1.1, 0.5), (1.0, 1.0))
    clock(*speeds)
    run(digits(rule), tmp_path / "first")
    found = clock(*speeds)
    table = tmp_path / "first" / "costs.json"
    flat = run(digits(rule, **{"cost.table": str(table)}), tmp_path / "next")
    assert not found.measured
    assert facts_in(tmp_path / "next")["memory_format"] == best
    assert facts_in(tmp_path / "next")["budget"] == facts_in(tmp_path / "first")["budget"]
    assert flat["measured_share"] == pytest.approx(flat["latency_ms"] / 1e3 / _least(table))
    config = json.loads(RunFolder(tmp_path / "next").metrics_file.read_text())["config"]
    assert config["cost"]["memory_format"] == best


def _least(table):
    return min(CostTable.load(table).identity["formats"]["original_ms"].values()) / 1e3


@pytest.mark.parametrize("best", FORMATS)
def test_a_table_of_earlier_versions_or_of_haloc_measure_decides(clock, tmp_path, best):
    clock((1.0, 1.0), (1.0, 1.0))
    run(digits(**{"cost.memory_format": best}), tmp_path / "first")
    table = tmp_path / "first" / "costs.json"
    assert "formats" not in CostTable.load(table).identity
    job = Job(digits(**{"cost.table": str(table)}), tmp_path / "next")
    assert job.config.cost.memory_format == best


SETTLED = {
    "macs": {"cost.metric": "macs"},
    "macs beside latency": {
        "cost.metric": "macs",
        "budget.also": [{"metric": "params", "fraction": 0.9}],
    },
    "a runtime that knows one": {"cost.runtime": "onnxruntime"},
    "a model of the latency": {"cost.predictor": "roofline", "cost.runtime": "torch"},
    "several processes": {"trainer.devices": 2, "trainer.accelerator": "cpu"},
}


@pytest.mark.parametrize("case", SETTLED)
def test_where_nothing_is_to_be_chosen_it_is_contiguous_and_nothing_is_timed(
    clock, tmp_path, monkeypatch, case
):
    if case == "a runtime that knows one":
        pytest.importorskip("onnxruntime")
    monkeypatch.setattr("nni_haloc.runs.job.check_startable", lambda trainer: None)
    found = clock()
    job = Job(digits(**SETTLED[case]), tmp_path)
    assert job.config.cost.memory_format == "contiguous"
    assert not found.timed
    assert not found.measured


def test_a_counted_budget_is_timed_at_the_end_alone(clock, tmp_path):
    found = clock((1.0, 1.0), (0.5, 0.5))
    run(digits(**{"cost.metric": "macs"}), tmp_path)
    assert found.timed == ["contiguous"] * 2
    assert "formats" not in facts_in(tmp_path)


def test_a_format_that_is_given_is_not_looked_at(clock, tmp_path):
    found = clock((1.0, 1.0), (0.5, 0.5))
    run(digits(**{"cost.memory_format": "contiguous"}), tmp_path)
    assert set(found.measured) == set(found.timed) == {"contiguous"}
    assert "formats" not in facts_in(tmp_path)


def test_a_plan_that_is_given_gets_the_format_in_which_it_is_faster(clock, tmp_path):
    clock((1.0, 1.0), (1.1, 0.5))
    run(digits(**{"cost.memory_format": "contiguous"}), tmp_path / "first")
    plan = {"plan": str(tmp_path / "first" / "ranks.json")}
    run(digits("plan", **plan), tmp_path / "next")
    facts = facts_in(tmp_path / "next")
    assert facts["memory_format"] == "channels_last"
    share = facts["cost"] / facts["original_cost"]
    assert facts["formats"]["objective"]["channels_last"] == pytest.approx(share)


def test_a_budget_that_one_format_alone_can_meet(clock, tmp_path):
    clock((1.0, 1.0), (1.1, 0.05))
    config = digits(**{"budget.fraction": 0.065})
    run(config, tmp_path)
    facts = facts_in(tmp_path)
    assert facts["memory_format"] == "channels_last"
    assert set(facts["formats"]["objective"]) == {"channels_last"}
    clock((1.0, 1.0), (1.1, 1.0))
    with pytest.raises(InfeasibleBudget):
        run(config, tmp_path / "none")


def test_times_agree_with_their_ratio_and_a_busy_machine_is_a_warning(clock, told):
    draw = random.Random(0)
    busy = clock()
    busy.disturbed = staticmethod(lambda i: 10 ** draw.uniform(0, 3))
    net = build_model("digits_cnn")
    runtimes = {name: busy(name) for name in FORMATS}
    formats = time_formats(net, (1, 1, 8, 8), runtimes)
    times = formats.original_ms
    slower = OTHER[formats.faster]
    assert times[slower] / times[formats.faster] == pytest.approx(formats.times)
    assert any("too busy to tell" in line for line in told())


def test_no_plan_in_either_format_is_said_so():
    formats = Formats(
        {"contiguous": 2.0, "channels_last": 1.0}, 2.0, False, "channels_last", "plans"
    )
    assert str(formats).endswith("; no plan keeps the budget in either format")


@pytest.mark.parametrize("rule", RULES)
def test_where_no_rank_is_faster_in_either_format_the_table_stays(clock, tmp_path, rule):
    clock(contiguous=(1.0, 1e4), channels_last=(0.99, 1e4))
    with pytest.raises(SettingsError, match="dense layer in latency_ms$|in latency_ms\\)"):
        run(digits(rule), tmp_path)
    table = CostTable.load(tmp_path / "costs.json")
    assert table.identity["memory_format"] == "channels_last"
    assert all(cost >= row["dense"] for row in table.costs.values() for cost in row.values())


def test_whoever_reads_the_run_is_told_both_times_and_what_decided(clock, tmp_path):
    clock((1.0, 1.0), (1.1, 0.5))
    run(digits("sensitivity-knapsack"), tmp_path)
    line = str(Formats.of(facts_in(tmp_path)["formats"]))
    assert "memory format: channels_last" in line
    for figure in facts_in(tmp_path)["formats"]["original_ms"].values():
        assert f"{figure:.4g} ms" in line
    assert line in html_report(tmp_path)
    shown = CliRunner().invoke(app, ["plan", str(tmp_path)]).output
    assert line in " ".join(shown.split())
    content = json.loads(CliRunner().invoke(app, ["plan", str(tmp_path), "--json"]).output)
    assert content["memory_formats"] == facts_in(tmp_path)["formats"]


@pytest.mark.parametrize(
    ("speeds", "best", "both", "own", "options"),
    [
        (((2.0, 2.0), (1.0, 1.0)), "channels_last", False, "contiguous", {}),
        (((1.0, 1.0), (2.0, 2.0)), "contiguous", False, "channels_last", {"rule": "uniform"}),
        (((1.0, 1.0), (1.05, 0.5)), "channels_last", True, "contiguous", {}),
        (((1.0, 1.0), (1.05, 0.5)), "channels_last", True, "channels_last", {"rule": "search"}),
        (((1.05, 0.5), (1.0, 1.0)), "contiguous", True, "channels_last", {}),
    ],
)
def test_one_call_chooses_the_same_way(
    clock, net, images, labels, tmp_path, options, own, speeds, best, both
):
    found = clock(*speeds)
    loader = DataLoader(TensorDataset(images, labels), 16)
    net = in_format(net, own)
    call = dict(allowed=AllowedRanks(2), runtime="format_clock", epochs=0, budget=0.93, **options)
    result = compress_model(net, loader, loader, **call)
    assert set(found.measured) == (set(FORMATS) if both else {best})
    assert formats_of(result.model) == {best}
    assert result.timing["memory_format"] == best
    formats = result.timing["formats"]
    least = min(formats["original_ms"].values())
    original, compressed = result.metrics["original"], result.metrics["compressed"]
    assert original["latency_ms"] == pytest.approx(least)
    assert compressed["measured_share"] == pytest.approx(compressed["latency_ms"] / least)
    assert result.plan.chosen_by["formats"] == formats
    assert str(Formats.of(formats)) in result.report()
    assert formats_of(net) == {own}
    result.save(tmp_path)
    again = load(tmp_path, in_format(net, "contiguous"))
    assert formats_of(again) == {best}
    with torch.no_grad():
        torch.testing.assert_close(again(images), result.model(images))
    found.measured.clear()
    second = compress_model(net, loader, loader, **call, costs=result.costs)
    assert not found.measured
    assert second.timing["memory_format"] == best
    assert second.metrics["original"]["latency_ms"] == pytest.approx(least)


def test_one_call_on_counted_costs_times_nothing_in_advance(clock, net, images):
    found = clock((1.0, 1.0), (0.5, 0.5))
    loader = DataLoader(images, 16)
    result = compress_model(net, loader, metric="macs", runtime="format_clock", epochs=0)
    assert set(found.timed) == {"contiguous"}
    assert not found.measured
    assert "formats" not in result.timing


def test_a_network_without_convolutions_has_no_format_to_choose(clock):
    found = clock((1.0, 1.0), (0.5, 0.5))
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 2))
    loader = DataLoader(torch.randn(32, 3, 4, 4), 16)
    allowed = AllowedRanks(4, kinds=("linear",))
    compress_model(net, loader, allowed=allowed, runtime="format_clock", epochs=0, budget=0.9)
    assert set(found.measured) == {"contiguous"}


class Viewed(nn.Module):
    """A network that runs in contiguous format alone."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)
        self.classifier = nn.Linear(256, 4)

    def forward(self, x):
        x = self.b(self.a(x).relu())
        return self.classifier(x.view(len(x), -1))


@pytest.mark.parametrize("rule", ["uniform", "search"])
def test_a_network_that_does_not_run_in_both_stays_contiguous(clock, images, labels, told, rule):
    found = clock()
    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match="view"):
        in_format(Viewed(), "channels_last")(images)
    loader = DataLoader(TensorDataset(images, labels), 16)
    call = {"allowed": AllowedRanks(4), "epochs": 0, "budget": 0.9, "rule": rule}
    result = compress_model(Viewed(), loader, loader, **call, runtime="format_clock")
    assert set(found.measured) == {"contiguous"}
    assert result.timing["memory_format"] == "contiguous"
    assert "formats" not in result.timing
    reason = "memory format: contiguous; the network can't be timed in channels_last: view size"
    assert any(reason in line for line in told())


@pytest.mark.parametrize("layout", FORMATS)
def test_a_saved_network_is_loaded_in_its_format(net, images, tmp_path, layout):
    network = in_format(net, layout).eval()
    save(tmp_path, network, RankPlan({}))
    for original in FORMATS:
        loaded = load(tmp_path, in_format(net, original))
        expected = {layout} if layout == "channels_last" else {original}
        assert formats_of(loaded) == expected
        with torch.no_grad():
            torch.testing.assert_close(loaded(images), network(images))


times = st.fixed_dictionaries(dict.fromkeys(FORMATS, st.floats(0.1, 1e3)))
objectives = st.dictionaries(st.sampled_from(FORMATS), st.floats(0, 1e3))


@given(times, objectives, st.sampled_from(["sum of sensitivities", MACS_KEPT]))
def test_the_chosen_format_is_the_one_with_the_better_figure(original_ms, objective, by):
    faster = min(FORMATS, key=original_ms.get)
    times = original_ms[OTHER[faster]] / original_ms[faster]
    formats = Formats(original_ms, times, False, faster, by, objective)
    sign = -1 if by == MACS_KEPT else 1
    figures = {each: sign * objective.get(each, sign * math.inf) for each in FORMATS}
    if not math.isclose(*figures.values(), rel_tol=1e-5):
        assert formats.chosen == min(FORMATS, key=figures.get)
    else:
        assert formats.chosen == faster or figures[OTHER[faster]] < figures[faster]
    again = Formats.of(json.loads(json.dumps(formats.facts())))
    assert (again.chosen, str(again)) == (formats.chosen, str(formats))


@given(times)
def test_far_apart_is_by_more_than_the_noise(original_ms):
    faster = min(FORMATS, key=original_ms.get)
    formats = Formats(original_ms, 1.0, True, faster)
    assert formats.chosen == faster
    assert FAR == 1.25


@pytest.mark.parametrize(
    "facts", [None, 3, {}, {"faster": "sideways"}, {"faster": "contiguous", "original_ms": {}}]
)
def test_what_is_no_record_of_formats_is_none(facts):
    assert Formats.of(facts) is None


@pytest.mark.parametrize("cost", [0, -1.0, "x", True])
def test_a_table_with_a_damaged_record_is_refused(clock, tmp_path, cost):
    identity = {"memory_format": "contiguous", "formats": {"original": cost}}
    table = CostTable("latency_ms", {"a": {"dense": 1.0, "r2": 0.5}}, 0.0).costs
    with pytest.raises(ValueError, match="identity: formats: original: expected a positive cost"):
        CostTable("latency_ms", table, 0.0, identity)


def test_an_unknown_format_is_one_line():
    with pytest.raises(SettingsError, match=r"cost\.memory_format: .*auto.*contiguous"):
        load_config(DIGITS, {"cost.memory_format": "channels-last"})
