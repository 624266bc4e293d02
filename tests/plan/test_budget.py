"""The hard budget against trying every choice, with one limit and with several."""

import itertools
import math
import operator
import random
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from nni_haloc.costs.table import CostTable
from nni_haloc.plan import budget
from nni_haloc.plan.budget import (
    Limit,
    UndecidedBudget,
    _undominated,
    _worth_trying,
    cheapest,
    check_feasible,
    choose,
)
from nni_haloc.utils.errors import InfeasibleBudget


def every(candidates):
    for names in itertools.product(*candidates.values()):
        yield dict(zip(candidates, names, strict=True))


def score(scores, choice):
    return math.fsum(scores[layer][name] for layer, name in choice.items())


NUMBER = st.one_of(st.integers(1, 50).map(float), st.floats(1e-3, 1e9))
JUST = st.sampled_from([1.0, 1 - 1e-15, 1 + 1e-15, 1 - 1e-9, 1 + 1e-9, 1 - 1e-6, 1.1])


@st.composite
def problems(draw, most_limits=1):
    """Scores, and limits drawn at, just below and just above the costs of some choice; now and then
    of another choice in each table.
    """
    widths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    layers = {f"l{i}": ["dense", *(f"r{j}" for j in range(1, n))] for i, n in enumerate(widths)}
    candidates = {
        layer: names[draw(st.integers(0, len(names) - 1)) :] for layer, names in layers.items()
    }
    scores = {
        layer: {c: draw(st.floats(-10, 10)) for c in names} for layer, names in candidates.items()
    }
    choices = list(every(candidates))
    near = draw(st.sampled_from(choices))
    limits = []
    for _ in range(draw(st.integers(1, most_limits))):
        costs = {layer: {c: draw(NUMBER) for c in names} for layer, names in layers.items()}
        table = CostTable("macs", costs, draw(st.one_of(st.just(0.0), NUMBER)))
        limits.append(
            Limit(
                table,
                table.total(draw(st.sampled_from([near, near, draw(st.sampled_from(choices))])))
                * draw(JUST),
            )
        )
    return scores, limits


def check(scores, limits):
    fitting = [
        choice
        for choice in every(scores)
        if all(limit.costs.total(choice) <= limit.budget for limit in limits)
    ]
    if not fitting:
        with pytest.raises(InfeasibleBudget) as error:
            choose(scores, limits)
        refused_rightly(scores, limits, error.value)
        return
    choice = choose(scores, limits)
    assert all(limit.costs.total(choice) <= limit.budget for limit in limits)
    assert score(scores, choice) >= max(score(scores, c) for c in fitting) - 1e-4


def refused_rightly(scores, limits, error):
    """The number named is the least cost in the refused table, among the choices within the limits
    before it where the message says so.
    """
    message, named = str(error), error.least
    if "within" not in message:
        assert any(
            named == min(map(limit.costs.total, every(scores))) > limit.budget for limit in limits
        )
        return
    i = message.split(" within ")[1].count(" and ") + 1
    before = [
        choice
        for choice in every(scores)
        if all(limit.costs.total(choice) <= limit.budget for limit in limits[:i])
    ]
    least = min(map(limits[i].costs.total, before))
    assert named > limits[i].budget
    assert named == pytest.approx(least, rel=1e-8)


@settings(max_examples=300, deadline=None)
@given(problems())
def test_the_budget_is_never_exceeded_and_the_score_is_the_best(problem):
    check(*problem)


@settings(max_examples=400, deadline=None)
@given(problems(most_limits=3))
def test_no_limit_of_several_is_exceeded_and_the_score_is_the_best(problem):
    check(*problem)


@settings(max_examples=300, deadline=None)
@given(problems(), st.integers(1, 4))
def test_what_is_not_worth_trying_is_in_no_best_choice(problem, core):
    """Against running through every choice, with and without what the bound leaves out."""
    scores, limits = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "_CORE", core)
        left = _worth_trying(scores, limits)
    assert all(row and row.items() <= scores[layer].items() for layer, row in left.items())
    found = [
        max((score(rows, c) for c in every(rows) if limits[0].holds(c)), default=None)
        for rows in (scores, left)
    ]
    assert found[0] == found[1]


def test_of_thousands_of_candidates_a_hundred_are_worth_trying():
    """Their scores grow with their costs, ever more slowly: none of them beats another."""
    generator = np.random.default_rng(0)
    layers = [f"l{i}" for i in range(8)]
    costs = {layer: {f"r{i}": float(i) for i in range(1, 501)} for layer in layers}
    scores = {
        layer: {name: -weight / cost for name, cost in costs[layer].items()}
        for layer, weight in zip(layers, generator.uniform(1, 9, len(layers)), strict=True)
    }
    table = {layer: row | {"dense": 600.0} for layer, row in costs.items()}
    limits = [Limit(CostTable("macs", table, 0.0), 1000.0)]
    assert sum(map(len, _undominated(scores, limits).values())) == 4000
    left = _worth_trying(scores, limits)
    assert sum(map(len, left.values())) <= 100
    # The best choice spends all: moving one unit of cost from any layer to another loses.
    best = choose(scores, limits)
    assert limits[0].costs.total(best) == 1000.0
    for less, more in itertools.permutations(layers, 2):
        moved = {**best, less: f"r{int(best[less][1:]) - 1}", more: f"r{int(best[more][1:]) + 1}"}
        assert score(scores, moved) <= score(scores, best) + 1e-12


def hardly_anything_to_choose():
    """All but a millionth of the cost is fixed."""
    costs = {"l0": {"dense": 2.0, "r1": 1.0}}
    return {"l0": {"dense": 0.0, "r1": 0.0}}, [
        Limit(CostTable("macs", costs, 1048574.0), 1048576.0)
    ]


def one_unit_short():
    """Choices whose costs differ by less than the solver's tolerance."""
    big = 22771606.0
    first = {"dense": 1.0, "r1": 1.0, "r2": big, "r3": 2.0}
    costs = {"l0": first, "l1": {"dense": 1.0, "r1": big + 18, "r2": 1.0}}
    scores = {"l0": {"r1": 0.0, "r2": 1.0, "r3": 1.0}, "l1": dict.fromkeys(costs["l1"], 0.0)}
    return scores, [Limit(CostTable("macs", costs, 0.0), big + 19)]


@settings(max_examples=200, deadline=None)
@example(hardly_anything_to_choose(), 1.0)
@example(one_unit_short(), 1.0)
@given(problems(most_limits=2), st.sampled_from([0.5, 0.9, 0.95, 1.0]))
def test_a_budget_is_used_wherever_it_can_be(problem, use):
    scores, limits = problem
    fitting = [
        choice
        for choice in every(scores)
        if all(limit.costs.total(choice) <= limit.budget for limit in limits)
    ]
    if not fitting:
        return
    choice = choose(scores, limits, use)
    least = {id(limit): limit.costs.total(cheapest(scores, limit.costs)) for limit in limits}

    def used(choice, limit):
        return limit.costs.total(choice) - least[id(limit)]

    while use > 0:
        using, nearly = (
            [
                c
                for c in fitting
                if any(
                    used(c, limit) >= use * (limit.budget - least[id(limit)]) - miss * limit.budget
                    for limit in limits
                )
            ]
            for miss in (0, 1.1e-8)
        )
        if nearly:
            break
        use = min(2 * use - 1, use - 0.01)
    else:
        using = nearly = fitting
    assert choice in nearly
    if using:
        assert score(scores, choice) >= max(score(scores, c) for c in using) - 1e-4


def test_use_is_counted_from_the_cheapest_network():
    """Where most of the cost is fixed, 95 % of the budget would be used by any network."""
    table = one({"dense": 10.0, "r4": 8.0, "r2": 2.0}, 990.0)
    scores = {"a": {"dense": 0.0, "r4": 1.0, "r2": 2.0}}
    limits = [Limit(table, 1000.0)]
    assert choose(scores, limits, 0.95) == {"a": "dense"}
    assert choose(scores, limits, 0.75) == {"a": "r4"}
    assert choose(scores, limits, 0.0) == {"a": "r2"}


@pytest.fixture
def gives_up(monkeypatch):
    """No nodes for HiGHS's tree: it ends without a choice and without a proof, save in a search for
    any choice.
    """
    monkeypatch.setattr("nni_haloc.plan.budget._NODES", 0)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(problem=problems(most_limits=3), use=st.sampled_from([0.0, 0.9]))
def test_where_the_solver_gives_up_every_budget_that_can_be_met_is_met(gives_up, problem, use):
    scores, limits = problem
    if any(all(limit.holds(choice) for limit in limits) for choice in every(scores)):
        choice = choose(scores, limits, use)
        assert all(limit.holds(choice) for limit in limits)
        return
    with pytest.raises(InfeasibleBudget) as error:
        choose(scores, limits, use)
    if "no network is within" not in str(error.value):
        refused_rightly(scores, limits, error.value)


def test_where_the_solver_can_not_even_tell_that_there_is_no_network_it_says_so(
    gives_up, monkeypatch
):
    """With n of three layers at r4 a network costs 6 + 4n macs and 21 - 4n params: 1.975 layers
    would be within both limits.
    """
    layers = {layer: ["r2", "r4"] for layer in "abc"}
    macs, params = (
        CostTable(metric, {layer: {"dense": 10.0, **row} for layer in layers}, 0.0)
        for metric, row in (("macs", {"r2": 2.0, "r4": 6.0}), ("params", {"r2": 7.0, "r4": 3.0}))
    )
    limits = [Limit(macs, 13.9), Limit(params, 13.1)]
    assert sorted(check_feasible(layers, [limits[0], Limit(params, 17.0)]).values()) == [
        "r2",
        "r2",
        "r4",
    ]
    with pytest.raises(
        InfeasibleBudget, match=r"^budget: no network is within 13\.9 MACs and 13\.1 parameters$"
    ):
        check_feasible(layers, limits)
    monkeypatch.setattr("nni_haloc.plan.budget._FEASIBILITY_NODES", 0)
    with pytest.raises(
        UndecidedBudget,
        match=r"found no network within 13\.9 MACs and 13\.1 parameters, which is no proof",
    ):
        check_feasible(layers, limits)


def one(row, fixed=0.0, metric="macs", **more):
    return CostTable(metric, {"a": row, **more}, fixed)


def test_what_is_left_of_a_larger_budget_is_used():
    table = one({"dense": 10.0, "r2": 2.0}, 1.0, b={"dense": 10.0, "r2": 2.0})
    scores = {"a": {"dense": 1.0, "r2": 0.0}, "b": {"dense": 2.0, "r2": 0.0}}
    assert choose(scores, [Limit(table, 5.0)]) == {"a": "r2", "b": "r2"}
    assert choose(scores, [Limit(table, 13.0)]) == {"a": "r2", "b": "dense"}
    assert choose(scores, [Limit(table, 21.0)]) == {"a": "dense", "b": "dense"}


def test_a_limit_counts_what_is_not_searched():
    """Layers that the scores do not name stay dense, and what is fixed is paid for."""
    table = one({"dense": 10.0, "r2": 2.0}, 1.0, b={"dense": 10.0, "r2": 2.0})
    scores = {"a": {"dense": 1.0, "r2": 0.0}}
    assert choose(scores, [Limit(table, 20.9)]) == {"a": "r2"}
    with pytest.raises(InfeasibleBudget, match="below the cheapest network, 13 MACs"):
        choose(scores, [Limit(table, 12.9)])


def test_an_impossible_budget_names_the_cheapest_network():
    table = one({"dense": 10.0, "r2": 2.0}, 3.0)
    candidates = {"a": ["dense", "r2"]}
    assert table.total(cheapest(candidates, table)) == 5.0
    message = "budget: 4.9 MACs is below the cheapest network, 5 MACs, 0.385 of the original's"
    with pytest.raises(InfeasibleBudget) as refused:
        check_feasible(candidates, [Limit(table, 4.9)])
    assert str(refused.value) == f"{message}; set absolute: 5 or more"
    assert (refused.value.costs, refused.value.least) == (table, 5.0)
    with pytest.raises(InfeasibleBudget) as refused:
        check_feasible(candidates, [Limit.of(table, 4.9 / 13)])
    assert str(refused.value) == f"{message}; set 0.39 or more"
    with pytest.raises(InfeasibleBudget):
        check_feasible(candidates, [Limit(table, math.nan)])


@pytest.mark.parametrize(
    ("metric", "budget", "least", "message"),
    [
        (
            "latency_ms",
            1.45445,
            1.8448419923515758,
            "1.45 ms is below the cheapest network, 1.84 ms",
        ),
        ("macs", 14936.3, 84864.0, "14.9 k MACs is below the cheapest network, 84.9 k MACs"),
        ("params", 999.0, 1e6, "999 parameters is below the cheapest network, 1 M parameters"),
        ("energy_mj", 1234.5, 2000.0, "1230 mJ is below the cheapest network, 2000 mJ"),
        ("macs", 84863.0, 84864.0, "84.863 k MACs is below the cheapest network, 84.864 k MACs"),
        ("cycles", 7.0, 9.0, "7 cycles is below the cheapest network, 9 cycles"),
    ],
)
def test_a_refused_budget_is_told_in_units_of_people(metric, budget, least, message):
    table = one({"dense": 1e7, "r2": least}, metric=metric)
    with pytest.raises(InfeasibleBudget) as refused:
        check_feasible({"a": ["r2"]}, [Limit(table, budget)])
    assert message in str(refused.value)
    timed = "or a larger batch_size, memory_format channels_last (see docs: Meet a latency budget)"
    assert str(refused.value).endswith(timed) == (metric == "latency_ms")


def test_a_doubtful_table_is_told_before_the_remedy():
    table = one({"dense": 10.0, "r2": 2.0}, 3.0, metric="latency_ms")
    table = replace(table, quality={"standard_error": 0.5})
    with pytest.raises(InfeasibleBudget) as refused:
        check_feasible({"a": ["r2"]}, [Limit(table, 4.9)])
    told = [str(refused.value).index(part) for part in ("of the original", "doubtful", "set abs")]
    assert told == sorted(told)


def test_a_network_dearer_than_the_original_has_no_share_that_will_do():
    table = one({"dense": 10.0, "r2": 12.0})
    with pytest.raises(InfeasibleBudget, match=r"1.2 of the original's; no share will do: layers"):
        check_feasible({"a": ["r2"]}, [Limit.of(table, 1.0)])


@pytest.mark.parametrize("decide", [check_feasible, choose])
def test_an_impossible_budget_names_the_share_that_no_candidate_changes(decide):
    table = one({"dense": 10.0, "r2": 2.0}, 6.0, b={"dense": 24.0, "r2": 2.0})
    reasons = {"b": "excluded", "c": "frozen", "d": "frozen"}
    searched = {"a": {"dense": 1.0, "r2": 0.0}}
    for limits in ([Limit(table, 31.9)], [Limit(table, 31.9), Limit(table, 40.0)]):
        with pytest.raises(InfeasibleBudget) as refused:
            decide(searched, limits, left_alone=reasons)
        end = "; 0.75 of the original's stays as it is (b: excluded; c and 1 more: frozen)"
        assert str(refused.value).endswith(f"0.8 of the original's; set absolute: 32 or more{end}")
    # Where little or nothing of the cost is in other layers, the reasons are not to blame.
    for fixed in (0.0, 0.9):
        table = one({"dense": 10.0, "r2": 2.0}, fixed)
        with pytest.raises(
            InfeasibleBudget, match="of the original's; set absolute: [0-9.]+ or more$"
        ):
            decide(searched, [Limit(table, 1.0)], left_alone=reasons)


@pytest.mark.parametrize("least", [1 / 3, 1e-7, 0.56789, 9.9995, 10.0, 1234.5])
def test_the_fraction_that_a_refusal_names_is_accepted_as_the_budget(least):
    table = one({"dense": 20000.0, "r2": least}, 0.0)
    with pytest.raises(InfeasibleBudget) as refused:
        check_feasible({"a": ["r2"]}, [Limit(table, least / 2, least / 2 / table.original)])
    fraction = float(re.search(r"set (\S+) or more", str(refused.value))[1])
    assert check_feasible({"a": ["r2"]}, [Limit.of(table, fraction)]) == {"a": "r2"}
    assert fraction * table.original < least * 1.11


def test_the_cost_that_a_refusal_names_is_accepted_as_the_budget():
    table = one({"dense": 10.0, "r2": 1 / 3}, 1e6)
    with pytest.raises(InfeasibleBudget) as error:
        check_feasible({"a": ["r2"]}, [Limit(table, 1e6)])
    named = float(re.search(r"set absolute: (\S+) or more", str(error.value))[1])
    assert check_feasible({"a": ["r2"]}, [Limit(table, named)]) == {"a": "r2"}


def test_limits_that_conflict_name_the_least_cost_within_the_others():
    """Each can be met alone: 2 macs by r2, 3 params by r4."""
    macs = one({"dense": 10.0, "r2": 2.0, "r4": 6.0})
    params = one({"dense": 10.0, "r2": 7.0, "r4": 3.0}, metric="params")
    candidates = {"a": ["dense", "r2", "r4"]}
    assert check_feasible(candidates, [Limit(macs, 6.0), Limit(params, 3.0)]) == {"a": "r4"}
    message = "budget: 6.5 parameters is below the cheapest network within 5 MACs, 7 parameters"
    with pytest.raises(InfeasibleBudget, match=message):
        check_feasible(candidates, [Limit(macs, 5.0), Limit(params, 6.5)])


def test_many_choices_of_one_cost_just_above_the_budget_are_all_passed_over():
    """Far more ties within the solver's tolerance of the limit than can be cut off one by one."""
    row = {"dense": 3.0, "r2": 2.0, "r1": 1.0}
    table = CostTable("macs", {f"l{i}": row for i in range(20)}, 0.0)
    scores = {layer: {"dense": 2.0, "r2": 1.5, "r1": 0.0} for layer in table.costs}
    limit = Limit(table, math.nextafter(40.0, 0))
    choice = choose(scores, [limit])
    assert table.total(choice) == 39.0
    assert score(scores, choice) == 19 * 1.5


def test_a_score_that_is_not_finite_is_named():
    with pytest.raises(ValueError, match="layer 'a', candidate 'r2'"):
        choose({"a": {"dense": 0.0, "r2": math.inf}}, [Limit(one({"dense": 2.0, "r2": 1.0}), 3.0)])


def test_scores_that_are_costs_in_disguise_come_to_an_end(monkeypatch):
    """Any of ever so many choices nearly uses the budget, and proving which is the best would take
    the solver hours.
    """
    monkeypatch.setattr("nni_haloc.plan.budget._NODES", 200)
    draw = random.Random(0)
    layers = {f"l{i}": [f"r{j}" for j in range(30)] for i in range(16)}
    tables = [
        CostTable(
            "macs",
            {
                n: {c: draw.uniform(1, 1000) for c in row} | {"dense": 2000.0}
                for n, row in layers.items()
            },
            0.0,
        )
        for _ in "ab"
    ]
    limits = [Limit(table, 0.3 * table.original) for table in tables]
    choice = choose(tables[0].costs, limits, 0.98)
    assert all(limit.holds(choice) for limit in limits)
    assert tables[0].total(choice) > 0.9999 * limits[0].budget


def test_of_every_pair_of_ranks_a_few_are_left_and_the_best_choice_is_among_them():
    """Against running through every choice."""
    generator = np.random.default_rng(0)
    pairs = {f"r{a}x{b}": (a, b) for a in range(1, 7) for b in range(1, 7)}
    costs = {
        layer: {name: float(a * b + k * (a + b)) for name, (a, b) in pairs.items()}
        for k, layer in enumerate(("l0", "l1", "l2"))
    }
    scores = {
        layer: {name: -1 / a - 1 / b + 0.05 * generator.normal() for name, (a, b) in pairs.items()}
        for layer in costs
    }
    for layer, row in costs.items():
        row["dense"], scores[layer]["dense"] = 99.0, 0.0
    limits = [Limit(CostTable("macs", costs, 0.0), 60.0)]
    left = _undominated(scores, limits)
    assert all(2 < len(row) < 20 for row in left.values())
    for layer, row in scores.items():
        for name in row:
            better = [
                other
                for other in left[layer]
                if row[other] >= row[name] and costs[layer][other] <= costs[layer][name]
            ]
            assert better
    best = max(
        score(scores, choice)
        for choice in every(scores)
        if limits[0].costs.total(choice) <= limits[0].budget
    )
    assert score(scores, choose(scores, limits)) == pytest.approx(best, abs=1e-12)


def test_with_two_limits_only_what_is_cheaper_in_both_rules_a_candidate_out():
    """In each of two layers x is the best, y cheap in the second limit, z cheap in both."""
    macs = {"dense": 9.0, "x": 1.0, "y": 3.0, "z": 0.5}
    params = {"dense": 9.0, "x": 4.0, "y": 1.0, "z": 0.5}
    scores = {layer: {"x": 2.0, "y": 1.0, "z": 0.0} for layer in "ab"}
    limits = [
        Limit(CostTable(metric, {"a": row, "b": row}, 0.0), most)
        for metric, row, most in (("macs", macs, 10.0), ("params", params, 5.0))
    ]
    assert sorted(choose(scores, limits).values()) == ["x", "y"]
    assert all(set(row) == {"x", "y", "z"} for row in _undominated(scores, limits).values())


@given(problems(most_limits=3))
def test_what_is_left_out_is_no_better_than_something_left_in_no_cost_more(problem):
    scores, limits = problem
    for layer, left in _undominated(scores, limits).items():
        cost = {name: [x.costs.costs[layer][name] for x in limits] for name in scores[layer]}
        for name, own in scores[layer].items():
            over = [
                other
                for other, score in left.items()
                if score >= own and all(map(operator.le, cost[other], cost[name]))
            ]
            assert over
            assert (name in left) == (over == [name]) or any(
                cost[other] == cost[name] and scores[layer][other] == own for other in over
            )
