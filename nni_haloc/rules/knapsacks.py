"""Rules that give every candidate a score and take the best total within the limits."""

from __future__ import annotations

import copy

from ..budget import Choice, choose
from ..candidates import replace_modules
from .problem import Problem

USE = 0.95
"""Fraction of a budget that a choice uses, where any does."""


def error_knapsack(problem: Problem) -> Choice:
    """The least sum of squared relative output errors."""
    return choose({layer: {name: -(error**2) for name, error in row.items()} for layer, row in problem.errors.items()}, problem.limits, USE)


def sensitivity_knapsack(problem: Problem) -> Choice:
    """The least sum of what each candidate alone, all else left as it was, adds to the loss on the images."""
    return choose(
        {layer: {name: -loss for name, loss in row.items()} for layer, row in sensitivities(problem).items()}, problem.limits, USE
    )


def sensitivities(problem: Problem) -> dict[str, dict[str, float]]:
    """Layer to candidate to the loss of the network with that candidate alone, less the original's."""
    original = problem.loss(problem.model)
    found: dict[str, dict[str, float]] = {}
    for layer, row in problem.candidates.items():
        found[layer] = {}
        for name, rank in row.items():
            if rank is None:
                found[layer][name] = 0.0
                continue
            network = copy.deepcopy(problem.model)
            replace_modules(network, {layer: problem.modules[layer][name]})
            found[layer][name] = problem.loss(network) - original
    return found
