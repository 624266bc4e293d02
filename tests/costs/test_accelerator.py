"""The Eyeriss model: numbers known from ZigZag, bounds of any array, and the cache."""

import json
import logging
import math

import matplotlib
import pytest
import torch
from torch import nn

from nni_haloc.costs import accelerator
from nni_haloc.costs.accelerator import COLUMNS, ROWS, accelerator_table
from nni_haloc.space.layers import LayerSpec
from nni_haloc.space.ranks import AllowedRanks


@pytest.fixture
def network():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1),
        nn.Flatten(),
        nn.Linear(784, 4),
    )


@pytest.fixture
def modelled(monkeypatch):
    """The parts that are really given to ZigZag."""
    seen, model = [], accelerator._model
    monkeypatch.setattr(accelerator, "_model", lambda part: seen.append(part) or model(part))
    return seen


def test_numbers_known_from_zigzag():
    assert accelerator._model((64, 64, 3, 3, 56, 56, 1, 1)) == {
        "cycles": 702_590,
        "energy_pj": 943_679_716,
    }  # zigzag-dse 3.9.1


def test_a_candidate_costs_what_its_factors_cost_and_no_less_than_the_array_allows(
    network, modelled, tmp_path
):
    allowed, x = AllowedRanks(step=8, exclude=("0",), kinds=("conv",)), torch.randn(1, 3, 14, 14)
    cycles = accelerator_table(network, x, allowed, cache=tmp_path / "cache.json")
    parts = list(modelled)
    assert set(parts) == {
        (16, 16, 3, 3, 7, 7, 2, 2),  # the dense layer
        (16, 8, 1, 1, 14, 14, 1, 1),
        (8, 8, 3, 3, 7, 7, 2, 2),
        (8, 16, 1, 1, 7, 7, 1, 1),
        (3, 16, 3, 3, 14, 14, 1, 1),  # the rest
        (784, 4, 1, 1, 1, 1, 1, 1),
    }
    known = {
        tuple(part): costs
        for part, costs in json.loads((tmp_path / "cache.json").read_text())["parts"]
    }
    for part in parts:
        assert known[part]["cycles"] >= math.prod(part[:6]) / (ROWS * COLUMNS)
    energy = accelerator_table(network, x, allowed, "energy_pj", cache=tmp_path / "cache.json")
    assert len(modelled) == len(parts)  # nothing twice
    for table, metric in ((cycles, "cycles"), (energy, "energy_pj")):
        assert table.metric == metric
        assert table.costs["2"] == {
            "dense": known[parts[0]][metric],
            "r8": pytest.approx(sum(known[p][metric] for p in parts[1:4])),
        }
        assert table.fixed == pytest.approx(sum(known[p][metric] for p in parts[4:]))


def test_zigzag_leaves_logging_and_fonts_as_they_were_and_nothing_on_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    handlers, level, fonts = (
        list(logging.root.handlers),
        logging.root.level,
        dict(matplotlib.rcParams),
    )
    accelerator._model((4, 4, 1, 1, 4, 4, 1, 1))
    assert (logging.root.handlers, logging.root.level, logging.root.manager.disable) == (
        handlers,
        level,
        0,
    )
    assert dict(matplotlib.rcParams) == fonts
    assert not list(tmp_path.iterdir())


def test_a_bad_cache_is_one_line(tmp_path, network):
    (tmp_path / "cache.json").write_text("{}")
    with pytest.raises(ValueError, match=r"cache.json: not a cache of the accelerator model"):
        accelerator_table(network, torch.randn(1, 3, 14, 14), cache=tmp_path / "cache.json")


def test_a_linear_layer_is_modelled_for_each_of_its_tokens():
    spec = LayerSpec.of("0", nn.Linear(64, 32), ((2, 196, 64),))
    assert accelerator._parts(spec, (8,)) == [
        (64, 8, 1, 1, 196, 1, 1, 1),
        (8, 32, 1, 1, 196, 1, 1, 1),
    ]


def test_a_part_that_has_no_mapping_is_named():
    with pytest.raises(
        ValueError, match=r"no mapping of a convolution of \(1, 1, 1, 1, 1, 1, 1, 1\) \(channels in"
    ):
        accelerator._model((1, 1, 1, 1, 1, 1, 1, 1))
