"""Design principle 1: find the ranks that a device rewards, from its cost table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from scipy.special import fdtrc

from nni_haloc.costs.table import CostTable
from nni_haloc.space.names import DENSE, parse_rank

_CONVINCING = 0.5
"""Share of what a smooth curve leaves unexplained that stairs must explain."""
_UNLIKELY = 0.01
"""Probability at which noise on a smooth curve may pass for stairs.

By an F-test, over all the widths that are tried.
"""
_ROUNDING = 1e-12
"""Share of a cost's square that is taken for rounding."""
_FEWEST = 8
"""Ranks that a layer must have for its stairs to be seen."""


class Stairs(NamedTuple):
    """Steps in the cost of a layer.

    Attributes:
        width: the cost rises where the rank passes a multiple of it; 1 if there are no stairs.
        rise: how much more a rank just above a multiple costs, as a share of the dense layer's
            cost; 0 if there are no stairs.
        explained: the share that stairs explain of what a smooth curve leaves unexplained; 0 if
            there are no stairs.
    """

    width: int
    rise: float
    explained: float


def rank_stairs(costs: CostTable) -> dict[str, Stairs]:
    """Find the stairs of each layer that has eight equal ranks (``r16``) or more in the table.

    The curves ``a + b r + c r^2 + d ceil(r / width)`` are fitted by least squares, and the best is
    compared with the curve without the last term.
    """
    stairs = {}
    for layer, row in costs.costs.items():
        points = {
            int(name[1:]): cost
            for name, cost in row.items()
            if name != DENSE and "x" not in name and parse_rank(name, "conv")
        }
        if len(points) >= _FEWEST:
            stairs[layer] = _stairs(points, row[DENSE])
    return stairs


def _stairs(points: Mapping[int, float], dense: float) -> Stairs:
    ranks = np.array(sorted(points))
    cost = np.array([points[int(r)] for r in ranks])
    smooth = np.stack([np.ones(len(ranks)), ranks, ranks**2], 1)
    left, _ = _left(smooth, cost)
    best = Stairs(1, 0.0, 0.0)
    apart = int(np.diff(ranks).min())
    widths = range(2 * apart, 2 * int(ranks[-1]) // 3 + 1)
    free = len(ranks) - 4
    for width in widths:
        step = np.ceil(ranks / width)
        if len(set(step)) < 2 or left <= _ROUNDING * float(np.sum(cost**2)):
            continue
        after, slopes = _left(np.column_stack([smooth, step]), cost)
        explained = 1 - after / left
        improvement = free * (left - after) / after if after > 0 else np.inf
        chance = fdtrc(1, free, improvement) * len(widths)  # of an F-test
        if slopes[-1] > 0 and explained > max(best.explained, _CONVINCING) and chance < _UNLIKELY:
            best = Stairs(width, float(slopes[-1]) / dense, float(explained))
    return best


def _left(columns: np.ndarray, target: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the sum of squares that least squares leaves, and the coefficients."""
    slopes, *_ = np.linalg.lstsq(columns, target, rcond=None)
    return float(np.sum((target - columns @ slopes) ** 2)), slopes
