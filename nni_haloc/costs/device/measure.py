"""Measure every entry of a specification; keep its values in ``costs.json`` as they come."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

from nni_haloc.costs.device.costs_file import COSTS_VERSION, UNITS
from nni_haloc.costs.device.measured_file import (
    NETWORK,
    STATE,
    finished,
    read_measurements,
    subject,
    unmeasured,
)
from nni_haloc.costs.device.runtime import Run, Runtime, Timing
from nni_haloc.costs.device.spec import Specification
from nni_haloc.space.names import DENSE
from nni_haloc.utils.errors import first_line
from nni_haloc.utils.files import write_json
from nni_haloc.utils.locks import hold_file
from nni_haloc.utils.progress import Progress

_FEWEST = 5
"""Passes that are timed at least, however long each takes."""
_BETWEEN_WRITES = 1.0
"""Seconds between two writings of what is measured."""
_VISITS = 8
"""How often per round the whole network is timed: an error in `fixed` shifts every prediction."""


def time_together(
    runs: Mapping[str, Run], runtime: Runtime, min_run_time: float
) -> dict[str, float]:
    """Time several forward passes in alternation, so that a disturbance falls on all of them.

    Each turn goes the other way round: a machine that grows slower favours none of them.

    Returns:
        Median seconds by name.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    end = time.perf_counter() + min_run_time * len(runs)
    while len(times[order[0]]) < _FEWEST or time.perf_counter() < end:
        for name in order:
            times[name].append(runtime.once(runs[name]))
        order.reverse()
    return {name: median(values) for name, values in times.items()}


def measure(
    spec: Specification,
    runtime: Runtime,
    out: str | Path | None = None,
    timing: Timing = Timing(),
    progress: Progress = lambda done, of: None,
    indices: Collection[int] | None = None,
    metric: str = "latency_ms",
) -> dict[str, Any]:
    """Measure the entries that ``out`` does not have yet, and write it every second.

    Args:
        spec: what to measure.
        runtime: what runs it.
        out: ``costs.json``; measuring goes on in one that is there (None: keep nothing).
        timing: how often and how long.
        progress: called with the numbers of entries done and to do.
        indices: the entries to measure (None: all). The network is measured in any case.
        metric: ``latency_ms`` or ``energy_mj``.

    Returns:
        The content of ``costs.json``. It is a cost table once every entry has been measured; until
        then it holds the measured values only.

    Raises:
        ValueError: if ``out`` holds measurements of something else, an entry can't be run, or the
            runtime does not measure the metric.
        HalocError: if another process measures into ``out``.
        MissingPackage: if a package that the metric needs is not installed.
    """
    if not spec.layers:
        raise ValueError(f"{spec.model}: expected layers to measure, found none in its rank space")
    with hold_file(out) if out is not None else nullcontext():
        return _measure(spec, runtime, out, timing, progress, indices, metric)


def _measure(
    spec: Specification,
    runtime: Runtime,
    out: str | Path | None,
    timing: Timing,
    progress: Progress,
    indices: Collection[int] | None,
    metric: str,
) -> dict[str, Any]:
    """Measure what is missing in ``out``; see `measure`."""
    identity = {**subject(spec), **runtime.identity(), "where": timing.where}
    users = spec.first_users()
    mine = [index for index in users if indices is None or index in indices]
    state = _state_to_go_on_with(spec, identity, metric, out)
    runs: dict[str, dict[str, list[float]]] = state.setdefault("runs", {})
    whole: list[float] = state.setdefault(NETWORK, [])
    missing, seen = [], Counter[int | None]()
    for index in timing.rounds * _one_round(mine):
        if seen[index] >= len(_kept(runs, whole, users, index)):
            missing.append(index)
        seen[index] += 1
    with runtime.pinned(), _kept_on_disk(out, state) as keep:
        for done, index in enumerate(missing):
            progress(done, len(missing))
            kept = _kept(runs, whole, users, index)
            try:
                kept.append(_measured(spec, runtime, index, timing, metric))
            # The device is gone, out of memory or can't run this entry; or somebody wrote the
            # specification by hand and it makes no sense.
            except (RuntimeError, TypeError, LookupError, AttributeError) as error:
                what = "the network"
                if index is not None:
                    what = "layer {!r}, candidate {!r}".format(*users[index])
                where = f"is in {out}" if out else "is lost"
                raise ValueError(
                    f"{what}: {_reason(error)}; what was measured until then {where}"
                ) from None
            state["identity"] |= {"date": time.strftime("%Y-%m-%d"), "runs": timing.rounds}
            keep()
    progress(len(missing), len(missing))
    state |= {} if unmeasured(spec, state) else finished(spec, state)
    if out is not None:
        write_json(out, state)
    return state


@contextmanager
def _kept_on_disk(out: str | Path | None, state: Mapping[str, Any]) -> Iterator[Callable[[], None]]:
    """Yield a function that writes the state to a file, and write it once more if the block fails.

    It writes once a second at most: a slow card would take longer for it than an entry takes, and
    disturb the next one.
    """
    last, changed = time.monotonic(), False

    def keep() -> None:
        nonlocal last, changed
        changed = True
        if out is not None and time.monotonic() - last >= _BETWEEN_WRITES:
            write_json(out, state)
            last, changed = time.monotonic(), False

    try:
        yield keep
    except BaseException:
        if out is not None and changed:
            write_json(out, state)
        raise


def _state_to_go_on_with(
    spec: Specification, identity: dict[str, Any], metric: str, out: str | Path | None
) -> dict[str, Any]:
    """Read the state of an earlier start, or make an empty one."""
    state = read_measurements(out, identity, metric) or {
        "version": COSTS_VERSION,
        "metric": metric,
        "unit": UNITS[metric],
        "identity": {},
    }
    before = state["identity"]
    kept_facts = {key: before[key] for key in ("date", "runs") if key in before}
    state["identity"] = (
        identity | kept_facts | {"geometry": before.get("geometry", {}) | identity["geometry"]}
    )
    if not unmeasured(spec, state):  # a finished table stays one while it is measured once more
        return state
    return {key: state[key] for key in STATE if key in state}


def _reason(error: Exception) -> str:
    """Say on one line why an entry can't be run."""
    if isinstance(error, RuntimeError):
        return first_line(error)
    return f"the specification is damaged ({type(error).__name__}: {first_line(error)})"


def _measured(
    spec: Specification, runtime: Runtime, index: int | None, timing: Timing, metric: str
) -> float:
    """Return what an entry costs in the metric's unit, or the whole network for None.

    In place it is what one layer gains (negative) or loses against the dense one. All layers that
    are alike are swapped at once, and the difference is divided by their number.
    """
    layers = [] if index is None else spec.layers_with(index)
    dense = index is None or all(spec.layers[layer][DENSE] == index for layer in layers)
    if dense or timing.where == "alone":
        run = runtime.network(spec, {}) if index is None else runtime.entry(spec, index)
        return _costs({"": run}, runtime, timing, metric)[""]
    choice = {
        layer: next(name for name, i in spec.layers[layer].items() if i == index)
        for layer in layers
    }
    runs = {"before": runtime.network(spec, {}), "after": runtime.network(spec, choice)}
    costs = _costs(runs, runtime, timing, metric)
    return (costs["after"] - costs["before"]) / len(layers)


def _costs(
    runs: Mapping[str, Run], runtime: Runtime, timing: Timing, metric: str
) -> dict[str, float]:
    """Return what passes cost, by name: milliseconds or millijoules."""
    if metric == "energy_mj":
        return {name: runtime.energy(run, timing.min_run_time) for name, run in runs.items()}
    seconds = time_together(runs, runtime, timing.min_run_time)
    return {name: 1e3 * value for name, value in seconds.items()}


def _one_round(indices: Sequence[int]) -> list[int | None]:
    """List each entry once, and after every few of them None, the whole network.

    The network is visited all along the round, because any one moment may be a disturbed one.
    """
    few = max(1, math.ceil(len(indices) / _VISITS))
    return [
        index
        for start in range(0, max(1, len(indices)), few)
        for index in [*indices[start : start + few], None]
    ]


def _kept(
    runs: dict[str, dict[str, list[float]]],
    whole: list[float],
    users: Mapping[int, tuple[str, str]],
    index: int | None,
) -> list:
    """Return the list that keeps an entry's values; the network's for None."""
    if index is None:
        return whole
    layer, candidate = users[index]
    return runs.setdefault(layer, {}).setdefault(candidate, [])
