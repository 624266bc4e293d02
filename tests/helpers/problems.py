"""What rank rules choose from in the tests."""

import itertools
import math

import torch
from torch.utils.data import DataLoader, TensorDataset

from nni_haloc.costs.analytic import mac_table, param_table
from nni_haloc.plan.budget import Limit
from nni_haloc.plan.rules.problem import Problem
from nni_haloc.space.ranks import AllowedRanks, find_layers


def loader(images, labels, seed=3):
    return DataLoader(
        TensorDataset(images, labels),
        16,
        shuffle=True,
        generator=torch.Generator().manual_seed(seed),
    )


def problem(net, images, labels, fractions=(0.4,), allowed=AllowedRanks(step=1), **more):
    """A problem with limits on the MACs and, with two ``fractions``, on the parameters."""
    layers = find_layers(net, images[:1], allowed)
    tables = [
        make(net, images[:1], allowed)
        for make, _ in zip((mac_table, param_table), fractions, strict=False)
    ]
    limits = [
        Limit(table, fraction * table.original)
        for table, fraction in zip(tables, fractions, strict=True)
    ]
    return Problem(net, layers.specs, layers.candidates(allowed), limits, images, labels, **more)


def every(problem):
    """All choices within the limits."""
    for names in itertools.product(*problem.candidates.values()):
        choice = dict(zip(problem.candidates, names, strict=True))
        if problem.holds(choice):
            yield choice


def total(scores, choice, power=1):
    return math.fsum(scores[layer][name] ** power for layer, name in choice.items())
