"""The measured values in ``costs.json``: read, joined, and made into a cost table."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from nni_haloc.costs.device.costs_file import (
    LARGEST,
    MEASURED,
    MOST_BYTES,
    costs_content,
    read_costs,
    unit_of,
)
from nni_haloc.costs.device.quality import quality_of, spread
from nni_haloc.costs.device.spec import Specification
from nni_haloc.space.names import DENSE
from nni_haloc.utils.errors import brief
from nni_haloc.utils.files import is_number, read_json

NETWORK = "network"
_LEAST = 0.01
"""The least cost of a candidate, in shares of the dense layer's: a difference may be negative."""
_ALIKE = 1.25
"""Largest ratio of two workers' times of the dense layers for which no warning is given."""
_SAME = (
    "model",
    "input",
    "runtime",
    "device",
    "dtype",
    "memory_format",
    "threads",
    "memory",
    "graph",
    "tf32",
    "where",
)
"""Facts that must agree for measuring to go on in an existing file, or must be in neither."""
STATE = ("version", "metric", "unit", "identity", "runs", NETWORK)
"""Keys of a file of measurements that is not yet a table."""


def unmeasured(spec: Specification, state: Mapping[str, Any]) -> list[int]:
    """Return the entries that have no measured value."""
    runs = state.get("runs", {})
    return [
        index
        for index, (layer, candidate) in spec.first_users().items()
        if not runs.get(layer, {}).get(candidate)
    ]


def finished(
    spec: Specification,
    state: Mapping[str, Any],
    predicted: Mapping[int, tuple[float, float]] | None = None,
) -> dict[str, Any]:
    """Make the cost table of the medians of all measured values.

    ``fixed`` is the network's value minus that of its dense layers, and not below zero.

    Args:
        spec: what was measured.
        state: the content of a file of measurements.
        predicted: cost and relative error of entries that were not measured.

    Returns:
        The content of a finished ``costs.json``, without the values themselves. The spread of what
        was measured once is unknown, and left out.
    """
    users, where = spec.first_users(), state["identity"]["where"]
    centre = {pair: median(values) for pair, values in _measured_pairs(state["runs"])}
    wide = {
        pair: spread(values)
        for pair, values in _measured_pairs(state["runs"])
        if len(values) > 1  # of one value it is unknown
    }
    for index, (value, error) in (predicted or {}).items():
        centre[users[index]], wide[users[index]] = value, error * value
    costs: dict[str, dict[str, float]] = {}
    spreads: dict[str, dict[str, float]] = {}
    for layer, row in spec.layers.items():
        dense = centre[users[row[DENSE]]]
        costs[layer], spreads[layer] = {}, {}
        for candidate, index in row.items():
            value = centre[users[index]]
            if where == "in-place" and candidate != DENSE:
                value = max(_LEAST * dense, dense + value)
            costs[layer][candidate] = value
            if users[index] in wide:
                spreads[layer][candidate] = wide[users[index]] / value
    spreads = {layer: row for layer, row in spreads.items() if row}
    fixed = max(0.0, median(state[NETWORK]) - sum(row[DENSE] for row in costs.values()))
    content = costs_content(state["metric"], state["identity"], fixed, costs, spreads)
    thrown = state["identity"].get("thrown_away")
    quality = {**quality_of({**state, **content}), **({"thrown_away": thrown} if thrown else {})}
    return {**content, "quality": quality}


def refuse_to_overwrite(path: str | Path) -> None:
    """Refuse to overwrite a file of measurements.

    Raises:
        ValueError: if the file holds any.
    """
    try:
        has_times = "runs" in read_json(path, most=MOST_BYTES)
    except (OSError, ValueError):
        return
    if has_times:
        raise ValueError(f"{path}: already holds measurements; choose another --out")


def merge(spec: Specification, paths: Sequence[str | Path]) -> dict[str, Any]:
    """Join the files of several workers into the content of one ``costs.json``.

    Raises:
        ValueError: if the workers measured different things, or an entry is in none of the files.
    """
    again = [
        path
        for path in paths
        if sum(Path(path).resolve() == Path(other).resolve() for other in paths) > 1
    ]
    if again:
        raise ValueError(f"{again[0]}: the same file is given twice")
    first: dict[str, Any] = {}
    for path in paths:
        state = read_measurements(path, first.get("identity", subject(spec)), first.get("metric"))
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
        layer, candidate = spec.first_users()[missing[0]]
        files = ", ".join(map(str, paths))
        raise ValueError(f"layer {layer!r}, candidate {candidate!r}: measured in none of {files}")
    return first | finished(spec, first)


def _same_speed(
    spec: Specification, some: Mapping[str, Any], others: Mapping[str, Any], files: str
) -> None:
    """Warn if the dense layers, which all workers measure, took longer on one of the two."""
    dense = [layer for layer, candidate in spec.first_users().values() if candidate == DENSE]
    times = [[runs.get(layer, {}).get(DENSE) for layer in dense] for runs in (others, some)]
    ratio = median([median(a) / median(b) for a, b in zip(*times, strict=True) if a and b] or [1.0])
    if not 1 / _ALIKE <= ratio <= _ALIKE:
        warnings.warn(
            f"{files}: expected workers that are alike, "
            f"found dense layers take {ratio:.2f} times as long on the first",
            stacklevel=3,
        )


def subject(spec: Specification) -> dict[str, Any]:
    """Return the part of a table's identity that says what is measured."""
    return {"model": spec.model, "input": list(spec.input), "geometry": spec.geometry()}


def read_measurements(
    path: str | Path | None, identity: Mapping[str, Any], metric: str | None = None
) -> dict[str, Any] | None:
    """Read the measurements of an earlier start.

    Args:
        path: ``costs.json``; it need not exist.
        identity: what is to be measured now, and with what.
        metric: what the file must be of (None: any metric that is measured).

    Returns:
        The content of the file, None if there is none.

    Raises:
        ValueError: if the file is damaged, or was measured for something else; the message names
            the file and what differs.
    """
    if path is None or not Path(path).exists():
        return None
    content = read_costs(path)
    if "runs" not in content:
        raise ValueError(
            f"{path}: has no single measurements, so measuring cannot continue in it; "
            "choose another --out"
        )
    try:
        _check_same(content["identity"], identity)
        found = content["metric"] if content["metric"] in MEASURED else "latency_ms"
        expected = metric or found
        if (content["metric"], content["unit"]) != (expected, unit_of(expected)):
            raise ValueError(
                f"expected {expected} in {unit_of(expected)}, "
                f"found {content['metric']} in {content['unit']}"
            )
        _check_values(content)
    except KeyError as error:
        raise ValueError(f"{path}: {error.args[0]}: missing") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    return content


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ValueError if the file was measured for another network or with other options."""
    for key in _SAME if "runtime" in now else ("model", "input"):
        if before.get(key) != now.get(key):
            raise ValueError(
                f"measured for another {key}: {before.get(key)!r}, now {now.get(key)!r}; "
                "choose another --out, or remove the file"
            )
    for layer, digest in before.get("geometry", {}).items():
        if now["geometry"].get(layer, digest) != digest:
            raise ValueError(
                f"measured for another network: its layer {layer!r} had another geometry; "
                "choose another --out, or remove the file"
            )


def _check_values(content: Mapping[str, Any]) -> None:
    """Raise ValueError for an invalid value; in place, candidates' values are differences."""
    signed = content["identity"].get("where") == "in-place"
    for (layer, candidate), values in [
        *_measured_pairs(content["runs"]),
        ((NETWORK, ""), content[NETWORK]),
    ]:
        if not isinstance(values, list) or not all(
            is_number(v) and (v > 0 or signed) and abs(v) <= LARGEST for v in values
        ):
            raise ValueError(
                f"runs: layer {layer!r}, candidate {candidate!r}: "
                f"expected numbers above 0, found {brief(values)}"
            )


def _measured_pairs(
    runs: Mapping[str, Mapping[str, list[float]]],
) -> list[tuple[tuple[str, str], list[float]]]:
    """List the (layer, candidate) pairs that have measured values, with those values."""
    return [
        ((layer, candidate), values)
        for layer, row in runs.items()
        for candidate, values in row.items()
        if values
    ]
