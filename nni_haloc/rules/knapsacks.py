"""Rules that give every candidate a score and take the best total within the limits."""

from __future__ import annotations

from ..budget import Choice, choose
from ..sensitivity import sensitivities
from .problem import Problem

USE = 0.95
"""Fraction of a budget that a choice uses, where any does."""


def error_knapsack(problem: Problem) -> Choice:
    """The least sum of squared relative output errors."""
    return choose({layer: {name: -(error**2) for name, error in row.items()} for layer, row in problem.errors.items()}, problem.limits, USE)


def sensitivity_knapsack(problem: Problem) -> Choice:
    """The least sum of what each candidate alone, all else left as it was, adds to the loss on the images."""
    found = sensitivities(problem.model, problem.modules, problem.images, problem.labels, bf16=problem.bf16)
    return choose({layer: {name: -loss for name, loss in row.items()} for layer, row in found.items()}, problem.limits, USE)
