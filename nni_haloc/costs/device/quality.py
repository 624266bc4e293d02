"""How far a measured cost table can be trusted: figures, and what they make doubtful."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from statistics import fmean, median, quantiles
from typing import Any

from nni_haloc.costs.device.costs_file import MEASURED
from nni_haloc.space.names import DENSE, parse_rank

Quality = dict[str, float]
"""Figures of a measured table; one that is unknown is missing.

``rounds``: values of the entry that has fewest. ``spread``: median over the entries of how far
their values lie apart (interquartile range over median). ``standard_error``: of the cost of a whole
network that is summed up from the table, relative to the original's. ``fixed_share``: ``fixed``
over the original's cost. ``layers_over_network``: the sum of the dense layers over the network's
own cost. ``unordered``: share of neighbouring ranks of which the larger one is cheaper, by more
than the values lie apart. ``thrown_away``: rounds that were measured again because other programs
used the processor.
"""
ENOUGH = 0.02
"""The standard error of a whole network at which no more rounds are needed."""
_USELESS = 0.2
"""The standard error from which on a table is refused."""
_MOSTLY_FIXED = 0.6
_OVER = 1.1
"""Largest ratio of the layers' sum to the network's cost for which no warning is given."""
_FEW = 0.1
"""Largest share of unordered neighbours for which no warning is given: stairs are real."""
_CHEAPER = 0.05
"""Differences below this share of a cost are no disorder."""
_REMEDY = "measure the table again on an idle machine (start again, or haloc measure --rounds {})"
_FEW_ROUNDS = 10


def spread(values: Sequence[float]) -> float:
    """Return the interquartile range; 0 for a single value, of which it is unknown."""
    if len(values) < 2:
        return 0.0
    low, _, high = quantiles(values, n=4, method="inclusive")
    return high - low


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the median of some values, as of a normal distribution.

    It is infinite for a single value.
    """
    if len(values) < 2:
        return math.inf
    return math.sqrt(math.pi / 2) * spread(values) / 1.349 / math.sqrt(len(values))


def quality_of(content: Mapping[str, Any]) -> Quality:
    """Return the figures of a finished table, as far as the content of its file tells them.

    Args:
        content: of ``costs.json``; without the single values, as in a file that a run has written,
            the figures that need them are missing.
    """
    costs, runs = content["costs"], content.get("runs", {})
    found: Quality = {}
    original = math.fsum([content["fixed"], *(row[DENSE] for row in costs.values())])
    found["fixed_share"] = content["fixed"] / original
    spreads = [value for row in content.get("spread", {}).values() for value in row.values()]
    if spreads:
        found["spread"] = median(spreads)
    values = [values for row in runs.values() for values in row.values()]
    if values and content.get("network"):
        found["rounds"] = min(map(len, values))
        network = median(content["network"])
        dense = math.fsum(row[DENSE] for row in costs.values())
        if network > 0:  # a difference of energies may not be
            found["layers_over_network"] = dense / network
        error = _error_of_a_sum(content) / original
        if math.isfinite(error):
            found["standard_error"] = error
    pairs = list(_neighbours(costs, content.get("spread", {})))
    if pairs:
        found["unordered"] = fmean(pairs)
    return found


def doubts_about(
    metric: str, costs: Mapping[str, Mapping[str, float]], fixed: float, quality: Quality
) -> list[str]:
    """Say what makes a measured table doubtful, each with its numbers and the remedy.

    Args:
        metric: what the table is of.
        costs: layer to candidate to cost.
        fixed: the cost of everything else.
        quality: the table's figures.
    """
    unit = MEASURED.get(metric, metric)
    layers = math.fsum(row[DENSE] for row in costs.values())
    whole = fixed + layers
    found = []
    remedy = _REMEDY.format(max(_FEW_ROUNDS, 2 * round(quality.get("rounds", 0))))
    error = quality.get("standard_error", 0.0)
    if error > ENOUGH:
        rounds = f"after {quality['rounds']:.0f} rounds " if "rounds" in quality else ""
        found.append(
            f"{rounds}the standard error of a whole network is {100 * error:.1f} % of {whole:.4g} "
            f"{unit}, expected below {100 * ENOUGH:g} %: {remedy}"
        )
    if quality.get("fixed_share", 0.0) > _MOSTLY_FIXED:
        found.append(
            f"the searched layers take {layers:.4g} of the network's {whole:.4g} {unit}, and "
            f"{fixed:.4g} {unit} are fixed, so that no budget below "
            f"{quality['fixed_share']:.2f} of the original can be met: if the machine was busy, "
            f"{remedy}; else search more layers (rank_space.kinds)"
        )
    over = quality.get("layers_over_network", 0.0)
    if over > _OVER * (1 + 2 * error):
        found.append(
            f"the layers alone take {layers:.4g} {unit}, {over:.2f} times the whole network: "
            f"{remedy}, or --where in-place, if the runtime fuses layers"
        )
    unordered = quality.get("unordered", 0.0)
    if unordered > _FEW:
        found.append(
            f"of neighbouring ranks, {100 * unordered:.0f} % cost less at the larger one, by more "
            f"than single times lie apart: {remedy}; if it stays, the device has stairs "
            "(haloc steps)"
        )
    return found


def is_useless(quality: Quality) -> bool:
    """Tell whether a table says next to nothing of a network's cost."""
    return quality.get("standard_error", 0.0) > _USELESS


def _error_of_a_sum(content: Mapping[str, Any]) -> float:
    """Return the standard error of a network's cost, in the table's unit.

    Such a network has a candidate in the place of each dense layer: its cost is the original's,
    minus each dense layer's, plus each candidate's. Layers of one shape share their values, and so
    their error.
    """
    geometry = content["identity"].get("geometry", {})
    sharing: dict[str, list[str]] = {}
    for layer in content["costs"]:
        sharing.setdefault(geometry.get(layer, layer), []).append(layer)
    squares = [_square(standard_error(content["network"]))]
    runs = content["runs"]
    for layers in sharing.values():
        row = {name: v for layer in layers for name, v in runs.get(layer, {}).items() if v}
        errors = {name: _square(standard_error(values)) for name, values in row.items()}
        dense = errors.pop(DENSE, 0.0)
        squares.append(len(layers) ** 2 * (dense + fmean(errors.values() or [0.0])))
    return math.sqrt(math.fsum(squares))


def _square(x: float) -> float:
    """Return x², infinite where it is out of range."""
    return x * x


def _neighbours(
    costs: Mapping[str, Mapping[str, float]], spreads: Mapping[str, Mapping[str, float]]
) -> Iterator[bool]:
    """Yield for each pair of neighbouring ranks whether the larger one is clearly cheaper."""
    for layer, row in costs.items():
        apart = spreads.get(layer, {})
        ranks = {}
        for name in row:
            try:
                rank = parse_rank(name, "conv")
            except ValueError:  # another package's candidates
                continue
            if rank is not None:
                ranks[name] = rank
        for small, large in pairwise(sorted(ranks, key=ranks.__getitem__)):
            if all(a <= b for a, b in zip(ranks[small], ranks[large], strict=True)):
                noise = max(
                    apart.get(small, 0.0) * row[small] + apart.get(large, 0.0) * row[large],
                    _CHEAPER * row[small],
                )
                yield row[small] - row[large] > noise
