"""The loop that times every entry of a specification and keeps what it found in ``costs.json``, entry by entry."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal, Protocol

from nni_haloc.costs.device.costs_file import COSTS_VERSION, UNITS
from nni_haloc.costs.device.measurements import (
    METRIC,
    NETWORK,
    STATE,
    finished,
    read_measurements,
    subject,
    unmeasured,
)
from nni_haloc.costs.device.spec import Specification
from nni_haloc.space.names import DENSE
from nni_haloc.utils.errors import first_line
from nni_haloc.utils.files import write_json
from nni_haloc.utils.progress import Progress

Run = Callable[[], Any]
"""A forward pass, ready to be timed."""
Where = Literal["alone", "in-place"]
_FEWEST = 5
"""Passes that are timed at least, however long each takes."""
_VISITS = 8
"""How often a round comes back to the network: its time makes ``fixed``, an error in which every prediction has."""


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
            raise ValueError(
                f"rounds, min_run_time: expected 1 or more, and no less than 0, found {self.rounds}, {self.min_run_time}"
            )


def time_together(
    runs: Mapping[str, Run], runtime: Runtime, min_run_time: float
) -> dict[str, float]:
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
    if not spec.layers:
        raise ValueError(f"{spec.model}: expected layers to measure, found none in its rank space")
    identity = {**subject(spec), **runtime.identity(), "where": timing.where}
    homes = spec.homes()
    mine = [index for index in homes if indices is None or index in indices]
    state = read_measurements(out, identity) or {
        "version": COSTS_VERSION,
        "metric": METRIC,
        "unit": UNITS[METRIC],
        "identity": {},
    }
    before = state["identity"]
    kept_facts = {key: before[key] for key in ("date", "runs") if key in before}
    state["identity"] = (
        identity | kept_facts | {"geometry": before.get("geometry", {}) | identity["geometry"]}
    )
    if unmeasured(spec, state):  # else what is there stays a table while it is measured once more
        state = {key: state[key] for key in STATE if key in state}
    runs: dict[str, dict[str, list[float]]] = state.setdefault("runs", {})
    whole: list[float] = state.setdefault(NETWORK, [])
    missing, seen = [], Counter[int | None]()
    for index in timing.rounds * _one_round(mine):
        if seen[index] >= len(_kept(runs, whole, homes, index)):
            missing.append(index)
        seen[index] += 1
    with runtime.pinned():
        for done, index in enumerate(missing):
            progress(done, len(missing))
            kept = _kept(runs, whole, homes, index)
            try:
                kept.append(1e3 * _time(spec, runtime, index, timing))
            # The device is gone, out of memory, or cannot run this; or a specification that was written by hand makes no sense.
            except (RuntimeError, TypeError, LookupError, AttributeError) as error:
                what = (
                    "the network"
                    if index is None
                    else "layer {!r}, candidate {!r}".format(*homes[index])
                )
                reason = first_line(error)
                reason = (
                    reason
                    if isinstance(error, RuntimeError)
                    else f"the specification is damaged ({type(error).__name__}: {reason})"
                )
                raise ValueError(
                    f"{what}: {reason}; what was measured until then {'is in ' + str(out) if out else 'is lost'}"
                ) from None
            state["identity"] |= {"date": time.strftime("%Y-%m-%d"), "runs": timing.rounds}
            if out is not None and done + 1 < len(missing):
                write_json(out, state)
    progress(len(missing), len(missing))
    state |= {} if unmeasured(spec, state) else finished(spec, state)
    if out is not None:
        write_json(out, state)
    return state


def _time(spec: Specification, runtime: Runtime, index: int | None, timing: Timing) -> float:
    """Seconds of an entry, of the network for None; in place, what one layer gains (negative) or loses against the dense one: all layers
    alike are swapped at once, and the difference is shared out among them."""
    layers = [] if index is None else spec.alike(index)
    dense = index is None or all(spec.layers[layer][DENSE] == index for layer in layers)
    if dense or timing.where == "alone":
        run = runtime.network(spec, {}) if index is None else runtime.entry(spec, index)
        return time_together({"": run}, runtime, timing.min_run_time)[""]
    choice = {
        layer: next(name for name, i in spec.layers[layer].items() if i == index)
        for layer in layers
    }
    seconds = time_together(
        {"before": runtime.network(spec, {}), "after": runtime.network(spec, choice)},
        runtime,
        timing.min_run_time,
    )
    return (seconds["after"] - seconds["before"]) / len(layers)


def _one_round(indices: Sequence[int]) -> list[int | None]:
    """Each entry once, and after every few of them the network, None, since one moment may be a disturbed one."""
    few = max(1, math.ceil(len(indices) / _VISITS))
    return [
        index
        for start in range(0, max(1, len(indices)), few)
        for index in [*indices[start : start + few], None]
    ]


def _kept(
    runs: dict[str, dict[str, list[float]]],
    whole: list[float],
    homes: Mapping[int, tuple[str, str]],
    index: int | None,
) -> list:
    """The measurements of an entry, of the network for None."""
    return (
        whole
        if index is None
        else runs.setdefault(homes[index][0], {}).setdefault(homes[index][1], [])
    )
