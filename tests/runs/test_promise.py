"""A latency budget holds for the planned network as a whole, or nothing is trained."""

import json
import logging
import math
import random

import numpy as np
import pytest
import scipy.stats
import torch
from helpers.paths import DIGITS
from helpers.set_clock import FIXED, SetClock, layer_seconds
from helpers.short_runs import SETTINGS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from nni_haloc import BudgetMissed, HalocError, compress_model, load_config, run
from nni_haloc.costs.table import CostTable
from nni_haloc.inputs.models import build_model
from nni_haloc.inputs.registries import RUNTIMES
from nni_haloc.plan.budget import Limit, choose
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.runs import promise
from nni_haloc.runs.folder import RunFolder
from nni_haloc.runs.promise import Interval, Verdict, _best, keep_promise
from nni_haloc.space.names import rank_name
from nni_haloc.space.ranks import AllowedRanks, find_layers
from nni_haloc.utils.log import logger
from nni_haloc.utils.versions import processor

SHORT = SETTINGS | {"finetune.epochs": 1, "finetune.schedule": "constant"}
EXAMPLE = torch.zeros(1, 1, 8, 8)


@pytest.fixture
def told(caplog, monkeypatch):
    """Call for the log so far: the lines from a level on."""
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.INFO, logger.name)
    return lambda level=logging.WARNING: [
        record.getMessage() for record in caplog.records if record.levelno >= level
    ]


@pytest.fixture
def set_clock(monkeypatch):
    """Register a runtime whose clock the test sets by ``low_rank`` and ``disturbed``."""
    monkeypatch.setattr(promise, "_RUN_TIME", 0.0)
    timed = []

    def register(low_rank=1.0, disturbed=lambda i: 1.0):
        class Clock(SetClock):
            def network(self, spec, choice):
                timed.append(spec.module)
                return super().network(spec, choice)

        Clock.low_rank, Clock.disturbed = low_rank, staticmethod(disturbed)
        monkeypatch.setitem(RUNTIMES._added, "set_clock", Clock)
        return timed

    return register


def clock_table(model, example, allowed, **identity):
    """The table of a clock that is set right: it adds up."""
    layers = find_layers(model, example, allowed)
    costs = {
        layer: {
            name: 1e3 * layer_seconds(layers.specs[layer].build(rank)) for name, rank in row.items()
        }
        for layer, row in layers.candidates(allowed).items()
    }
    others = 1e3 * FIXED + sum(
        1e3 * layer_seconds(module)
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)) and name not in costs
    )
    return CostTable("latency_ms", costs, others, {"device": processor(), **identity})


def digits(tmp_path, rule="error-knapsack", device=None, **others):
    """Settings of the digits example by the runtime that the test sets."""
    table = clock_table(build_model("digits_cnn"), EXAMPLE, AllowedRanks(4), input=[1, 1, 8, 8])
    identity = {**table.identity, "device": device or processor()}
    CostTable(table.metric, table.costs, table.fixed, identity).save(tmp_path / "table.json")
    section = {"cost.metric": "latency_ms", "cost.runtime": "set_clock", "rule": rule}
    section |= {"cost.table": str(tmp_path / "table.json"), "budget.fraction": 0.7}
    return load_config(DIGITS, SHORT | section | others)


def noisy(seed):
    draw = random.Random(seed)
    return lambda i: draw.uniform(0.6, 1.8)


CLOCKS = {
    "right": (1.0, lambda i: 1.0),
    "noisy": (1.0, noisy(0)),
    "getting slower": (1.0, lambda i: 1 + 0.001 * i),
    "getting faster": (1.0, lambda i: 1 / (1 + 0.001 * i)),
    "now half as fast": (1.0, lambda i: 2.0),
}


@pytest.mark.parametrize("clock", CLOCKS)
def test_a_table_that_is_right_is_believed_whatever_the_clock_does(set_clock, tmp_path, clock):
    low_rank, disturbed = CLOCKS[clock]
    set_clock(low_rank, disturbed)
    flat = run(digits(tmp_path), tmp_path / "run")
    facts = json.loads(RunFolder(tmp_path / "run").ranks.read_text())["chosen_by"]
    assert facts["timed"]["table_factor"] == 1
    share = facts["cost"] / facts["original_cost"]
    assert facts["timed"]["low"] * 0.999 <= share <= facts["timed"]["high"] * 1.001
    if clock not in ("noisy", "now half as fast"):
        assert flat["measured_share"] == pytest.approx(facts["timed"]["measured_share"], rel=0.02)
        assert flat["budget_met"] == 1


@pytest.mark.parametrize("rule", ["error-knapsack", "search", "uniform"])
@pytest.mark.parametrize("budget", [{"fraction": 0.7}, {"absolute": 47.0, "fraction": None}])
def test_low_ranks_that_are_slower_than_their_table_get_a_tighter_plan(
    set_clock, tmp_path, rule, budget
):
    """By 20 % in a whole network; the plan is made again until the whole keeps the budget."""
    timed = set_clock(low_rank=1.2)
    config = digits(tmp_path, rule, **{f"budget.{key}": value for key, value in budget.items()})
    flat = run(config, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    facts = json.loads(folder.ranks.read_text())["chosen_by"]
    asked = facts["budget"] / facts["original_cost"]
    assert facts["timed"]["table_factor"] == pytest.approx(1.2)
    assert facts["cost"] < facts["budget"]
    assert flat["measured_share"] == pytest.approx(facts["timed"]["measured_share"])
    assert flat["measured_share"] <= 1.03 * asked
    assert flat["budget_met"] == 1
    assert json.loads(folder.metrics_file.read_text())["stages"]["finetune"]["budget_met"] == 1
    assert len(timed) >= 6


REFUSED = {
    "not faster": (100.0, {}, "not faster than the original"),
    "too slow": (1.2, {"budget.fraction": 0.068}, "it is too slow"),
}


@pytest.mark.parametrize("rule", ["error-knapsack", "search", "uniform"])
@pytest.mark.parametrize("budget", [{"fraction": 0.6}, {"absolute": 40.0, "fraction": None}])
def test_low_ranks_that_are_faster_than_their_table_leave_room_for_larger_ones(
    set_clock, tmp_path, rule, budget
):
    settings = {f"budget.{key}": value for key, value in budget.items()}
    chosen = {}
    for low_rank in (1.0, 0.7):
        folder = RunFolder(tmp_path / str(low_rank))
        set_clock(low_rank)
        flat = run(digits(tmp_path, rule, **settings), folder.path)
        assert flat["budget_met"] == 1
        chosen[low_rank] = json.loads(folder.ranks.read_text())["chosen_by"]
    facts = chosen[0.7]["timed"]
    assert facts["table_factor"] == pytest.approx(0.7)
    assert chosen[1.0]["timed"]["of_budget"] <= 1
    assert 0.9 < facts["of_budget"] <= 1, "the first plan takes at most four fifths of the budget"
    assert chosen[0.7]["cost"] > chosen[0.7]["budget"], "by the table it is above the budget"


@pytest.mark.parametrize("rule", ["error-knapsack", "search"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_cant_be_kept_is_refused_with_the_figures_before_training(
    set_clock, tmp_path, case, rule
):
    low_rank, settings, reason = REFUSED[case]
    set_clock(low_rank)
    config = digits(tmp_path, rule, **settings)
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(BudgetMissed) as caught:
        run(config, folder.path)
    message = str(caught.value)
    assert reason in message
    assert "\n" not in message
    share = caught.value.plan.chosen_by["timed"]["measured_share"]
    for figure in (f"takes {share:.3g} (95 % interval", " ms", "budget.check", str(folder.ranks)):
        assert figure in message
    assert isinstance(caught.value, HalocError)
    assert RankPlan.load(folder.ranks).ranks == caught.value.plan.ranks
    assert not folder.weights.exists()
    assert not folder.finetuning.checkpoint.exists()
    assert not folder.searching.checkpoint.exists()


def test_the_kept_plan_runs_all_the_same_when_it_is_given(set_clock, tmp_path, told):
    set_clock(100.0)
    with pytest.raises(BudgetMissed):
        run(digits(tmp_path), tmp_path / "run")
    plan = tmp_path / "run" / "ranks.json"
    flat = run(digits(tmp_path, "plan", plan=str(plan)), tmp_path / "again")
    assert flat["budget_met"] == 0
    assert flat["measured_share"] > 1
    assert any("not faster than the original" in line for line in told())


@pytest.mark.parametrize(
    ("settings", "warned", "timed_before"),
    [
        ({"budget.check": "warn"}, True, True),
        ({"budget.check": "skip"}, False, False),
        ({"device": "another"}, False, False),
    ],
)
def test_a_plan_that_is_not_refused(set_clock, tmp_path, told, settings, warned, timed_before):
    timed = set_clock(100.0)
    flat = run(digits(tmp_path, **settings), tmp_path / "run")
    assert any("not faster than the original" in line for line in told()) == warned
    assert (len(timed) > 2) == timed_before  # both networks are timed at the end in any case
    here = "device" not in settings
    assert ("budget_met" in flat) == here
    if here:
        assert flat["budget_met"] == 0
        assert flat["measured_share"] > 1


def test_a_table_that_does_not_say_its_device_refuses_nothing(set_clock, tmp_path, told):
    """It may be a phone's, as a CSV file is."""
    set_clock(100.0)
    config = digits(tmp_path)
    content = json.loads((tmp_path / "table.json").read_text())
    del content["identity"]["device"]
    (tmp_path / "table.json").write_text(json.dumps(content))
    assert run(config, tmp_path / "run")["budget_met"] == 0
    assert any("not faster than the original" in line for line in told())


def test_what_is_counted_is_not_timed(set_clock, tmp_path):
    timed = set_clock(100.0)
    config = digits(tmp_path, **{"cost.metric": "macs", "cost.table": None})
    flat = run(config, tmp_path / "run")
    assert len(timed) == 2
    assert not {"budget_met", "measured_share"} & set(flat)


def test_a_resumed_run_keeps_the_plan_that_it_trains(set_clock, tmp_path):
    """Timed again, by a clock that is right by now, it would be another plan."""
    for rule in ("search", "error-knapsack"):
        folder = tmp_path / rule
        set_clock(low_rank=1.2)
        config = digits(tmp_path, rule)
        run(config, folder)
        plan = RankPlan.load(folder / "ranks.json")
        set_clock(low_rank=1.0)
        run(config, folder, resume=True)
        assert RankPlan.load(folder / "ranks.json").ranks == plan.ranks


@pytest.mark.parametrize("options", [{}, {"rule": "search"}])
@pytest.mark.parametrize(("low_rank", "refused"), [(1.0, False), (1.2, False), (100.0, True)])
def test_one_call_promises_the_same(net, images, labels, set_clock, low_rank, refused, options):
    set_clock(low_rank)
    loader = DataLoader(TensorDataset(images, labels), 16)
    allowed = AllowedRanks(2)
    costs = clock_table(net, images[:1], allowed)
    call = dict(costs=costs, allowed=allowed, runtime="set_clock", epochs=0, budget=0.9, **options)
    if refused:
        with pytest.raises(BudgetMissed, match="not faster than the original") as caught:
            compress_model(net, loader, loader, **call)
        assert set(caught.value.plan.ranks) <= set(costs.costs)
        result = compress_model(net, loader, loader, **call, check="warn")
    else:
        result = compress_model(net, loader, loader, **call)
    found = result.metrics["compressed"]
    assert found["budget_met"] == (not refused)
    assert found["measured_share"] == pytest.approx(
        found["latency_ms"] / result.metrics["original"]["latency_ms"]
    )
    assert "budget met" in result.report()


def test_one_call_says_which_checks_there_are(net, images):
    with pytest.raises(ValueError, match="check: expected one of refuse, warn, skip, found 'ask'"):
        compress_model(net, DataLoader(images, 16), check="ask")


@given(st.lists(st.floats(0.1, 10), min_size=6, max_size=40))
def test_the_interval_is_the_narrowest_pair_of_ordered_ratios_that_has_the_median_in_95_percent(
    ratios,
):
    """As many of n values are below the median as heads fall in n throws of a coin."""
    found, ordered, n = Interval.of(ratios), sorted(ratios), len(ratios)
    cut = int(scipy.stats.binom.ppf(0.025, n, 0.5)) - 1
    while scipy.stats.binom.cdf(cut + 1, n, 0.5) <= 0.025:
        cut += 1
    assert (found.low, found.high) == (ordered[cut], ordered[n - 1 - cut])
    assert found.middle == pytest.approx(np.median(ratios))


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_a_few_rounds_say_nothing_for_certain(rounds):
    found = Interval.of([5.0] * rounds)
    assert (found.low, found.middle, found.high) == (0.0, 5.0, math.inf)


def test_a_few_disturbed_rounds_neither_move_the_ratio_nor_hide_it():
    assert Interval.of([0.8, 0.81] * 10 + [4.0, 3.0]).high == 0.81


@st.composite
def tables(draw):
    """A cost table of some layers whose lower ranks are cheaper, of this device."""
    costs = {}
    for layer in range(draw(st.integers(1, 4))):
        dense = draw(st.floats(1, 10))
        ranks = sorted(draw(st.sets(st.integers(1, 12), min_size=2, max_size=6)))
        row = {rank_name((r, r)): dense * r / 13 for r in ranks}
        costs[f"layer{layer}"] = {**row, "dense": dense}
    return CostTable("latency_ms", costs, draw(st.floats(0, 10)), {"device": "here"})


@settings(deadline=None, max_examples=60)
@given(
    tables(),
    st.floats(0.3, 1.0),
    st.floats(0.5, 4.0),
    st.sampled_from([1.0, 0.5, 2.0]),
    st.floats(0.5, 2.0),
    st.booleans(),
)
def test_a_plan_is_within_its_budget_or_refused(costs, fraction, low_rank, others, speed, absolute):
    """By a clock without noise, on which low ranks, and what is fixed, take other times."""
    names = {layer: {c: float(c != "dense") * 0 for c in row} for layer, row in costs.costs.items()}
    scores = {x: {c: costs.costs[x][c] for c in row} for x, row in names.items()}
    least = costs.total({x: min(row, key=row.get) for x, row in scores.items()})
    budget = max(least, fraction * costs.original)
    limit = Limit.of(costs, None, budget) if absolute else Limit.of(costs, budget / costs.original)
    if not limit.holds({x: min(row, key=row.get) for x, row in scores.items()}):
        return  # by rounding
    ranks = {
        x: {c: None if c == "dense" else (int(c[1:].split("x")[0]),) * 2 for c in row}
        for x, row in names.items()
    }

    def make(limits):
        choice = choose(scores, limits)
        facts = {**limits[0].facts(choice), "also": []}
        return RankPlan({x: ranks[x][c] for x, c in choice.items()}, facts)

    def seconds(plan):
        return others * costs.fixed + sum(
            costs.costs[x][c] * (1.0 if c == "dense" else low_rank) for x, c in plan.names.items()
        )

    original = others * costs.fixed + costs.original - costs.fixed
    asked = limit.budget / (speed * original) if absolute else limit.fraction
    tried = []

    def clock(plan):
        tried.append(plan)
        return [(speed * original, speed * seconds(plan))] * 6

    refused = False
    try:
        plan = keep_promise([limit], make, scores, clock, "here")
    except BudgetMissed as error:
        refused, plan = True, error.plan
    shares = [seconds(each) / original for each in tried]
    if refused:
        assert all(share > 1.02 * asked or share >= 0.999 for share in shares)
    else:
        dense = all(name == "dense" for name in plan.names.values())
        assert min(shares) <= 1.04 * asked
        assert dense or asked > 1 - 1e-9 or min(shares) < 1 + 1e-9
    assert len(tried) <= 4
    assert plan.chosen_by["budget"] == limit.budget
    within = [share for share in shares if share <= asked * (1 + 1e-9)]
    best = max(within) if within and not refused else min(shares)
    assert seconds(plan) / original == pytest.approx(best, rel=0.03)


@given(tables(), st.floats(0.3, 5.0), st.floats(0.5, 2.0), st.data())
def test_the_factor_that_is_learned_is_the_clocks(costs, factor, speed, data):
    """Whatever the machine's speed is now: its table then has what the clock says."""
    names = {x: data.draw(st.sampled_from(sorted(row))) for x, row in costs.costs.items()}
    ranks = {x: None if c == "dense" else (int(c[1:].split("x")[0]),) * 2 for x, c in names.items()}
    seconds = costs.fixed + sum(
        costs.costs[x][c] * (1.0 if c == "dense" else factor) for x, c in names.items()
    )
    rounds = [(speed * costs.original, speed * seconds)] * 6
    verdict = Verdict.of(Limit.of(costs, 0.5), RankPlan(ranks), rounds)
    low = any(name != "dense" for name in names.values())
    assert verdict.factor() == pytest.approx(factor if low else 1.0)
    assert verdict.corrected(factor, costs.costs).costs.total(names) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("uses", "best"),
    [
        ([(0.9, 0.01), (0.99, 0.01)], 1),
        ([(0.947, 0.01), (1.026, 0.04)], 0),  # noise may have it above its budget
        ([(1.02, 0.04), (1.1, 0.01)], 0),
        ([(1.2, 0.01), (1.1, 0.01)], 1),
    ],
)
def test_of_several_plans_the_one_that_uses_most_of_its_budget_is_kept(uses, best):
    limit = Limit.of(CostTable("latency_ms", {"a": {"dense": 1.0, "r1": 0.1}}, 1.0), 0.5)
    tried = [
        (
            RankPlan({"a": (i + 1, i + 1)}),
            [
                Verdict.of(
                    limit,
                    RankPlan({"a": (1, 1)}),
                    [(1.0, 0.5 * (use + way * noise)) for way in (-1, 0, 1) for _ in range(8)],
                )
            ],
        )
        for i, (use, noise) in enumerate(uses)
    ]
    assert _best(tried) == tried[best]
