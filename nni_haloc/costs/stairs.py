"""Design principle 1: which ranks a device rewards, read off a cost table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from scipy import stats

from nni_haloc.costs.table import CostTable
from nni_haloc.space.names import DENSE, parse_rank

_CONVINCING = 0.5
"""Share of what a smooth curve leaves unexplained that stairs must explain."""
_UNLIKELY = 0.01
"""Probability at which noise on a smooth curve may pass for stairs (F-test, over all the widths that are tried)."""
_ROUNDING = 1e-12
"""Share of a cost's square that is rounding, not stairs."""
_FEWEST = 8
"""Ranks that a layer must have for its stairs to be seen."""


class Stairs(NamedTuple):
    """Cost rises where the rank passes a multiple of ``width``: a rank just above one costs ``rise`` more, of the dense layer's cost.

    ``explained``: share of what a smooth curve leaves unexplained. Where no stairs are seen ``width`` is 1 and the others are 0.
    """

    width: int
    rise: float
    explained: float


def rank_stairs(costs: CostTable) -> dict[str, Stairs]:
    """The stairs of each layer that has eight equal ranks (``r16``) or more in the table.

    Of the curves ``a + b r + c r^2 + d ceil(r / width)``, the best by least squares, against the one without the last term.
    """
    found = {}
    for layer, row in costs.costs.items():
        points = {
            int(name[1:]): cost
            for name, cost in row.items()
            if name != DENSE and "x" not in name and parse_rank(name, "conv")
        }
        if len(points) >= _FEWEST:
            found[layer] = _stairs(points, row[DENSE])
    return found


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
        chance = (
            stats.f.sf(free * (left - after) / after, 1, free) * len(widths) if after > 0 else 0.0
        )
        if slopes[-1] > 0 and explained > max(best.explained, _CONVINCING) and chance < _UNLIKELY:
            best = Stairs(width, float(slopes[-1]) / dense, float(explained))
    return best


def _left(columns: np.ndarray, target: np.ndarray) -> tuple[float, np.ndarray]:
    """Sum of squares that least squares leaves, and the coefficients."""
    slopes, *_ = np.linalg.lstsq(columns, target, rcond=None)
    return float(np.sum((target - columns @ slopes) ** 2)), slopes
