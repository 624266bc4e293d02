"""Predicted entries against measured ones that were held back."""

import json

import numpy as np
import pytest
import torch
from helpers.clock import Clock
from helpers.paths import ROOT
from torch import nn

from nni_haloc.costs.device.measure import measure
from nni_haloc.costs.device.measured_file import unmeasured
from nni_haloc.costs.device.runtime import Timing
from nni_haloc.costs.device.spec import Specification, draw
from nni_haloc.costs.regression import complete
from nni_haloc.costs.specify import specify
from nni_haloc.costs.table import CostTable
from nni_haloc.inputs.models import build_model
from nni_haloc.space.names import DENSE
from nni_haloc.space.ranks import AllowedRanks

MEASURED = (
    ROOT / "tests" / "benchmarks" / "study" / "costs-resnet20.json"
)  # 575 candidates at batch 128, every entry the median of five

RAW = ROOT / "docs" / "raw"


@pytest.fixture(scope="module")
def recorded():
    """Return ResNet-20's specification at every rank, and a clock with the measured times."""
    spec = specify(
        build_model("resnet20"),
        torch.randn(128, 3, 32, 32),
        AllowedRanks(step=1, kinds=("conv",), exclude=("conv1",)),
        program=False,
    )
    table = json.loads(MEASURED.read_text())
    times = {
        index: table["costs"][layer][candidate]
        for index, (layer, candidate) in spec.first_users().items()
    }
    return spec, Clock(spec, times, table["fixed"])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_quarter_of_the_entries_predicts_the_rest_within_a_tenth(recorded, seed):
    spec, clock = recorded
    sample = draw(spec, 0.25, seed)
    assert len(sample) <= 0.26 * len(spec.entries)  # the dense layers are in it
    state = measure(spec, clock, None, Timing(rounds=1, min_run_time=0), indices=sample)
    missing = unmeasured(spec, state)
    content = complete(spec, state)
    homes = spec.first_users()
    found = {index: content["costs"][homes[index][0]][homes[index][1]] for index in homes}
    errors = [abs(found[index] / clock.cost[index] - 1) for index in missing]
    assert np.median(errors) <= 0.1
    assert all(
        found[index] == pytest.approx(clock.cost[index]) for index in homes if index not in missing
    )
    identity = content["identity"]
    assert (identity["predicted"], identity["measured"]) == (
        len(missing),
        len(spec.entries) - len(missing),
    )
    assert identity["median_error"] == pytest.approx(
        np.median(errors), abs=0.05
    )  # cross-validated on the sample alone


def test_ten_entries_predict_the_default_candidates_within_a_tenth():
    """42 entries of seven shapes.

    A Gaussian process alone, without rates of work and traffic, was wrong by a fifth.
    """
    spec = specify(
        build_model("resnet20"),
        torch.randn(128, 3, 32, 32),
        AllowedRanks(kinds=("conv",), exclude=("conv1",)),
        program=False,
    )
    table, homes, errors = (
        CostTable.load(RAW / "costs-resnet20-channels_last.json"),
        spec.first_users(),
        [],
    )
    clock = Clock(
        spec,
        {index: table.costs[layer][candidate] for index, (layer, candidate) in homes.items()},
        table.fixed,
    )
    for seed in range(5):
        state = measure(
            spec, clock, None, Timing(rounds=1, min_run_time=0), indices=draw(spec, 0.25, seed)
        )
        content = complete(spec, state)
        errors.append(
            np.median(
                [
                    abs(content["costs"][homes[i][0]][homes[i][1]] / clock.cost[i] - 1)
                    for i in unmeasured(spec, state)
                ]
            )
        )
    assert np.mean(errors) <= 0.1


def test_a_sample_has_every_shape_and_its_share_of_each(recorded):
    spec, _ = recorded
    for fraction in (0.1, 0.25, 1):
        sample = set(draw(spec, fraction))
        for row in spec.layers.values():
            assert row[DENSE] in sample
            assert len(sample & set(row.values())) == pytest.approx(
                max(2, fraction * len(row)), abs=0.5
            )
    for fraction in (0, 1.5, -1):
        with pytest.raises(ValueError, match="sample"):
            draw(spec, fraction)


def test_a_table_that_was_predicted_is_complete_and_can_be_measured_on(tmp_path, recorded):
    spec, clock = recorded
    out, timing = tmp_path / "costs.json", Timing(rounds=1, min_run_time=0)
    content = complete(spec, measure(spec, clock, out, timing, indices=draw(spec, 0.25)))
    out.write_text(json.dumps(content))
    predicted = CostTable.load(out)
    measure(spec, clock, out, timing)
    table = CostTable.load(out)
    assert {layer: set(row) for layer, row in predicted.costs.items()} == {
        layer: set(row) for layer, row in table.costs.items()
    }
    assert "predicted" not in table.identity
    assert table.costs["layer1.0.conv1"]["r8"] == pytest.approx(
        clock.cost[spec.layers["layer1.0.conv1"]["r8"]]
    )


def test_too_few_measurements_and_those_in_place_are_refused():
    spec = specify(
        nn.Sequential(nn.Conv2d(8, 8, 3)),
        torch.randn(1, 8, 8, 8),
        AllowedRanks(step=1),
        program=False,
    )
    clock = Clock(spec, dict.fromkeys(range(len(spec.entries)), 1.0))
    with pytest.raises(ValueError, match="at least 10 measured entries"):
        complete(spec, measure(spec, clock, None, Timing(rounds=1, min_run_time=0), indices=[0, 1]))
    with pytest.raises(ValueError, match="in place"):
        complete(
            spec,
            measure(
                spec, clock, None, Timing("in-place", rounds=1, min_run_time=0), indices=[0, 1]
            ),
        )


def test_a_layer_with_nothing_but_its_dense_candidate_is_sampled():
    spec = specify(
        nn.Sequential(nn.Conv2d(8, 8, 3)),
        torch.randn(1, 8, 8, 8),
        AllowedRanks(step=1),
        program=False,
    )
    alone = Specification(
        **{**vars(spec), "layers": {"0": {"dense": 0}}, "entries": spec.entries[:1]}
    )
    assert draw(alone, 0.5) == [0]
