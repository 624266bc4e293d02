"""Cost tables with any numbers in them: refused on one line, or fit for every use of a table."""

import csv
import json
import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nni_haloc.costs.device.measured_file import read_measurements
from nni_haloc.costs.stairs import rank_stairs
from nni_haloc.costs.table import CostTable
from nni_haloc.plan.budget import Limit, check_feasible, choose
from nni_haloc.space.names import parse_rank
from nni_haloc.utils.errors import InfeasibleBudget

BAD = [
    (10**400, "expected a cost from 1e-18 to 1e.18, found 1000000"),
    (10**30, "expected a cost from 1e-18 to 1e.18, found 1000000"),
    (1e300, "expected a cost from 1e-18 to 1e.18, found 1e.300"),
    (-1, "found -1"),
    (-(10**400), "found -1000000"),
    (math.nan, "found nan"),
    (math.inf, "found inf"),
    ("3", "found '3'"),
    (True, "found True"),
    (None, "found None"),
    ([1], r"found \[1\]"),
]


def content(**changes):
    return {
        "version": 1,
        "metric": "macs",
        "fixed": 1.0,
        "costs": {"a": {"dense": 2.0, "r4": 1.0}, "b": {"dense": 3.0, "r4": 1.0}},
        **changes,
    }


@pytest.fixture
def refused(tmp_path):
    def refused(content, message):
        path = tmp_path / "costs.json"
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message) as caught:
            CostTable.load(path)
        assert str(caught.value).startswith(str(path))
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 400 + len(str(path))

    return refused


@pytest.mark.parametrize(("value", "message"), BAD, ids=[str(value)[:8] for value, _ in BAD])
def test_a_value_that_is_no_cost_is_one_line(refused, value, message):
    refused(content(fixed=value), f"fixed.*{message}")
    refused(content(costs={"a": {"dense": 2.0, "r4": value}}), f"r4.*{message}")
    if not (isinstance(value, (int, float)) and 0 < value < 1e308):
        refused(
            content(spread={"a": {"dense": value}}), f"spread.*{message.rpartition('found')[2]}"
        )


@pytest.mark.parametrize("key", ["fixed", "metric", "costs"])
def test_a_key_that_is_given_twice_is_refused(tmp_path, key):
    path = tmp_path / "costs.json"
    text = json.dumps(content(), indent=1)
    path.write_text(text[:-2] + f',\n "{key}": {json.dumps(content()[key])}\n}}')
    line = text.count("\n") + 1
    for read in (CostTable.load, lambda path: read_measurements(path, {"geometry": {}})):
        with pytest.raises(ValueError, match=f"costs.json: line {line}: {key}: given twice"):
            read(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("network,,-1", "fixed cost: expected a number >= 0, found -"),
        ("fixed,,nan", "fixed cost: .*found nan"),
        ("fixed,,1e999", "fixed cost: .*found inf"),
        ("fixed,,1e300", "fixed cost: expected a cost from"),
        ("fixed,,1\na,r4,0", "expected a positive cost, found 0.0"),
        ("fixed,,1\na,r4,1e300", "expected a cost from"),
        ("fixed,,1\na,dense,2", "line 4: expected .*once each"),
    ],
)
def test_a_csv_file_is_held_to_the_same(tmp_path, line, message):
    path = tmp_path / "costs.csv"
    path.write_text(f"layer,candidate,macs\na,dense,2\n{line}\n")
    with pytest.raises(ValueError, match=f"costs.csv: .*{message}"):
        CostTable.load(path)


costs = st.one_of(
    st.floats(1e-18, 1e18),
    st.integers(1, 10**18),
    st.sampled_from([1e-18, 1e18, 1.0, 1.0000000001, 3]),
)
rows = st.dictionaries(st.sampled_from(["r2", "r4", "r8"]), costs, min_size=1)


@given(
    st.dictionaries(st.sampled_from("abc"), st.tuples(costs, rows), min_size=1),
    st.one_of(st.just(0), costs),
    st.floats(1e-6, 1),
)
@example({"a": (1e18, {"r4": 1e-18}), "b": (1e-18, {"r2": 1e18})}, 0, 0.5)
@settings(deadline=None, max_examples=120)
def test_every_table_that_is_accepted_can_be_planned_with(layers, fixed, fraction):
    """A plan is within its budget by exact sums, or none is, by the cheapest choice."""
    table = CostTable(
        "macs", {name: {"dense": d, **row} for name, (d, row) in layers.items()}, fixed
    )
    assert 0 < table.original < math.inf
    limit = Limit.of(table, fraction)
    scores = {name: {k: -i for i, k in enumerate(row)} for name, row in table.costs.items()}
    least = math.fsum([fixed, *(min(row.values()) for row in table.costs.values())])
    try:
        check_feasible(scores, [limit])
        choice = choose(scores, [limit], use=0.9)
    except InfeasibleBudget:
        assert least > limit.budget
        return
    assert math.fsum([fixed, *(table.costs[k][v] for k, v in choice.items())]) <= limit.budget
    assert least <= limit.budget


@pytest.mark.parametrize("name", ["r1000000", "r" + "9" * 5000, "r4x9999999", "r٣", "r04", "r4 "])
def test_a_name_that_is_no_rank_is_refused(name):
    with pytest.raises(ValueError, match="expected 'dense', 'r16'"):
        parse_rank(name, "conv")


def test_stairs_of_a_rank_that_no_layer_has_are_refused():
    """The widths that are tried are as many as the largest rank."""
    names = {f"r{i}": float(i) for i in (*range(1, 9), 10**12)}
    with pytest.raises(ValueError, match="found 'r1000000000000'"):
        rank_stairs(CostTable("macs", {"a": {"dense": 20.0, **names}}, 0))


def test_a_small_csv_file_is_no_limit_for_the_next_one(tmp_path):
    """The limit on a field's length is one for the whole process."""
    before = csv.field_size_limit()
    (tmp_path / "a.csv").write_text("layer,candidate,macs\na,dense,1\nfixed,,1\n")
    CostTable.load(tmp_path / "a.csv")
    assert csv.field_size_limit() == before
    long = "b" * (before + 1)
    (tmp_path / "b.csv").write_text(f"layer,candidate,macs\n{long},dense,1\nfixed,,1\n")
    assert list(CostTable.load(tmp_path / "b.csv").costs) == [long]
    csv.field_size_limit(before)
