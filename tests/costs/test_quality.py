"""A measured table says how far it can be trusted, and is repeated until it can be."""

import json
import logging
import math
import random

import numpy as np
import pytest
import torch
from helpers.clock import Clock
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

from nni_haloc import InfeasibleBudget, SettingsError, compress_model
from nni_haloc.costs.device import measure as measuring
from nni_haloc.costs.device.clock import PassClock
from nni_haloc.costs.device.costs_file import costs_content
from nni_haloc.costs.device.measure import measure
from nni_haloc.costs.device.quality import doubts_about, quality_of, spread, standard_error
from nni_haloc.costs.device.runtime import Runtime, Timing
from nni_haloc.costs.measure import measure_main
from nni_haloc.costs.specify import specify
from nni_haloc.costs.table import CostTable
from nni_haloc.plan.budget import Limit, check_feasible
from nni_haloc.runs.limits import check_table
from nni_haloc.space.names import DENSE
from nni_haloc.space.ranks import AllowedRanks
from nni_haloc.utils.log import logger
from nni_haloc.utils.versions import processor

few = st.lists(st.floats(0.1, 10), min_size=2, max_size=40)


@pytest.fixture
def warned(caplog, monkeypatch):
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.WARNING, logger.name)
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.fixture(scope="module")
def spec():
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 6, 3))
    return specify(model, torch.zeros(1, 8, 9, 9), AllowedRanks(2))


def times(spec):
    """Milliseconds of the entries: more for a larger rank, and most for the dense layer."""
    return {
        index: 2.0 if entry.rank is None else 0.2 * min(entry.rank)
        for index, entry in enumerate(spec.entries)
    }


class NoisyClock(Clock):
    """A clock whose passes take up to ``noise`` more or less than they should."""

    def __init__(self, spec, cost, noise):
        super().__init__(spec, cost)
        self.noise, self.draw = noise, random.Random(0)

    def once(self, run):
        return super().once(run) * (1 + self.draw.uniform(-self.noise, self.noise))


# The figures against numpy.


@given(few)
def test_the_error_of_a_median_is_that_of_normal_values_as_wide(values):
    low, high = np.percentile(values, [25, 75])
    assert spread(values) == pytest.approx(high - low)
    expected = math.sqrt(math.pi / 2) * (high - low) / 1.349 / math.sqrt(len(values))
    assert standard_error(values) == pytest.approx(expected)


def test_the_error_of_a_median_is_how_far_medians_lie_apart():
    values = np.random.default_rng(0).normal(10, 1, (2000, 15))
    told = np.mean([standard_error(row.tolist()) for row in values])
    assert told == pytest.approx(np.median(values, 1).std(), rel=0.1)


def test_the_error_of_one_value_is_unknown():
    assert standard_error([1.0]) == math.inf


@given(st.integers(1, 3), st.data())
def test_the_error_of_a_network_is_that_of_a_sum_in_which_layers_of_one_shape_are_one(shared, data):
    rows = {name: data.draw(few) for name in ("dense", "r1", "r2")}
    other, network = data.draw(few), data.draw(few)
    layers = [f"same{i}" for i in range(shared)]
    medians = {name: float(np.median(values)) for name, values in rows.items()}
    costs = dict.fromkeys(layers, medians) | {"other": {DENSE: float(np.median(other))}}
    content = {
        "costs": costs,
        "fixed": 1.0,
        "identity": {"geometry": dict.fromkeys(layers, "abc")},
        "runs": {"same0": rows, "other": {DENSE: other}},
        "network": network,
    }
    square = {name: standard_error(values) ** 2 for name, values in rows.items()}
    # Network, minus each dense layer, plus a candidate of its row, which is any of them.
    expected = standard_error(network) ** 2 + standard_error(other) ** 2
    expected += shared**2 * (square["dense"] + (square["r1"] + square["r2"]) / 2)
    original = 1 + shared * medians["dense"] + float(np.median(other))
    found = quality_of(content)
    assert found["standard_error"] == pytest.approx(math.sqrt(expected) / original)
    assert found["fixed_share"] == pytest.approx(1 / original)
    layers_alone = (original - 1) / float(np.median(network))
    assert found["layers_over_network"] == pytest.approx(layers_alone)


# Repetition.


@pytest.mark.parametrize("rounds", [1, 2, 3, 5])
def test_on_a_quiet_machine_no_round_is_added(spec, rounds):
    state = measure(spec, Clock(spec, times(spec)), timing=Timing("alone", rounds, 0))
    assert state["identity"]["runs"] == rounds
    assert state["quality"].get("standard_error") == (None if rounds == 1 else 0)
    assert state["quality"].get("spread") == (None if rounds == 1 else 0)


def test_a_noisy_machine_gets_rounds_until_the_error_of_a_network_is_small(spec):
    found = {}
    for noise in (0.0, 0.1, 0.3, 3.0):
        clock = NoisyClock(spec, times(spec), noise)
        state = measure(spec, clock, timing=Timing("alone", 5, 0))
        found[noise] = state["identity"]["runs"]
        error = state["quality"]["standard_error"]
        assert state["quality"]["rounds"] == found[noise]
        doubts = doubts_about("latency_ms", state["costs"], state["fixed"], state["quality"])
        told = [
            d for d in doubts if f"standard error of a whole network is {100 * error:.1f} %" in d
        ]
        assert (error <= 0.02) == (not told)
        if error > 0.02:
            assert found[noise] == 15
            assert "after 15 rounds" in told[0]
    assert found[0.0] == 5
    assert sorted(found.values()) == list(found.values())
    assert found[3.0] == 15


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_first_look_is_left_as_it_is(spec, rounds):
    state = measure(spec, NoisyClock(spec, times(spec), 0.9), timing=Timing("alone", rounds, 0))
    assert state["identity"]["runs"] == rounds


def test_a_worker_measures_its_rounds_and_no_more(spec):
    clock = NoisyClock(spec, times(spec), 0.9)
    state = measure(spec, clock, timing=Timing("alone", 3, 0), indices=[0, 1])
    assert {len(v) for row in state["runs"].values() for v in row.values()} == {3}


def test_the_command_says_that_one_round_tells_no_error(tmp_path, capsys):
    out = tmp_path / "costs.json"
    measure_main(
        ["--model", "digits_cnn", "--input", "1x8x8", "--rounds", "1", "--min-run-time", "0"]
        + ["--threads", "1", "--out", str(out), "--rank-space", str(narrow(tmp_path))]
    )
    line = capsys.readouterr().out
    assert "measured in one round, so that its error is unknown" in line
    assert "spread" not in line
    assert "spread" not in json.loads(out.read_text())
    assert CostTable.load(out).spread == {}


def narrow(tmp_path):
    file = tmp_path / "space.yml"
    file.write_text("step: 16\nexclude: ['block1*', 'block2*', 'block3*']\n")
    return file


# Foreign load.


def clock_of(threads=1, device=None):
    class Any(Runtime):
        def identity(self):
            return {"device": device or processor(), "threads": threads}

    return PassClock(Any())


times_of = st.floats(1e-4, 10)


@given(times_of, st.floats(0.05, 1.0))
def test_on_one_thread_an_interrupted_pass_takes_its_processor_time(wall, share):
    spent = share * wall
    differ = wall - spent > max(0.02 * wall, 2e-5)
    assert clock_of().judge(wall, wall, spent) == (spent if differ else wall)


@pytest.mark.parametrize(
    ("clock", "seconds", "wall", "spent"),
    [
        (clock_of(threads=2), 1.0, 1.0, 0.5),  # threads wait for each other
        (clock_of(threads="default"), 1.0, 1.0, 0.5),
        (clock_of(threads="cuda"), 1.0, 1.0, 0.5),
        (clock_of(), 1.0, 3.0, 0.5),  # the runtime's own clock, such as a device's
        (clock_of(), 3.0, 1.0, 0.5),
        (clock_of(), 1.0, 1.0, 0.001),  # the passes run in another process
        (clock_of(), 1.0, 1.0, 0.99),  # no more than noise
        (clock_of(), 1e-5, 1e-5, 1e-6),
    ],
)
def test_other_passes_take_what_their_runtime_says(clock, seconds, wall, spent):
    assert clock.judge(seconds, wall, spent) == seconds


def test_another_devices_passes_are_timed_by_their_runtime_alone():
    class Elsewhere(Runtime):
        def identity(self):
            return {"device": "a board", "threads": 1}

        def once(self, run):
            return run()

    clock = PassClock(Elsewhere())
    assert clock.once(lambda: 7.0) == 7.0
    assert clock.take_cores() is None


@given(st.lists(st.tuples(times_of, st.floats(0.1, 4)), min_size=1, max_size=9))
def test_several_threads_keep_as_many_cores_busy_as_processor_time_over_wall_time(passes):
    clock, single = clock_of(threads=4), clock_of()
    for wall, cores in passes:
        clock.judge(wall, wall, cores * wall)
        single.judge(wall, wall, cores * wall)
    total = sum(wall for wall, _ in passes)
    expected = sum(wall * cores for wall, cores in passes) / total
    assert clock.take_cores() == pytest.approx(expected)
    assert clock.take_cores() is None
    assert single.take_cores() is None


@pytest.mark.parametrize(
    ("cores", "thrown"),
    [
        ([2.0, 2.0, 2.0], 0),
        ([2.0, 1.9, 1.8], 0),
        ([2.0, 1.2, 2.0, 2.0], 1),
        ([1.2, 2.0, 2.0, 2.0], 1),  # the first is found out by those after it
        ([1.2, 1.3, 2.0, 2.0, 2.0], 2),
        ([2.0, 1.2, 2.0, 1.1, 2.0], 2),
        ([2.0, 1.2, 1.2, 1.2, 1.2], 2),  # so many that it can't be helped: 3 rounds at most
        ([None] * 3, 0),  # on one thread
    ],
)
def test_rounds_with_foreign_load_are_measured_again(spec, monkeypatch, cores, thrown):
    """In a round in which others use the processor everything takes twice as long."""
    given_cores = iter([*cores, *[cores[0]] * 20])
    now = [next(given_cores)]

    class Loaded(Clock):
        def once(self, run):
            disturbed = now[0] is not None and now[0] < 1.5
            return super().once(run) * (2 if disturbed else 1)

    def take(self):
        before, now[0] = now[0], next(given_cores)
        return before

    monkeypatch.setattr(PassClock, "take_cores", take)
    state = measure(spec, Loaded(spec, times(spec)), timing=Timing("alone", 3, 0))
    assert state["quality"].get("thrown_away", 0) == thrown
    assert state["identity"].get("thrown_away", 0) == thrown
    values = [v for row in state["runs"].values() for v in row.values()]
    if cores[1:] != [1.2] * 4:
        assert all(len(set(v)) == 1 and len(v) == 3 for v in values)
        assert len(set(state["network"])) == 1
        assert state["costs"]["0"][DENSE] == pytest.approx(2.0)


# Judging a table.


def table(costs, fixed, network=None, values=5, scatter=0.01, **identity):
    """A finished table whose single values lie around its costs."""
    network = network or fixed + sum(row[DENSE] for row in costs.values())

    def around(x):
        return [x * (1 + scatter * (i - values // 2)) for i in range(values)]

    runs = {layer: {c: around(x) for c, x in row.items()} for layer, row in costs.items()}
    apart = {
        layer: {c: spread(v) / costs[layer][c] for c, v in row.items() if values > 1}
        for layer, row in runs.items()
    }
    identity = {"device": processor(), **identity}
    content = costs_content("latency_ms", identity, fixed, costs, apart)
    return {**content, "runs": runs, "network": around(network)}


GOOD = {"a": {DENSE: 10.0, "r8": 6.0, "r4": 4.0}, "b": {DENSE: 8.0, "r8": 5.0, "r4": 3.0}}
MIXED = {"a": {DENSE: 10.0, "r8": 4.0, "r4": 6.0}, "b": GOOD["b"]}
LOADED = {"a": {DENSE: 14.0, "r8": 8.0}, "b": {DENSE: 12.0, "r8": 7.0}}
FAULTS = {
    "good": (table(GOOD, 4.0), None),
    "good, of many layers fixed": (table(GOOD, 18.0), None),
    "good, in pairs": (table({"a": {DENSE: 9.0, "r4x8": 5.0, "r8x4": 4.0, "r8": 6.0}}, 3.0), None),
    "spread": (table(GOOD, 4.0, scatter=0.1), "standard error of a whole network is"),
    "few values": (table(GOOD, 4.0, values=2, scatter=0.08), "after 2 rounds"),
    "network 374 ms, layers 26 ms": (table(LOADED, 348.0), "26 of the network's 374 ms, and 348"),
    "fixed, a little": (table(GOOD, 40.0), "no budget below 0.69 of the original can be met"),
    "larger rank cheaper": (table(MIXED, 4.0), "of neighbouring ranks, 50 % cost less"),
    "r2 the other way": (
        table({"a": {DENSE: 9.0, "r4x4": 7.0, "r4x8": 5.0, "r8": 6.0}}, 3.0),
        "of neighbouring ranks, 50 % cost less",
    ),
    "layers above the network": (table(GOOD, 0.0, network=12.0), "1.50 times the whole network"),
    "layers far above": (table(GOOD, 0.0, network=6.0), "3.00 times the whole network"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_of_a_table_is_found_with_its_numbers(tmp_path, warned, fault):
    """Also in a file of an earlier version, which has the values but not the figures."""
    content, told = FAULTS[fault]
    for figures in ({}, {"quality": quality_of(content)}):
        file = tmp_path / "costs.json"
        file.write_text(json.dumps({**content, **figures}))
        costs = CostTable.load(file)
        assert dict(costs.quality) == pytest.approx(quality_of(content))
        doubts = costs.doubts()
        assert [told in doubt for doubt in doubts] == ([True] if told else [])
        assert all("haloc measure --rounds" in doubt and "\n" not in doubt for doubt in doubts)
        costs.save(file)
        assert CostTable.load(file) == costs
        check_table(costs, "costs.json")
    assert len(warned()) == (2 if told else 0)
    assert all(line.startswith("cost table costs.json: ") for line in warned())


@pytest.mark.parametrize("scatter", [0.6, 0.9])
def test_a_table_that_says_next_to_nothing_is_refused(scatter):
    content = table(GOOD, 4.0, values=3, scatter=scatter)
    costs = CostTable("latency_ms", GOOD, 4.0, quality=quality_of(content))
    with pytest.raises(SettingsError, match=r"standard error .* expected below 2 %.*haloc measure"):
        check_table(costs)


@pytest.mark.parametrize("budget", [0.5, 0.9, 0.95])
def test_a_budget_that_a_loaded_machines_table_makes_infeasible_is_told_why(budget):
    content = FAULTS["network 374 ms, layers 26 ms"][0]
    costs = CostTable("latency_ms", LOADED, 348.0, quality=quality_of(content))
    candidates = {layer: list(row) for layer, row in LOADED.items()}
    with pytest.raises(InfeasibleBudget) as caught:
        check_feasible(candidates, [Limit.of(costs, budget)])
    assert "the searched layers take 26 of the network's 374 ms" in str(caught.value)
    assert "measure the table again on an idle machine" in str(caught.value)


@pytest.mark.parametrize("metric", ["macs", "params", "cycles"])
def test_what_is_counted_is_never_doubted(metric):
    assert CostTable(metric, LOADED, 348.0, quality={"fixed_share": 0.93}).doubts() == []


def test_one_call_doubts_the_table_that_it_is_given(net, images, warned):
    allowed = AllowedRanks(4)
    from nni_haloc.costs.analytic import mac_table

    counted = mac_table(net, images[:1], allowed)
    fixed = 20 * counted.original
    costs = CostTable("latency_ms", counted.costs, fixed, quality={"fixed_share": 0.95})
    options = {"costs": costs, "allowed": allowed, "epochs": 0, "check": "skip"}
    compress_model(net, DataLoader(images, 16), budget=0.99, **options)
    assert any("are fixed, so that no budget below 0.95" in line for line in warned())


@pytest.mark.parametrize("quality", [{"spread": "wide"}, {"spread": None}, ["spread"], 3, "x"])
def test_damaged_figures_are_one_line(tmp_path, quality):
    file = tmp_path / "costs.json"
    file.write_text(json.dumps({**table(GOOD, 4.0), "quality": quality}))
    with pytest.raises(ValueError, match="costs.json") as caught:
        CostTable.load(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "runs", [{}, {"a": 3}, {"a": {DENSE: "x"}}, {"a": {DENSE: [1e308, 1.0]}}, []]
)
@pytest.mark.parametrize("network", [[], ["x"], [0.0, 0.0], [-1.0, 2.0], None])
def test_damaged_values_are_one_line_or_leave_figures_out(tmp_path, runs, network):
    file = tmp_path / "costs.json"
    file.write_text(json.dumps({**table(GOOD, 4.0), "runs": runs, "network": network}))
    found, message = {}, f"{file}: "
    try:
        found = CostTable.load(file).quality
    except ValueError as error:
        message = str(error)
    assert message.startswith(f"{file}: ")
    assert "\n" not in message
    assert all(math.isfinite(value) for value in found.values())


def test_each_turn_of_an_alternation_goes_the_other_way_round():
    """On a machine that grows slower, the second one would else seem slower."""
    seconds = iter(1 + 0.01 * i for i in range(1000))

    class Slowing(Runtime):
        def identity(self):
            return {}

        def once(self, run):
            return next(seconds)

    runs = {"first": None, "second": None}
    found = [measuring.time_together(runs, Slowing(), 0.0) for _ in range(20)]
    ratio = np.mean([each["second"] / each["first"] for each in found])
    assert ratio == pytest.approx(1, abs=2e-3)
