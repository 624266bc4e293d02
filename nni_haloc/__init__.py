"""nni-haloc: hardware-aware automatic low-rank compression (HALOC, AAAI 2023) for NNI.

Names load on first use, so that importing the package is quick and loading a compressed network needs neither NNI nor Lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .environment import check_supported

if TYPE_CHECKING:
    from .budget import Limit
    from .compression import compress, load, save
    from .finetuning import accuracy, finetune, recalibrate
    from .fronts import front
    from .nas import Haloc, RankSpace, TableProfiler, classification
    from .predictors import CostTable, Timing, TorchRuntime, latency_table, mac_table, measure_latency, param_table
    from .ranks import RankPlan, RankRules
    from .recipe import Recipe
    from .sensitivity import sensitivities

_HOMES = {
    "budget": ("Limit",),
    "compression": ("compress", "load", "save"),
    "finetuning": ("accuracy", "finetune", "recalibrate"),
    "fronts": ("front",),
    "nas": ("Haloc", "RankSpace", "TableProfiler", "classification"),
    "predictors": ("CostTable", "Timing", "TorchRuntime", "latency_table", "mac_table", "measure_latency", "param_table"),
    "ranks": ("RankPlan", "RankRules"),
    "recipe": ("Recipe",),
    "sensitivity": ("sensitivities",),
}
__all__ = sorted(name for names in _HOMES.values() for name in names)


check_supported()


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
