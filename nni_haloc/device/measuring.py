"""The loop that times every entry of a specification and keeps what it found in ``costs.json``, entry by entry."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Literal, Protocol

from .files import COSTS_VERSION, DENSE, UNITS, costs_content, is_number, read_costs, write_json
from .spec import Specification

Run = Callable[[], Any]
"""A forward pass, ready to be timed."""
Where = Literal["alone", "in-place"]
NETWORK = "network"
METRIC = "latency_ms"
_FEWEST = 5
"""Passes that are timed at least, however long each takes."""
_LEAST = 0.01
"""Share of the dense layer's cost below which no candidate's is put: differences of two measurements may be negative."""
_ALIKE = 1.25
"""How many times as long as on another worker the dense layers may take, for times of both in one table."""
_SAME = ("model", "input", "runtime", "device", "dtype", "memory_format", "threads", "memory", "where")
"""What must agree where measuring goes on in an existing file."""
_STATE = ("version", "metric", "unit", "identity", "runs", NETWORK)
"""What a file of measurements has that are not yet a table."""


class Runtime(Protocol):
    """Something that runs the entries of a specification and can be timed."""

    def identity(self) -> dict[str, Any]:
        """What its times hold for: device, versions, precision, layout, threads."""

    def entry(self, spec: Specification, index: int) -> Run:
        """A forward pass of an entry, on random inputs, warmed up."""

    def network(self, spec: Specification, choice: Mapping[str, str]) -> Run:
        """A forward pass of the whole network, the layers that ``choice`` names at their candidates; warmed up."""

    def once(self, run: Run) -> float:
        """Seconds of one pass."""

    def pinned(self) -> AbstractContextManager[None]:
        """A context in which the runtime's number of threads holds."""


@dataclass(frozen=True)
class Timing:
    """How to measure. ``where``: entries ``alone``, or ``in-place``, the network with the candidate swapped in against the network as it
    was, in alternation. Each of ``rounds`` passes over all entries times each of them for ``min_run_time`` seconds."""

    where: Where = "alone"
    rounds: int = 5
    min_run_time: float = 0.05

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.min_run_time < 0:
            raise ValueError(f"rounds, min_run_time: expected 1 or more, and no less than 0, found {self.rounds}, {self.min_run_time}")


Progress = Callable[[int, int], None]


def time_together(runs: Mapping[str, Run], runtime: Runtime, min_run_time: float) -> dict[str, float]:
    """Median seconds of each, passes in alternation, so that a disturbance falls on all of them."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + min_run_time * len(runs)
    while len(next(iter(times.values()))) < _FEWEST or time.perf_counter() < end:
        for name, run in runs.items():
            times[name].append(runtime.once(run))
    return {name: median(values) for name, values in times.items()}


def measure(
    spec: Specification,
    runtime: Runtime,
    out: str | Path | None = None,
    timing: Timing = Timing(),
    progress: Progress = lambda done, of: None,
    indices: Collection[int] | None = None,
) -> dict[str, Any]:
    """Measure what ``out`` does not have yet, and leave it there after each entry; returns the content of ``costs.json``.

    ``indices``: the entries to measure (None: all); the network is measured in any case. The table is in the content once no entry is
    missing, until then the runs alone. Raises ValueError where ``out`` holds measurements of something else.
    """
    identity = {**_subject(spec), **runtime.identity(), "where": timing.where}
    homes = spec.homes()
    mine = [index for index in homes if indices is None or index in indices]
    state = _read(out, identity) or {"version": COSTS_VERSION, "metric": METRIC, "unit": UNITS[METRIC], "identity": {}}
    before = state["identity"]
    kept_facts = {key: before[key] for key in ("date", "runs") if key in before}
    state["identity"] = identity | kept_facts | {"geometry": before.get("geometry", {}) | identity["geometry"]}
    if unmeasured(spec, state):  # else what is there stays a table while it is measured once more
        state = {key: state[key] for key in _STATE if key in state}
    runs: dict[str, dict[str, list[float]]] = state.setdefault("runs", {})
    whole: list[float] = state.setdefault(NETWORK, [])
    missing = [(r, i) for r in range(timing.rounds) for i in [*mine, None] if len(_kept(runs, whole, homes, i)) <= r]
    with runtime.pinned():
        for done, (_, index) in enumerate(missing):
            progress(done, len(missing))
            kept = _kept(runs, whole, homes, index)
            try:
                kept.append(1e3 * _time(spec, runtime, index, timing))
            except RuntimeError as error:  # the device is gone, out of memory, or cannot run this
                what = "the network" if index is None else "layer {!r}, candidate {!r}".format(*homes[index])
                reason = str(error).strip().split("\n")[0]
                raise ValueError(f"{what}: {reason}; what was measured until then {'is in ' + str(out) if out else 'is lost'}") from None
            state["identity"] |= {"date": time.strftime("%Y-%m-%d"), "runs": timing.rounds}
            if out is not None and done + 1 < len(missing):
                _write(out, state)
    progress(len(missing), len(missing))
    state |= {} if unmeasured(spec, state) else finished(spec, state)
    if out is not None:
        _write(out, state)
    return state


def _time(spec: Specification, runtime: Runtime, index: int | None, timing: Timing) -> float:
    """Seconds of an entry, of the network for None; in place, what one layer gains (negative) or loses against the dense one: all layers
    alike are swapped at once, and the difference is shared out among them."""
    layers = [] if index is None else spec.alike(index)
    dense = index is None or all(spec.layers[layer][DENSE] == index for layer in layers)
    if dense or timing.where == "alone":
        run = runtime.network(spec, {}) if index is None else runtime.entry(spec, index)
        return time_together({"": run}, runtime, timing.min_run_time)[""]
    choice = {layer: next(name for name, i in spec.layers[layer].items() if i == index) for layer in layers}
    seconds = time_together({"before": runtime.network(spec, {}), "after": runtime.network(spec, choice)}, runtime, timing.min_run_time)
    return (seconds["after"] - seconds["before"]) / len(layers)


def unmeasured(spec: Specification, state: Mapping[str, Any]) -> list[int]:
    """The entries without a run."""
    runs = state.get("runs", {})
    return [index for index, (layer, candidate) in spec.homes().items() if not runs.get(layer, {}).get(candidate)]


def finished(spec: Specification, state: Mapping[str, Any], predicted: Mapping[int, tuple[float, float]] | None = None) -> dict[str, Any]:
    """The table that the runs make: medians; ``fixed`` is the network's time less that of its dense layers, and not below zero.

    ``predicted``: milliseconds and relative error of entries without a run.
    """
    homes, where = spec.homes(), state["identity"]["where"]
    centre = {home: median(values) for home, values in _by_home(state["runs"])}
    wide = {home: _spread(values) for home, values in _by_home(state["runs"])}
    for index, (value, error) in (predicted or {}).items():
        centre[homes[index]], wide[homes[index]] = value, error * value
    costs: dict[str, dict[str, float]] = {}
    spread: dict[str, dict[str, float]] = {}
    for layer, row in spec.layers.items():
        dense = centre[homes[row[DENSE]]]
        costs[layer], spread[layer] = {}, {}
        for candidate, index in row.items():
            value = centre[homes[index]]
            if where == "in-place" and candidate != DENSE:
                value = max(_LEAST * dense, dense + value)
            costs[layer][candidate] = value
            spread[layer][candidate] = wide[homes[index]] / value
    fixed = max(0.0, median(state[NETWORK]) - sum(row[DENSE] for row in costs.values()))
    return costs_content(METRIC, state["identity"], fixed, costs, spread)


def merge(spec: Specification, paths: Sequence[str | Path]) -> dict[str, Any]:
    """The content of one ``costs.json`` from the workers' files; ValueError where they differ or an entry is in none of them."""
    first: dict[str, Any] = {}
    for path in paths:
        state = _read(path, first.get("identity", _subject(spec)))
        if state is None:
            raise ValueError(f"{path}: no such file")
        if not first:
            first = {key: state[key] for key in _STATE}
            continue
        _same_speed(spec, first["runs"], state["runs"], f"{path}, {paths[0]}")
        first[NETWORK] += state[NETWORK]
        for layer, row in state["runs"].items():
            for candidate, values in row.items():
                first["runs"].setdefault(layer, {}).setdefault(candidate, []).extend(values)
    missing = unmeasured(spec, first)
    if missing:
        layer, candidate = spec.homes()[missing[0]]
        raise ValueError(f"layer {layer!r}, candidate {candidate!r}: measured in none of {', '.join(map(str, paths))}")
    return first | finished(spec, first)


def _same_speed(spec: Specification, some: Mapping[str, Any], others: Mapping[str, Any], files: str) -> None:
    """ValueError if the dense layers, which every worker measures, say that two workers differ in speed."""
    dense = [layer for layer, candidate in spec.homes().values() if candidate == DENSE]
    times = [[runs.get(layer, {}).get(DENSE) for layer in dense] for runs in (others, some)]
    ratio = median([median(a) / median(b) for a, b in zip(*times, strict=True) if a and b] or [1.0])
    if not 1 / _ALIKE <= ratio <= _ALIKE:
        raise ValueError(f"{files}: expected workers that are alike, found that dense layers take {ratio:.2f} times as long on the first")


def _subject(spec: Specification) -> dict[str, Any]:
    """What is measured."""
    return {"model": spec.model, "input": list(spec.input), "geometry": spec.geometry()}


def _read(path: str | Path | None, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """An earlier state, if there is one; ValueError names the file and what differs from ``identity``."""
    if path is None or not Path(path).exists():
        return None
    content = read_costs(path)
    if "runs" not in content:
        raise ValueError(f"{path}: a table without the runs that it was made of cannot be gone on with; choose another file")
    try:
        found = content["identity"]
        for key in _SAME:
            if key in identity and found.get(key) != identity[key]:
                raise ValueError(f"measured for another {key}: {found.get(key)!r}, now {identity[key]!r}")
        for layer, digest in found.get("geometry", {}).items():
            if identity["geometry"].get(layer, digest) != digest:
                raise ValueError(f"measured for another network: its layer {layer!r} had another geometry")
        if (content["metric"], content["unit"]) != (METRIC, UNITS[METRIC]):
            raise ValueError(f"expected {METRIC} in {UNITS[METRIC]}, found {content['metric']} in {content['unit']}")
        signed = found.get("where") == "in-place"
        for (layer, candidate), values in [*_by_home(content["runs"]), ((NETWORK, ""), content[NETWORK])]:
            if not isinstance(values, list) or not all(is_number(v) and (v > 0 or signed) for v in values):
                raise ValueError(f"runs: layer {layer!r}, candidate {candidate!r}: expected times above 0, found {values!r}")
    except KeyError as error:
        raise ValueError(f"{path}: {error.args[0]}: missing") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    return content


def _write(path: str | Path, state: Mapping[str, Any]) -> None:
    write_json(path, state)


def _kept(runs: dict[str, dict[str, list[float]]], whole: list[float], homes: Mapping[int, tuple[str, str]], index: int | None) -> list:
    """The measurements of an entry, of the network for None."""
    return whole if index is None else runs.setdefault(homes[index][0], {}).setdefault(homes[index][1], [])


def _by_home(runs: Mapping[str, Mapping[str, list[float]]]) -> list[tuple[tuple[str, str], list[float]]]:
    return [((layer, candidate), values) for layer, row in runs.items() for candidate, values in row.items() if values]


def _spread(values: list[float]) -> float:
    """Interquartile range."""
    if len(values) < 2:
        return 0.0
    low, _, high = quantiles(values, n=4, method="inclusive")
    return high - low
