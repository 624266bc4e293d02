"""The two files of a device: ``costs.json``'s form, and how files are written and read here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nni_haloc.space.names import DENSE
from nni_haloc.utils.files import read_json

COSTS_VERSION = 1
UNITS = {
    "macs": "multiply-accumulates",
    "params": "parameters",
    "activation_bytes": "bytes",
    "latency_ms": "milliseconds",
    "cycles": "cycles",
    "energy_pj": "picojoules",
}
"""What can be counted, measured or modelled, and its unit in ``costs.json``."""


def costs_content(
    metric: str,
    identity: Mapping[str, Any],
    fixed: float,
    costs: Mapping[str, Mapping[str, float]],
    spread: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    """What ``costs.json`` says of a finished table."""
    return {
        "version": COSTS_VERSION,
        "metric": metric,
        "unit": UNITS[metric],
        "identity": dict(identity),
        "fixed": fixed,
        "original": math.fsum([fixed, *(row[DENSE] for row in costs.values())]),
        "costs": {layer: dict(row) for layer, row in costs.items()},
        **({"spread": {layer: dict(row) for layer, row in spread.items()}} if spread else {}),
    }


def read_costs(path: str | Path) -> dict[str, Any]:
    """The keys and values of a ``costs.json`` of this version, in the unit that its metric has; ValueError names the file."""
    content = read_json(path, "cost table", COSTS_VERSION)
    metric = content.get("metric")
    if not isinstance(metric, str) or metric not in UNITS:
        raise ValueError(f"{path}: metric: expected one of {', '.join(UNITS)}, found {metric!r}")
    if content.get("unit", UNITS[metric]) != UNITS[metric]:
        raise ValueError(
            f"{path}: unit: expected {UNITS[metric]!r} for {metric}, found {content['unit']!r}"
        )
    return content
