"""Eq. 5: the hard budget. One candidate a layer, the highest total score at a cost that never exceeds the budget."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

_ROOM = 1e4
"""The budget's room in the solver's terms: its tolerance is an absolute 1e-6, so 1e-10 of the room."""

Table = Mapping[str, Mapping[str, float]]


class InfeasibleBudget(ValueError):
    """The budget is below the cheapest network of the rank space; the message names that cost."""


def total(choice: Mapping[str, str], costs: Table, fixed: float) -> float:
    """Exact cost of a choice (layer to candidate): correctly rounded sum, whatever the order."""
    return math.fsum([fixed, *(costs[layer][candidate] for layer, candidate in choice.items())])


def cheapest(costs: Table, fixed: float) -> float:
    """Cost of the cheapest network of the space."""
    return math.fsum([fixed, *(min(row.values()) for row in costs.values())])


def check_feasible(costs: Table, fixed: float, budget: float, unit: str = "") -> None:
    """Raise `InfeasibleBudget` where no choice fits."""
    least = cheapest(costs, fixed)
    if not budget >= least:
        raise InfeasibleBudget(f"budget: {budget:.6g} {unit}".rstrip() + f" is below the cheapest network, {least:.6g} {unit}".rstrip())


def choose(scores: Table, costs: Table, fixed: float, budget: float, unit: str = "") -> dict[str, str]:
    """Eq. (5): the choice (layer to candidate) of highest total score with ``total(choice) <= budget``: a multiple-choice knapsack.

    ``scores`` and ``costs`` map layer to candidate to number; scores must be finite. Solved exactly by HiGHS; because its constraints hold
    only to a tolerance, the cost is recomputed and the problem tightened until it fits. Raises `InfeasibleBudget`.
    """
    check_feasible(costs, fixed, budget, unit)
    least = {layer: min(row, key=row.__getitem__) for layer, row in costs.items()}
    # A candidate too dear even beside the cheapest of everything else is out, however little: what is left is small against the room.
    flat = [(layer, c) for layer, row in costs.items() for c in row if total({**least, layer: c}, costs, fixed) <= budget]
    score = np.array([scores[layer][candidate] for layer, candidate in flat], dtype=float)
    if not np.isfinite(score).all():
        layer, candidate = flat[int(np.argmin(np.isfinite(score)))]
        raise ValueError(f"score of layer {layer!r}, candidate {candidate!r}: expected a finite number, found {scores[layer][candidate]}")
    if not flat:
        return {}
    spread = float(np.ptp(score)) or 1.0
    excess = np.array([costs[layer][candidate] - costs[layer][least[layer]] for layer, candidate in flat])
    scale = (budget - total(least, costs, fixed) or 1.0) / _ROOM
    index = {layer: i for i, layer in enumerate(costs)}
    one_each = np.zeros((len(index), len(flat)))
    one_each[[index[layer] for layer, _ in flat], range(len(flat))] = 1

    room = _ROOM
    while True:
        result = milp(
            -(score - score.min()) / spread,
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(excess[None] / scale, -np.inf, room)],
            integrality=np.ones(len(flat)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0},
        )
        if result.x is None:  # only the solver's tolerance stood between the cheapest network and the tightened room
            return least
        choice = {flat[i][0]: flat[i][1] for i in np.flatnonzero(result.x > 0.5)}
        over = total(choice, costs, fixed) - budget
        if over <= 0:
            return choice
        room -= max(over / scale, 1e-9 * _ROOM)
