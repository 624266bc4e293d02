"""The form of ``costs.json``, and the units of the metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nni_haloc.inputs.registries import PREDICTORS
from nni_haloc.space.names import DENSE
from nni_haloc.utils.files import read_json
from nni_haloc.utils.printing import short

COSTS_VERSION = 1
MOST_BYTES = 256 << 20
"""Bytes that a cost table may have: some million costs, each with the times it is the median of."""
LARGEST = 1e18
"""The largest cost that a table may have, in any unit; its inverse is the smallest."""
UNITS = {
    "macs": "multiply-accumulates",
    "params": "parameters",
    "activation_bytes": "bytes",
    "latency_ms": "milliseconds",
    "cycles": "cycles",
    "energy_pj": "picojoules",
    "energy_mj": "millijoules",
}
"""This package's metrics and their units in ``costs.json``."""
MEASURED = {"latency_ms": "ms", "energy_mj": "mJ"}
"""The metrics that are measured on a device, and their units' symbols."""

_SYMBOLS = {
    "macs": "MACs",
    "params": "parameters",
    "activation_bytes": "B",
    "energy_pj": "pJ",
    **MEASURED,
}


def amount(cost: float, metric: str, digits: int = 3) -> str:
    """Write a cost as people do: ``1.45 ms``, ``27.6 k MACs``."""
    symbol = _SYMBOLS.get(metric) or unit_of(metric)
    if metric in MEASURED:
        return f"{float(f'{cost:.{digits}g}'):.{max(digits, 15)}g} {symbol}"
    return f"{short(cost, digits=digits)} {symbol}"


def unit_of(metric: Any) -> str:
    """Return the unit of a metric of this package, or of another package's predictor.

    Raises:
        ValueError: if no predictor gives that metric.
    """
    if isinstance(metric, str) and metric in UNITS:
        return UNITS[metric]
    foreign = PREDICTORS.foreign()
    if metric in foreign and PREDICTORS[metric].metric == metric:
        return PREDICTORS[metric].unit
    raise ValueError(f"metric: expected one of {', '.join([*UNITS, *foreign])}, found {metric!r}")


def costs_content(
    metric: str,
    identity: Mapping[str, Any],
    fixed: float,
    costs: Mapping[str, Mapping[str, float]],
    spread: Mapping[str, Mapping[str, float]],
    quality: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Return the content of ``costs.json`` for a finished table; see `CostTable`."""
    return {
        "version": COSTS_VERSION,
        "metric": metric,
        "unit": unit_of(metric),
        "identity": dict(identity),
        "fixed": fixed,
        "original": math.fsum([fixed, *(row[DENSE] for row in costs.values())]),
        "costs": {layer: dict(row) for layer, row in costs.items()},
        **({"spread": {layer: dict(row) for layer, row in spread.items()}} if spread else {}),
        **({"quality": dict(quality)} if quality else {}),
    }


def read_costs(path: str | Path) -> dict[str, Any]:
    """Read a ``costs.json`` of this version.

    Raises:
        ValueError: if it is damaged, or has another unit than its metric; the message names it.
    """
    content = read_json(path, "cost table", COSTS_VERSION, most=MOST_BYTES)
    try:
        unit = unit_of(content.get("metric"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if content.get("unit", unit) != unit:
        raise ValueError(
            f"{path}: unit: expected {unit!r} for {content['metric']}, found {content['unit']!r}"
        )
    return content
