"""Rules that give every candidate a score and take the best total within the limits."""

from __future__ import annotations

import numpy as np

from nni_haloc.plan.budget import Choice, Scores, choose, choose_least
from nni_haloc.plan.evidence import check_enough_images
from nni_haloc.plan.rules.problem import Problem, sees_every_rank, sees_pairs

USE = 0.95
"""Fraction of what a budget leaves above the cheapest network that a choice uses, if any does."""


@sees_every_rank
def error_knapsack(problem: Problem) -> Choice:
    """Choose the least sum of squared relative output errors: rule ``error-knapsack``."""
    return choose_least(squared_errors(problem), problem.limits, USE)


def squared_errors(problem: Problem) -> Scores:
    """Return the squared relative output error of each candidate, by layer."""
    return {
        layer: {name: error**2 for name, error in row.items()}
        for layer, row in problem.errors.items()
    }


def least_movement(problem: Problem) -> Choice:
    """Choose the least sum of sensitivities, without looking whether the images are enough."""
    return choose_least(problem.evidence.added, problem.limits, USE)


@sees_every_rank
@sees_pairs
def sensitivity_knapsack(problem: Problem) -> Choice:
    """Choose the least sum of sensitivities: rule ``sensitivity-knapsack``.

    A candidate's sensitivity is how far it alone, all else left as it was, moves the network's
    outputs, on images that it was not fitted to (see `nni_haloc.plan.evidence`).
    """
    choice = least_movement(problem)
    check_enough_images(
        problem.evidence, problem.model, problem.candidates, choice, problem.build, problem.images
    )
    return choice


DRAWS = 16
"""How many plans are drawn."""


def random(problem: Problem) -> Choice:
    """Choose the best of `DRAWS` random plans: rule ``random``.

    The best is that of the lowest loss on the images, its network not trained. A plan is what the
    knapsack makes of scores drawn evenly from 0 to 1, so that each is within the limits and uses
    its budget.
    """
    generator = np.random.default_rng(problem.seed)
    plans = []
    for _ in range(DRAWS):
        scores = {
            layer: dict(zip(row, generator.random(len(row)).tolist(), strict=True))
            for layer, row in problem.candidates.items()
        }
        plans.append(choose(scores, problem.limits, USE))
    return min(plans, key=lambda plan: problem.loss(problem.network(plan)))
