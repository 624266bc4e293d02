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

from nni_haloc.costs.device.clock import PassClock
from nni_haloc.costs.device.costs_file import COSTS_VERSION, UNITS
from nni_haloc.costs.device.measured_file import (
    NETWORK,
    STATE,
    finished,
    read_measurements,
    subject,
    unmeasured,
)
from nni_haloc.costs.device.quality import ENOUGH
from nni_haloc.costs.device.runtime import Run, Runtime, Timing
from nni_haloc.costs.device.spec import Specification
from nni_haloc.space.names import DENSE
from nni_haloc.utils.errors import first_line
from nni_haloc.utils.files import write_json
from nni_haloc.utils.locks import hold_file
from nni_haloc.utils.log import logger
from nni_haloc.utils.progress import Progress

_FEWEST = 5
"""Passes that are timed at least, however long each takes."""
_BETWEEN_WRITES = 1.0
"""Seconds between two writings of what is measured."""
_BUSY = 0.85
"""Share of the cores that the best round kept busy; a round below it was disturbed."""
_VISITS = 8
"""How often per round the whole network is timed: an error in `fixed` shifts every prediction."""


def time_together(
    runs: Mapping[str, Run],
    runtime: Runtime,
    min_run_time: float,
    clock: PassClock | None = None,
) -> dict[str, float]:
    """Time several forward passes in alternation, so that a disturbance falls on all of them.

    Each turn goes the other way round: a machine that grows slower favours none of them.

    Args:
        runs: passes by name.
        runtime: what runs them.
        min_run_time: seconds for which each of them runs.
        clock: the runtime's clock, where there is one already.

    Returns:
        Median seconds by name.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    order, clock = list(runs), clock or PassClock(runtime)
    end = time.perf_counter() + min_run_time * len(runs)
    turns = 0
    while turns < _FEWEST or turns % 2 or time.perf_counter() < end:
        for name in order:
            times[name].append(clock.once(runs[name]))
        order.reverse()
        turns += 1
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
    one, rounds, watch = one_round(mine), timing.rounds, _Watch(timing.rounds)
    with runtime.pinned(), _kept_on_disk(out, state) as keep:
        clock = PassClock(runtime)
        while True:
            missing = _missing(rounds, one, lambda index: _kept(runs, whole, users, index))
            for done, index in enumerate(missing):
                progress(done, len(missing))
                values = _kept(runs, whole, users, index)
                with _named(users, index, out):
                    values.append(_measured(spec, runtime, index, timing, metric, clock))
                watch.note(values, clock, last=(done + 1) % len(one) == 0)
                state["identity"] |= {"date": time.strftime("%Y-%m-%d"), "runs": rounds}
                keep()
            progress(len(missing), len(missing))
            if watch.throw_away():
                state["identity"]["thrown_away"] = watch.thrown
            elif rounds >= timing.most_rounds or _is_precise(spec, state):
                break
            else:
                rounds += 1
                error = finished(spec, state)["quality"].get("standard_error", math.inf)
                logger.info(
                    "round %d of at most %d: the standard error of a whole network is %.1f %%, "
                    "expected below %g %%",
                    rounds,
                    timing.most_rounds,
                    100 * error,
                    100 * ENOUGH,
                )
    state |= {} if unmeasured(spec, state) else finished(spec, state)
    if out is not None:
        write_json(out, state)
    return state


def _missing(
    rounds: int, one: Sequence[int | None], kept: Callable[[int | None], list[float]]
) -> list[int | None]:
    """List what is to be measured until every entry has a value of each round."""
    missing, seen = [], Counter[int | None]()
    for index in rounds * list(one):
        if seen[index] >= len(kept(index)):
            missing.append(index)
        seen[index] += 1
    return missing


def _is_precise(spec: Specification, state: Mapping[str, Any]) -> bool:
    """Tell whether a network's cost is known well enough, or can't be known: one worker's part."""
    if unmeasured(spec, state):
        return True
    return finished(spec, state)["quality"].get("standard_error", math.inf) <= ENOUGH


@contextmanager
def _named(
    users: Mapping[int, tuple[str, str]], index: int | None, out: str | Path | None
) -> Iterator[None]:
    """Say which entry can't be measured: the device is gone, out of memory or can't run it.

    Or somebody wrote the specification by hand, and it makes no sense.
    """
    try:
        yield
    except (RuntimeError, TypeError, LookupError, AttributeError) as error:
        what = "the network"
        if index is not None:
            what = "layer {!r}, candidate {!r}".format(*users[index])
        where = f"is in {out}" if out else "is lost"
        raise ValueError(
            f"{what}: {_reason(error)}; what was measured until then {where}"
        ) from None


class _Watch:
    """Find the rounds on several threads in which other programs used the processor.

    In them the passes kept fewer cores busy, because threads waited for each other.

    Args:
        most: how many rounds are thrown away at most.
    """

    def __init__(self, most: int) -> None:
        self.most, self.thrown = most, 0
        self._now: list[tuple[list[float], float]] = []
        self._rounds: list[tuple[float, list[tuple[list[float], float]]]] = []

    def note(self, values: list[float], clock: PassClock, *, last: bool) -> None:
        """Note the value that was added to ``values``; ``last`` ends the round."""
        self._now.append((values, values[-1]))
        if last:
            cores = clock.take_cores()
            if cores is not None:
                self._rounds.append((cores, self._now))
            self._now = []

    def throw_away(self) -> bool:
        """Take the values of disturbed rounds out of their lists; tell whether there were any."""
        best = max((cores for cores, _ in self._rounds), default=0.0)
        bad = [noted for cores, noted in self._rounds if cores < _BUSY * best]
        if not bad or self.thrown + len(bad) > self.most:
            return False
        self._rounds = [noted for noted in self._rounds if noted[0] >= _BUSY * best]
        self.thrown += len(bad)
        for values, value in (each for noted in bad for each in noted):
            values.remove(value)
        return True


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
    kept_facts = {key: before[key] for key in ("date", "runs", "thrown_away") if key in before}
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
    spec: Specification,
    runtime: Runtime,
    index: int | None,
    timing: Timing,
    metric: str,
    clock: PassClock,
) -> float:
    """Return what an entry costs in the metric's unit, or the whole network for None.

    In place it is what one layer gains (negative) or loses against the dense one. All layers that
    are alike are swapped at once, and the difference is divided by their number.
    """
    layers = [] if index is None else spec.layers_with(index)
    dense = index is None or all(spec.layers[layer][DENSE] == index for layer in layers)
    if dense or timing.where == "alone":
        run = runtime.network(spec, {}) if index is None else runtime.entry(spec, index)
        return _costs({"": run}, runtime, timing, metric, clock)[""]
    choice = {
        layer: next(name for name, i in spec.layers[layer].items() if i == index)
        for layer in layers
    }
    runs = {"before": runtime.network(spec, {}), "after": runtime.network(spec, choice)}
    costs = _costs(runs, runtime, timing, metric, clock)
    return (costs["after"] - costs["before"]) / len(layers)


def _costs(
    runs: Mapping[str, Run], runtime: Runtime, timing: Timing, metric: str, clock: PassClock
) -> dict[str, float]:
    """Return what passes cost, by name: milliseconds or millijoules."""
    if metric == "energy_mj":
        return {name: runtime.energy(run, timing.min_run_time) for name, run in runs.items()}
    seconds = time_together(runs, runtime, timing.min_run_time, clock)
    return {name: 1e3 * value for name, value in seconds.items()}


def one_round(indices: Sequence[int]) -> list[int | None]:
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
