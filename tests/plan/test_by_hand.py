"""A plan that is changed by hand: the others are refitted, and every layer's reason is told."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nni_haloc.costs.table import CostTable
from nni_haloc.plan.budget import Limit
from nni_haloc.plan.by_hand import explain, limits_of_file, movement, read_wishes, refit
from nni_haloc.plan.known_layers import KnownLayers
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.plan.rules import plan
from nni_haloc.plan.rules.scored import USE
from nni_haloc.space.names import rank_name
from nni_haloc.space.ranks import AllowedRanks
from nni_haloc.utils.errors import InfeasibleBudget, SettingsError

NAMES = ("dense", "r6", "r4", "r2")
LAYERS = ("a", "b", "c")
KNOWN = KnownLayers(
    {"stem.conv": "conv", "body.point": "pointwise", "body.pinned": "conv"},
    {
        "stem.conv": {"dense": 0.0, "r16x8": 0.1, "r8": 0.2, "r4": 0.8},
        "body.point": {"dense": 0.0, "r8": 0.0, "r4": 0.3},
        "body.pinned": {"r8": 0.5},
    },
    ["body.pinned"],
    {"body.depth": "grouped convolution", "head": "kind 'linear' is not among the searched kinds"},
)


def problems():
    """Whole costs and sensitivities of three layers in one or two tables, limits, and wishes."""
    row = st.lists(st.integers(1, 30), min_size=len(NAMES), max_size=len(NAMES))
    table = st.lists(row, min_size=len(LAYERS), max_size=len(LAYERS))
    return st.tuples(
        st.lists(table, min_size=1, max_size=2),
        table,
        st.lists(st.integers(8, 90), min_size=2, max_size=2),
        st.dictionaries(st.sampled_from(LAYERS), st.sampled_from(NAMES), max_size=2),
    )


@settings(max_examples=40, deadline=None)
@given(problems())
def test_a_refitted_plan_is_the_best_that_holds_the_wishes(drawn):
    """Against every network of the space: within every limit, of those that use the budget."""
    tables, added, budgets, wishes = drawn
    rows = [
        {
            layer: dict(zip(NAMES, map(float, row), strict=True))
            for layer, row in zip(LAYERS, table, strict=True)
        }
        for table in tables
    ]
    limits = [
        Limit(CostTable("macs", r, 5.0), float(b)) for r, b in zip(rows, budgets, strict=False)
    ]
    moved = {
        layer: dict(zip(NAMES, row, strict=True)) for layer, row in zip(LAYERS, added, strict=True)
    }
    known = KnownLayers(dict.fromkeys(LAYERS, "conv"), moved, [], {})
    spaces = [[wishes[layer]] if layer in wishes else NAMES for layer in LAYERS]
    every = [dict(zip(LAYERS, names, strict=True)) for names in itertools.product(*spaces)]

    def costs(choice):
        return [5.0 + sum(r[layer][name] for layer, name in choice.items()) for r in rows]

    least = [min(costs(choice)[k] for choice in every) for k in range(len(rows))]

    def uses(choice):
        return max(
            (cost - low) / (limit.budget - low) if limit.budget > low else 1.0
            for cost, low, limit in zip(costs(choice), least, limits, strict=True)
        )

    within = [c for c in every if all(x <= y.budget for x, y in zip(costs(c), limits, strict=True))]
    start = RankPlan(dict.fromkeys(LAYERS), {"rule": "uniform"})
    if not within:
        with pytest.raises(InfeasibleBudget, match="--set|budget"):
            refit(start, limits, known, wishes)
        return
    use = USE
    while not (enough := [c for c in within if uses(c) >= use - 1e-9]):
        use = min(2 * use - 1, use - 0.01)
    best = min(sum(moved[layer][name] for layer, name in c.items()) for c in enough)
    found = refit(start, limits, known, wishes)
    assert wishes.items() <= found.names.items()
    assert costs(found.names)[0] == found.chosen_by["cost"] <= limits[0].budget
    assert found.names in within
    assert movement(found.names, known) == best


def test_a_plan_of_the_rule_stays_where_nothing_is_changed(net, images, labels):
    """One rank that it already has is wished: the rest is the rule's own choice again."""
    from helpers.problems import problem

    made = problem(net, images, labels, allowed=AllowedRanks(step=2))
    chosen = plan(made, "sensitivity-knapsack")
    known = KnownLayers.of(made.specs, made.candidates, made.evidence.added, [], {})
    for layer, name in chosen.names.items():
        again = refit(chosen, made.limits, known, {layer: name})
        assert again.ranks == chosen.ranks
        assert (again.chosen_by["rule"], again.chosen_by["changed"]) == ("by hand", {layer: name})


def test_what_is_known_of_layers_is_read_as_it_is_written(tmp_path):
    KNOWN.save(tmp_path / "layers.json")
    assert KnownLayers.load(tmp_path / "layers.json") == KNOWN
    unmeasured = KnownLayers({"a": "conv"}, {"a": {"r4": None}}, [], {})
    unmeasured.save(tmp_path / "layers.json")
    assert KnownLayers.load(tmp_path / "layers.json") == unmeasured
    assert (KNOWN.measured, unmeasured.measured) == (True, False)


@pytest.mark.parametrize(
    "layers",
    [
        "[]",
        '{"a": 3}',
        '{"a": {}}',
        '{"a": {"kind": "conv"}}',
        '{"a": {"kind": "conv", "sensitivities": {}}}',
        '{"a": {"kind": "depthwise", "sensitivities": {"r4": 0.1}}}',
        '{"a": {"kind": "conv", "sensitivities": {"4": 0.1}}}',
        '{"a": {"kind": "pointwise", "sensitivities": {"r4x2": 0.1}}}',
        '{"a": {"kind": "conv", "sensitivities": {"r4": "much"}}}',
        '{"a": {"kind": "conv", "sensitivities": {"r4": true}}}',
    ],
)
def test_a_damaged_file_of_layers_is_one_line(tmp_path, layers):
    file = tmp_path / "layers.json"
    file.write_text(f'{{"version": 1, "layers": {layers}}}')
    with pytest.raises(ValueError, match=r"layers\.json: layer") as error:
        KnownLayers.load(file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("wishes", "found"),
    [
        (["stem.conv=8"], {"stem.conv": "r8"}),
        (["stem.conv=r8"], {"stem.conv": "r8"}),
        (["stem.conv=8x8"], {"stem.conv": "r8"}),
        (["stem.conv=16x8"], {"stem.conv": "r16x8"}),
        (["stem.conv=dense"], {"stem.conv": "dense"}),
        (["body.point=4"], {"body.point": "r4"}),
        (["body.pinned=8"], {"body.pinned": "r8"}),
        (["*=8"], dict.fromkeys(KNOWN.candidates, "r8")),
        (["body.*=8"], {"body.point": "r8", "body.pinned": "r8"}),
        (["stem.conv=4", "*=8"], {**dict.fromkeys(KNOWN.candidates, "r8"), "stem.conv": "r4"}),
    ],
)
def test_wishes_mean_candidates(wishes, found):
    assert read_wishes(wishes, KNOWN) == found


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        (["stem.conv"], "--set: expected LAYER=RANK, the rank 24, 24x32 or dense, found 'stem"),
        (["=8"], "--set: expected LAYER=RANK"),
        (["stem.conv=-8"], "--set: expected LAYER=RANK"),
        (["stem.conv=8x8x8"], "--set: expected LAYER=RANK"),
        (["stem.conv="], "--set: expected LAYER=RANK"),
        (["stem.conv=0"], "--set stem.conv=0: layer 'stem.conv' is of kind 'conv': expected 24"),
        (
            ["stem.conv=6"],
            "layer 'stem.conv' has no candidate 6: expected one of dense, 16x8, 8, 4",
        ),
        (["body.point=4x4"], "layer 'body.point' is of kind 'pointwise': expected one rank"),
        (["body.pinned=4"], "layer 'body.pinned' is pinned to r8; run again with another pin"),
        (["body.depth=4"], "layer 'body.depth' is left alone: grouped convolution"),
        (["head=4"], "layer 'head' is left alone: kind 'linear'"),
        (["conv9=4"], "no searched layer matches 'conv9'; expected one of stem.conv, body.point"),
        (["stem.conv=8", "stem.*=4"], "--set stem.*=4: its layers are set already"),
    ],
)
def test_a_wish_that_is_not_possible_is_one_line(wishes, message):
    with pytest.raises(SettingsError) as error:
        read_wishes(wishes, KNOWN)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_of_many_candidates_the_nearest_are_named():
    row = {"dense": 0.0, **{f"r{r}": 1.0 / r for r in range(64, 0, -2)}}
    known = KnownLayers({"a": "conv"}, {"a": row}, [], {})
    with pytest.raises(SettingsError, match="near it, such as 26, 24, 22, 20, 18, 16, 14, 12,"):
        read_wishes(["a=19"], known)


def test_what_a_refit_needs_is_told_where_it_is_missing():
    table = CostTable("macs", {"a": {"dense": 9.0, "r2": 3.0}}, 1.0)
    start, limits = RankPlan({"a": (2, 2)}), [Limit(table, 5.0)]
    unmeasured = KnownLayers({"a": "conv"}, {"a": {"dense": None, "r2": None}}, [], {})
    with pytest.raises(SettingsError, match="kept no sensitivities.*rule: sensitivity-knapsack"):
        refit(start, limits, unmeasured, {"a": "r2"})
    measured = KnownLayers({"a": "conv"}, {"a": {"dense": 0.0, "r2": 1.0}}, [], {})
    with pytest.raises(InfeasibleBudget) as error:
        refit(start, limits, measured, {"a": "dense"})
    assert str(error.value) == (
        "--set: with a at dense, 5 MACs is below the cheapest network, 10 MACs, 1 of the"
        " original's; choose lower ranks, or run with a higher budget"
    )
    with pytest.raises(ValueError, match="does not say its budget"):
        limits_of_file(start, [table])
    facts = {"budget": 5.0, "also": [{"budget": 6.0}]}
    with pytest.raises(ValueError, match="expected 2 cost tables, found 1"):
        limits_of_file(RankPlan({}, facts), [table])


COSTS = CostTable(
    "macs",
    {
        "stem.conv": {"dense": 100.0, "r16x8": 60.0, "r8": 40.0, "r4": 20.0},
        "body.point": {"dense": 50.0, "r8": 30.0, "r4": 10.0},
        "body.pinned": {"dense": 50.0, "r8": 20.0},
    },
    0.0,
)
"""200 in all."""


@pytest.mark.parametrize(
    ("layer", "rank", "cheaper", "dearer", "reason"),
    [
        ("stem.conv", None, "r16x8", None,
         "next lower rank r16x8 saves 20.0 % of the network's cost but moves the outputs by 0.1"),
        ("stem.conv", (8, 8), "r4", "r16x8",
         "next lower rank r4 saves 10.0 % of the network's cost but moves the outputs 4 times as"
         " far"),
        ("stem.conv", (4, 4), None, "r8",
         "the cheapest: next higher rank r8 takes 10.0 % more of the network's cost and moves the"
         " outputs 0.25 times as far"),
        ("body.point", None, "r8", None,  # which nothing speaks for
         "next lower rank r8 saves 10.0 % of the network's cost and moves the outputs as far"),
        ("body.pinned", (8, 8), None, None, "pinned"),
    ],
)  # fmt: skip
def test_the_reason_for_a_rank_is_told_by_its_neighbours(layer, rank, cheaper, dearer, reason):
    (row,) = (r for r in explain(RankPlan({layer: rank}), COSTS, KNOWN) if not r.left_alone)
    assert row.chosen.name == rank_name(rank)
    assert row.chosen.cost == COSTS.costs[layer][row.chosen.name]
    assert row.dense.cost == COSTS.costs[layer]["dense"]
    assert row.chosen.sensitivity == KNOWN.candidates[layer][row.chosen.name]
    assert [each and each.name for each in (row.cheaper, row.dearer)] == [cheaper, dearer]
    assert row.reason == reason


def test_a_candidate_that_another_one_beats_is_no_neighbour():
    """It costs more, and moves the outputs further: nobody would choose it."""
    row = {"dense": 0.0, "r8": 0.1, "r6": 0.9, "r4": 0.5}
    known = KnownLayers({"a": "conv"}, {"a": row}, [], {})
    costs = CostTable("macs", {"a": {"dense": 9.0, "r8": 8.0, "r6": 6.0, "r4": 4.0}}, 0.0)
    (found,) = explain(RankPlan({"a": (8, 8)}), costs, known)
    assert found.cheaper.name == "r4"


def test_without_sensitivities_the_costs_alone_are_told():
    plan = RankPlan({"stem.conv": (8, 8), "body.point": None, "alone": None}, {"rule": "uniform"})
    costs = CostTable("macs", {**COSTS.costs, "alone": {"dense": 5.0}}, 0.0)
    stem, point, alone = explain(plan, costs, None)
    assert stem.reason == "next lower rank r4 saves 9.8 % of the network's cost"
    assert (point.cheaper.name, point.dearer, point.chosen.sensitivity) == ("r8", None, None)
    assert alone.reason == "dense: every low rank is dearer"
    assert [row.reason for row in explain(plan, None, None)] == ["", "", ""]


def test_layers_that_are_left_alone_or_set_by_hand_say_so():
    facts = {"rule": "by hand", "changed": {"stem.conv": "r8"}}
    rows = explain(RankPlan({"stem.conv": (8, 8), "body.point": (4,)}, facts), COSTS, KNOWN)
    reasons = {row.layer: row.reason for row in rows}
    assert reasons["stem.conv"] == "set by hand"
    assert reasons["body.depth"] == "left alone: grouped convolution"
    assert list(reasons) == ["stem.conv", "body.point", "body.depth", "head"]


def test_the_movement_is_the_sum_of_sensitivities():
    assert movement({"stem.conv": "r8", "body.point": "r4"}, KNOWN) == math.fsum([0.2, 0.3])
    assert movement({"stem.conv": "r9"}, KNOWN) is None
