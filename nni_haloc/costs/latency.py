"""Measure latency and energy on the machine at hand: `measured_table`, `measure_latency`."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from types import MappingProxyType

from torch import nn

from nni_haloc.costs.device.measure import measure, time_together
from nni_haloc.costs.device.runtime import Run, Runtime, Timing
from nni_haloc.costs.device.spec import Specification
from nni_haloc.costs.device.torch_runtime import TorchRuntime
from nni_haloc.costs.specify import specify
from nni_haloc.costs.table import CostTable
from nni_haloc.space.modules import Example, only_tensor
from nni_haloc.space.ranks import AllowedRanks
from nni_haloc.utils.progress import Progress


def latency_table(
    model: nn.Module,
    example_input: Example,
    allowed: AllowedRanks = AllowedRanks(),
    runtime: Runtime = TorchRuntime(),
    timing: Timing = Timing(),
    progress: Progress = lambda done, of: None,
) -> CostTable:
    """Measure the latency of every candidate on this machine.

    Each distinct (geometry, input shape, rank) is measured once a round.

    Args:
        model: the original network.
        example_input: the batch to measure, ``(N, ...)``.
        allowed: the rank space.
        runtime: what runs it; it settles precision, memory format and threads.
        timing: how often and how long.
        progress: called with the numbers of entries done and to do.

    Returns:
        The table, in milliseconds for the batch, with the spread of the single values.

    Raises:
        ValueError: if the network takes more than one tensor, or an entry can't be run.
    """
    return measured_table("latency_ms", model, example_input, allowed, runtime, timing, progress)


def measured_table(
    metric: str,
    model: nn.Module,
    example_input: Example,
    allowed: AllowedRanks = AllowedRanks(),
    runtime: Runtime = TorchRuntime(),
    timing: Timing = Timing(),
    progress: Progress = lambda done, of: None,
) -> CostTable:
    """Measure the latency or the energy of every candidate on this machine.

    Each distinct (geometry, input shape, rank) is measured once a round. The table's ``fixed`` is
    what the whole network takes minus what its searched layers take, and not below zero.

    Args:
        metric: ``latency_ms`` or ``energy_mj``.
        model: the original network.
        example_input: the batch to measure, ``(N, ...)``.
        allowed: the rank space.
        runtime: what runs it; it settles precision, memory format and threads.
        timing: how often and how long.
        progress: called with the numbers of entries done and to do.

    Returns:
        The table, in milliseconds or millijoules for the batch, with the spread of the single
        values.

    Raises:
        ValueError: if the network takes more than one tensor, an entry can't be run, or the runtime
            measures no energy.
        MissingPackage: if a package that the metric needs is not installed.
    """
    spec = runtime.prepare(specify(model, example_input, allowed, program=False), model)
    state = measure(spec, runtime, None, timing, progress, metric=metric)
    return CostTable(
        state["metric"],
        state["costs"],
        state["fixed"],
        state["identity"],
        state.get("spread", {}),
        state["quality"],
    )


def forward_pass(runtime: Runtime, model: nn.Module, shape: tuple[int, ...]) -> Run:
    """Return a forward pass of a copy of a network in a runtime.

    Args:
        runtime: what runs it.
        model: the network; it is left as it is.
        shape: of its input, batch included.
    """
    spec = Specification(type(model).__name__, shape, {}, ())
    return runtime.network(runtime.prepare(spec, model), {})


def measure_latency(
    models: Mapping[str, nn.Module],
    example_input: Example,
    runtime: Runtime = TorchRuntime(),
    *,
    min_run_time: float = 0.1,
    rounds: int = 5,
    others: Mapping[str, Runtime] = MappingProxyType({}),
) -> dict[str, float]:
    """Measure a forward pass of each network, all of them in alternation.

    Args:
        models: networks by name.
        example_input: the batch, ``(N, ...)``.
        runtime: what runs them.
        min_run_time: seconds for which each network runs in a round.
        rounds: the median is of as many medians.
        others: by name of a network, what runs it in the place of ``runtime``: the same runtime
            in another memory format.

    Returns:
        Milliseconds by name.
    """
    shape = tuple(only_tensor(example_input).shape)
    with runtime.pinned():
        runs = {
            name: forward_pass(others.get(name, runtime), model, shape)
            for name, model in models.items()
        }
        times = [time_together(runs, runtime, min_run_time) for _ in range(rounds)]
    return {name: 1e3 * median(seconds[name] for seconds in times) for name in models}


def measure_energy(
    model: nn.Module,
    example_input: Example,
    runtime: Runtime = TorchRuntime(),
    *,
    min_run_time: float = 0.5,
    rounds: int = 3,
) -> float:
    """Measure the energy that the device consumes for a forward pass.

    Args:
        model: the network.
        example_input: the batch, ``(N, ...)``.
        runtime: what runs it.
        min_run_time: seconds for which passes run in a round.
        rounds: the result is the median of as many.

    Returns:
        Millijoules.

    Raises:
        ValueError: if the runtime or the device measures no energy.
        MissingPackage: if a package that it needs is not installed.
    """
    with runtime.pinned():
        run = forward_pass(runtime, model, tuple(only_tensor(example_input).shape))
        return median(runtime.energy(run, min_run_time) for _ in range(rounds))
