"""Predictors by name: what makes the cost table of a metric.

A run takes the predictor that has the name of its ``cost.metric``, unless ``cost.predictor`` names
another one of the same metric.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from nni_haloc.costs.accelerator import CACHE, accelerator_table
from nni_haloc.costs.analytic import (
    activation_table,
    mac_table,
    measure_peaks,
    param_table,
    roofline_table,
)
from nni_haloc.costs.device.costs_file import UNITS
from nni_haloc.costs.device.runtime import Runtime
from nni_haloc.costs.latency import measured_table
from nni_haloc.costs.table import CostTable
from nni_haloc.space.modules import Example
from nni_haloc.space.ranks import AllowedRanks
from nni_haloc.utils.progress import Progress

MakeTable = Callable[[nn.Module, Example, AllowedRanks, Runtime, Progress], CostTable]
"""Makes a cost table of a network, an example input, the rank space, a runtime and a `Progress`.

The example is one input, but for ``latency_ms`` and ``energy_mj`` the batch that is measured. The
runtime is for predictors that measure; `Progress` is called with the steps done and all steps.
"""


@dataclass(frozen=True)
class Predictor:
    """One way to get a metric's cost table.

    Another package adds a predictor by an entry point in the group ``nni_haloc.predictors``. If it
    has a metric of its own, the entry point's name must be the metric's:

        peak_kib = Predictor("peak_kib", "kibibytes", peak_table)

    Attributes:
        metric: what the table is of, with the unit as its ending: ``latency_ms``.
        unit: the unit in words, for ``costs.json``.
        table: makes the table.
        measured: whether another process, or another call, may get other numbers.
    """

    metric: str
    unit: str
    table: MakeTable
    measured: bool = False

    def __post_init__(self) -> None:
        if self.unit != UNITS.get(self.metric, self.unit):
            raise ValueError(
                f"unit of {self.metric}: expected {UNITS[self.metric]!r}, found {self.unit!r}"
            )


def _counted(
    metric: str, make: Callable[[nn.Module, Example, AllowedRanks], CostTable]
) -> Predictor:
    """Make a predictor of a function that only counts."""
    return Predictor(metric, UNITS[metric], lambda model, x, allowed, *_: make(model, x, allowed))


def _modelled(metric: str) -> Predictor:
    """Make the predictor of a metric of the Eyeriss-like array."""
    return Predictor(
        metric,
        UNITS[metric],
        lambda model, x, allowed, runtime, progress: accelerator_table(
            model, x, allowed, metric, cache=CACHE, progress=progress
        ),
    )


def _measured(metric: str) -> Predictor:
    """Make the predictor of a metric that is measured with the runtime."""
    return Predictor(
        metric,
        UNITS[metric],
        lambda model, x, allowed, runtime, progress: measured_table(
            metric, model, x, allowed, runtime, progress=progress
        ),
        measured=True,
    )


def roofline_predictor(flops: float | None = None, bandwidth: float | None = None) -> Predictor:
    """Make a predictor of latency by work and traffic; see `roofline_table`.

    Args:
        flops: floating-point operations a second (None: measured with the runtime).
        bandwidth: bytes a second (None: measured with the runtime).
    """

    def table(
        model: nn.Module,
        example: Example,
        allowed: AllowedRanks,
        runtime: Runtime,
        progress: Progress,
    ) -> CostTable:
        known = flops is not None and bandwidth is not None
        peaks = (0.0, 0.0) if known else measure_peaks(runtime)
        rates = {"flops": flops or peaks[0], "bandwidth": bandwidth or peaks[1]}
        return roofline_table(model, example, allowed, **rates)

    return Predictor("latency_ms", UNITS["latency_ms"], table, measured=True)


macs = _counted("macs", mac_table)
params = _counted("params", param_table)
activation_bytes = _counted("activation_bytes", activation_table)
cycles = _modelled("cycles")
energy_pj = _modelled("energy_pj")
latency_ms = _measured("latency_ms")
energy_mj = _measured("energy_mj")
roofline = roofline_predictor()
