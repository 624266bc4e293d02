"""Latency measured on the machine at hand, one entry per distinct layer shape and rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from statistics import median

from torch import nn

from nni_haloc.costs.device.measuring import Timing, measure, time_together
from nni_haloc.costs.device.torch_runtime import TorchRuntime
from nni_haloc.costs.specification import specify
from nni_haloc.costs.table import CostTable
from nni_haloc.space.modules import Example, only_tensor
from nni_haloc.space.ranks import RankRules
from nni_haloc.utils.progress import Progress


def latency_table(
    model: nn.Module,
    example_input: Example,
    rules: RankRules = RankRules(),
    runtime: TorchRuntime = TorchRuntime(),
    timing: Timing = Timing(),
    progress: Progress = lambda done, of: None,
) -> CostTable:
    """Milliseconds that every candidate takes on this machine for the batch of ``example_input (N, ...)``.

    Each distinct (geometry, input shape, rank) is timed as ``timing`` say, in the precision, memory format and threads of ``runtime``. The
    table's ``fixed`` is the whole network's time less that of its searched layers, and not below zero.
    """
    state = measure(
        specify(model, example_input, rules, program=False),
        replace(runtime, model=model),
        None,
        timing,
        progress,
    )
    return CostTable(
        state["metric"], state["costs"], state["fixed"], state["identity"], state["spread"]
    )


def measure_latency(
    models: Mapping[str, nn.Module],
    example_input: Example,
    runtime: TorchRuntime = TorchRuntime(),
    *,
    min_run_time: float = 0.1,
    rounds: int = 5,
) -> dict[str, float]:
    """Milliseconds of a forward pass of each network: timed in alternation, the median of ``rounds`` medians."""
    shape = tuple(only_tensor(example_input).shape)
    with runtime.pinned():
        runs = {name: runtime.ready(model, shape, copied=False) for name, model in models.items()}
        found = [time_together(runs, runtime, min_run_time) for _ in range(rounds)]
    return {name: 1e3 * median(times[name] for times in found) for name in models}
