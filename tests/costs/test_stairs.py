"""The stairs of a device: found where they are, not found where they are not, and used."""

import math

import numpy as np
import pytest
import torch
from helpers.commands import haloc
from hypothesis import given
from hypothesis import strategies as st

from nni_haloc.costs.analytic import activation_table, mac_table, param_table
from nni_haloc.costs.stairs import Stairs, rank_stairs
from nni_haloc.costs.table import CostTable
from nni_haloc.inputs.models import build_model
from nni_haloc.space.ranks import AllowedRanks, find_layers


def table(cost, highest, dense=100.0):
    return CostTable(
        "latency_ms",
        {"a": {"dense": dense, **{f"r{r}": cost(r) for r in range(1, highest + 1)}}},
        0,
    )


@pytest.mark.parametrize("count", [mac_table, param_table, activation_table])
def test_counted_costs_have_no_stairs(count):
    """Polynomials in the rank: what rounding leaves of them is no device's."""
    model, x = build_model("resnet20"), torch.randn(1, 3, 32, 32)
    found = rank_stairs(count(model, x, AllowedRanks(step=1, kinds=("conv",), exclude=("conv1",))))
    assert found
    assert {stairs.width for stairs in found.values()} == {1}


@given(
    width=st.integers(3, 16),
    treads=st.integers(2, 4),
    slope=st.floats(0, 0.5),
    rise=st.floats(2, 10),
    seed=st.integers(0, 9),
)
def test_stairs_are_found_where_they_are(width, treads, slope, rise, seed):
    noise = np.random.default_rng(seed).normal(0, 0.02 * rise, 200)
    highest = max(8, width * treads)
    found = rank_stairs(
        table(lambda r: 5 + slope * r + rise * math.ceil(r / width) + noise[r], highest)
    )["a"]
    assert found.width == width
    assert found.rise == pytest.approx(rise / 100, rel=0.2)
    assert found.explained > 0.5


@pytest.mark.parametrize(
    "cost",
    [
        lambda r: 5.0 + r,
        lambda r: 5 + r + 0.01 * r * r,
        lambda r: 20.0 - 0.1 * r,
        lambda r: 5 + r + math.sin(9 * r),
    ],
)
def test_no_stairs_are_found_where_there_are_none(cost):
    assert rank_stairs(table(cost, 40))["a"] == Stairs(1, 0.0, 0.0)


def test_noise_is_no_stairs():
    noise = np.random.default_rng(0).normal(0, 1, (300, 30))
    found = [
        rank_stairs(table(lambda r, row=row: 20 + 2 * r + row[r], 8 + i % 12))["a"].width > 1
        for i, row in enumerate(noise)
    ]
    assert sum(found) <= 10


def test_a_layer_with_few_ranks_says_nothing():
    assert rank_stairs(table(lambda r: float(r), 7)) == {}


def test_above_the_first_stair_ranks_are_its_multiples():
    layers = find_layers(
        build_model("resnet20"), torch.randn(1, 3, 32, 32), AllowedRanks(exclude=("conv1",))
    )
    spec = layers.specs["layer3.1.conv1"]
    assert [r and r[0] for r in AllowedRanks(stairs={spec.name: 16}).candidates(spec)] == [
        None,
        48,
        32,
        16,
        8,
    ]
    assert [r and r[0] for r in AllowedRanks(step=5, stairs={spec.name: 16}).candidates(spec)] == [
        None,
        48,
        32,
        16,
        15,
        10,
        5,
    ]
    assert AllowedRanks(stairs={"another": 16}).candidates(spec) == AllowedRanks().candidates(spec)
    pairs = AllowedRanks(equal=False, stairs={spec.name: 16}).candidates(spec)
    assert {r for pair in pairs if pair for r in pair} == {8, 16, 32, 48, 64}


def test_the_command_prints_them_and_bad_tables_are_one_line(tmp_path):
    table(lambda r: 5 + 3 * math.ceil(r / 8), 40).save(tmp_path / "costs.json")
    done = haloc("steps", tmp_path / "costs.json")
    assert done.returncode == 0, done.stderr
    assert any(
        {"a", "8", "3"} <= set(line.split()) for line in done.stdout.replace("│", " ").splitlines()
    )
    table(lambda r: float(r), 7).save(tmp_path / "few.json")
    for file, message in (("few.json", "eight equal ranks"), ("none.json", "no such file")):
        done = haloc("steps", tmp_path / file)
        assert done.returncode == 2
        assert message in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
