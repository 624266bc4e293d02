"""Rules that set one number for the whole network: what the number means, and that it is the best
that fits.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch
from helpers.problems import every, problem
from torch import nn

from nni_haloc.costs.table import CostTable
from nni_haloc.plan.budget import Limit
from nni_haloc.plan.rules import RULES
from nni_haloc.plan.rules.problem import Problem
from nni_haloc.space.ranks import AllowedRanks, find_layers


def cut(matrix, rank):
    """Relative spectral error of the matrix with its smaller singular values set to 0."""
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    return np.linalg.norm(matrix - (u[:, :rank] * s[:rank]) @ v[:rank], 2) / np.linalg.norm(
        matrix, 2
    )


@pytest.mark.parametrize("fraction", [0.3, 0.45, 0.7, 0.9])
def test_alds_has_the_least_largest_error_of_all_choices(fraction, net, images, labels):
    one, errors = problem(net, images, labels, (fraction,)), {}
    for layer, row in one.candidates.items():
        weight = net.get_submodule(layer).weight.detach().double().numpy()
        weight = weight.reshape(*weight.shape[:2], -1)
        unfolded = [
            weight.reshape(len(weight), -1),
            weight.swapaxes(0, 1).reshape(weight.shape[1], -1),
        ]
        errors[layer] = {
            name: max(cut(matrix, min(rank)) for matrix in unfolded) if rank else 0.0
            for name, rank in row.items()
        }

    def largest(choice):
        return max(errors[layer][name] for layer, name in choice.items())

    assert largest(RULES["alds"](one)) == pytest.approx(min(map(largest, every(one))), rel=1e-6)


def test_a_dead_layer_needs_no_rank_by_alds(net, images, labels):
    """Its kernel is 0, and so is what any rank leaves of it."""
    with torch.no_grad():
        net.point.weight.zero_()
    one = problem(net, images, labels, (0.7,))
    assert RULES["alds"](one)["point"] == min(
        one.candidates["point"], key=lambda name: one.cost("point", name)
    )


@pytest.mark.parametrize("fraction", [0.3, 0.45, 0.7, 0.9])
def test_energy_is_one_threshold_the_least_within_the_budget(fraction, net, images, labels):
    one = problem(net, images, labels, (fraction,))

    def lowest(bound):
        """Of each layer the lowest rank within the bound; dense has none."""
        low = {}
        for layer, row in one.candidates.items():
            within = [name for name in row if one.errors[layer][name] <= bound]
            low[layer] = min(within, key=lambda name: (row[name] or (math.inf,))[0])
        return low

    bounds = sorted(error for row in one.errors.values() for error in row.values())
    bound = next(bound for bound in bounds if one.holds(lowest(bound)))
    assert 0 < bound < 1
    assert RULES["energy"](one) == lowest(bound)


class Alike(nn.Module):
    """Three layers of eight channels: every rank is an eighth more of each."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3)))

    def forward(self, x):
        return self.layers(x).mean((2, 3))


def by_rank(allowed=AllowedRanks(step=1, dense=False)):
    """A problem on `Alike` where rank r of a layer costs r, by budget."""
    torch.manual_seed(0)
    net, images = Alike(), torch.randn(16, 8, 5, 5)
    layers = find_layers(net, images[:1], allowed)
    costs = {
        n: {name: float(sum(r)) / 2 for name, r in row.items()} | {"dense": 8.0}
        for n, row in layers.candidates(allowed).items()
    }
    table = CostTable("macs", costs, 0.0)
    return lambda budget: Problem(
        net,
        layers.specs,
        layers.candidates(allowed),
        [Limit(table, budget)],
        images,
        torch.zeros(16, dtype=torch.long),
    )


@pytest.mark.parametrize(
    ("budget", "ranks"), [(3, "111"), (8, "233"), (9, "333"), (11.5, "344"), (15.9, "555")]
)
def test_uniform_is_one_fraction_and_what_it_leaves(budget, ranks):
    found = RULES["uniform"](by_rank()(float(budget)))
    assert "".join(sorted(name.removeprefix("r") for name in found.values())) == ranks


def test_uniform_counts_channels_of_each_layer(images, labels):
    """A quarter of 8 and of 16 channels; the budget is just that network's."""
    torch.manual_seed(0)
    sizes = [(3, 8, 3), (8, 8, 3), (8, 16, 1), (16, 16, 3), (16, 4, 1)]
    net = nn.Sequential(
        *(nn.Conv2d(*size, padding=size[2] // 2) for size in sizes),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    allowed = AllowedRanks(step=1, exclude=("0",), pin={"2": "dense", "4": "dense"})
    one = problem(net, images, labels, (1.0,), allowed)
    budget = one.limits[0].costs.total({"1": "r2", "2": "dense", "3": "r4", "4": "dense"})
    one = dataclasses.replace(one, limits=[Limit(one.limits[0].costs, budget)])
    assert RULES["uniform"](one) == {"1": "r2", "2": "dense", "3": "r4", "4": "dense"}
