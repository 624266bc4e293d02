"""What was measured so far, entry by entry: the part of ``costs.json`` that measuring goes on with, and the table that it makes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from nni_haloc.costs.device.costs_file import UNITS, costs_content, read_costs
from nni_haloc.costs.device.spec import Specification
from nni_haloc.space.names import DENSE
from nni_haloc.utils.files import is_number

NETWORK = "network"
METRIC = "latency_ms"
_LEAST = 0.01
"""Share of the dense layer's cost below which no candidate's is put: differences of two measurements may be negative."""
_ALIKE = 1.25
"""How many times as long as on another worker the dense layers may take, for times of both in one table."""
_SAME = (
    "model",
    "input",
    "runtime",
    "device",
    "dtype",
    "memory_format",
    "threads",
    "memory",
    "where",
)
"""What must agree where measuring goes on in an existing file."""
STATE = ("version", "metric", "unit", "identity", "runs", NETWORK)
"""What a file of measurements has that are not yet a table."""


def unmeasured(spec: Specification, state: Mapping[str, Any]) -> list[int]:
    """The entries without a run."""
    runs = state.get("runs", {})
    return [
        index
        for index, (layer, candidate) in spec.homes().items()
        if not runs.get(layer, {}).get(candidate)
    ]


def finished(
    spec: Specification,
    state: Mapping[str, Any],
    predicted: Mapping[int, tuple[float, float]] | None = None,
) -> dict[str, Any]:
    """The table that the runs make: medians; ``fixed`` is the network's time less that of its dense layers, and not below zero.

    ``predicted``: milliseconds and relative error of entries without a run.
    """
    homes, where = spec.homes(), state["identity"]["where"]
    centre = {home: median(values) for home, values in _by_home(state["runs"])}
    wide = {home: spread(values) for home, values in _by_home(state["runs"])}
    for index, (value, error) in (predicted or {}).items():
        centre[homes[index]], wide[homes[index]] = value, error * value
    costs: dict[str, dict[str, float]] = {}
    spreads: dict[str, dict[str, float]] = {}
    for layer, row in spec.layers.items():
        dense = centre[homes[row[DENSE]]]
        costs[layer], spreads[layer] = {}, {}
        for candidate, index in row.items():
            value = centre[homes[index]]
            if where == "in-place" and candidate != DENSE:
                value = max(_LEAST * dense, dense + value)
            costs[layer][candidate] = value
            spreads[layer][candidate] = wide[homes[index]] / value
    fixed = max(0.0, median(state[NETWORK]) - sum(row[DENSE] for row in costs.values()))
    return costs_content(METRIC, state["identity"], fixed, costs, spreads)


def keep_measurements(path: str | Path) -> None:
    """ValueError if there are measurements in a file that is about to be written anew."""
    try:
        found = "runs" in json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return
    if found:
        raise ValueError(f"{path}: holds measurements, which would be lost; expected another --out")


def merge(spec: Specification, paths: Sequence[str | Path]) -> dict[str, Any]:
    """The content of one ``costs.json`` from the workers' files; ValueError where they differ or an entry is in none of them."""
    again = [
        path
        for path in paths
        if sum(Path(path).resolve() == Path(other).resolve() for other in paths) > 1
    ]
    if again:
        raise ValueError(f"{again[0]}: expected each worker's file once")
    first: dict[str, Any] = {}
    for path in paths:
        state = read_measurements(path, first.get("identity", subject(spec)))
        if state is None:
            raise ValueError(f"{path}: no such file")
        if not first:
            first = {key: state[key] for key in STATE}
            continue
        _same_speed(spec, first["runs"], state["runs"], f"{path}, {paths[0]}")
        first[NETWORK] += state[NETWORK]
        for layer, row in state["runs"].items():
            for candidate, values in row.items():
                first["runs"].setdefault(layer, {}).setdefault(candidate, []).extend(values)
    missing = unmeasured(spec, first)
    if missing:
        layer, candidate = spec.homes()[missing[0]]
        raise ValueError(
            f"layer {layer!r}, candidate {candidate!r}: measured in none of {', '.join(map(str, paths))}"
        )
    return first | finished(spec, first)


def _same_speed(
    spec: Specification, some: Mapping[str, Any], others: Mapping[str, Any], files: str
) -> None:
    """A warning if the dense layers, which every worker measures, say that two workers differ in speed, or that one was disturbed."""
    dense = [layer for layer, candidate in spec.homes().values() if candidate == DENSE]
    times = [[runs.get(layer, {}).get(DENSE) for layer in dense] for runs in (others, some)]
    ratio = median([median(a) / median(b) for a, b in zip(*times, strict=True) if a and b] or [1.0])
    if not 1 / _ALIKE <= ratio <= _ALIKE:
        warnings.warn(
            f"{files}: expected workers that are alike, found dense layers take {ratio:.2f} times as long on the first",
            stacklevel=3,
        )


def subject(spec: Specification) -> dict[str, Any]:
    """What is measured."""
    return {"model": spec.model, "input": list(spec.input), "geometry": spec.geometry()}


def read_measurements(
    path: str | Path | None, identity: Mapping[str, Any]
) -> dict[str, Any] | None:
    """An earlier state, if there is one; ValueError names the file and what differs from ``identity``."""
    if path is None or not Path(path).exists():
        return None
    content = read_costs(path)
    if "runs" not in content:
        raise ValueError(
            f"{path}: a table without the runs that it was made of cannot be gone on with; choose another file"
        )
    try:
        found = content["identity"]
        for key in _SAME:
            if key in identity and found.get(key) != identity[key]:
                raise ValueError(
                    f"measured for another {key}: {found.get(key)!r}, now {identity[key]!r}"
                )
        for layer, digest in found.get("geometry", {}).items():
            if identity["geometry"].get(layer, digest) != digest:
                raise ValueError(
                    f"measured for another network: its layer {layer!r} had another geometry"
                )
        if (content["metric"], content["unit"]) != (METRIC, UNITS[METRIC]):
            raise ValueError(
                f"expected {METRIC} in {UNITS[METRIC]}, found {content['metric']} in {content['unit']}"
            )
        signed = found.get("where") == "in-place"
        for (layer, candidate), values in [
            *_by_home(content["runs"]),
            ((NETWORK, ""), content[NETWORK]),
        ]:
            if not isinstance(values, list) or not all(
                is_number(v) and (v > 0 or signed) for v in values
            ):
                raise ValueError(
                    f"runs: layer {layer!r}, candidate {candidate!r}: expected times above 0, found {values!r}"
                )
    except KeyError as error:
        raise ValueError(f"{path}: {error.args[0]}: missing") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    return content


def _by_home(
    runs: Mapping[str, Mapping[str, list[float]]],
) -> list[tuple[tuple[str, str], list[float]]]:
    return [
        ((layer, candidate), values)
        for layer, row in runs.items()
        for candidate, values in row.items()
        if values
    ]


def spread(values: list[float]) -> float:
    """Interquartile range."""
    if len(values) < 2:
        return 0.0
    low, _, high = quantiles(values, n=4, method="inclusive")
    return high - low
