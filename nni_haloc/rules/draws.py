"""Rule `random`: the best of a few plans drawn at random."""

from __future__ import annotations

import numpy as np

from ..budget import Choice, choose
from .knapsacks import USE
from .problem import Problem

DRAWS = 16
"""Plans that are drawn."""


def random(problem: Problem) -> Choice:
    """Of `DRAWS` random plans the one of the lowest loss on the images, its network not trained.

    A plan is what the knapsack makes of scores drawn evenly from 0 to 1, so that each is within the limits and uses its budget.
    """
    generator = np.random.default_rng(problem.seed)
    plans = []
    for _ in range(DRAWS):
        scores = {layer: dict(zip(row, generator.random(len(row)).tolist(), strict=True)) for layer, row in problem.candidates.items()}
        plans.append(choose(scores, problem.limits, USE))
    return min(plans, key=lambda plan: problem.loss(problem.network(plan)))
