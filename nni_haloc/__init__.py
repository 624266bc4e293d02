"""nni-haloc: hardware-aware automatic low-rank compression (HALOC, AAAI 2023) for NNI.

Names load on first use, so that importing the package is quick and loading a compressed network needs neither NNI nor Lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nni_haloc.utils.versions import check_supported

if TYPE_CHECKING:
    from nni_haloc.costs.analytic import mac_table, param_table
    from nni_haloc.costs.device.measuring import Timing
    from nni_haloc.costs.device.torch_runtime import TorchRuntime
    from nni_haloc.costs.measured import latency_table, measure_latency
    from nni_haloc.costs.table import CostTable
    from nni_haloc.plan.budget import Limit
    from nni_haloc.plan.compression import compress
    from nni_haloc.plan.rank_plan import RankPlan
    from nni_haloc.plan.sensitivity import sensitivities
    from nni_haloc.results.front import pareto_front
    from nni_haloc.runs.saved import load, save
    from nni_haloc.search.evaluator import Classification, classification
    from nni_haloc.search.space import RankSpace, TableProfiler
    from nni_haloc.search.strategy import Haloc
    from nni_haloc.space.ranks import RankRules
    from nni_haloc.training.finetuning import accuracy, finetune, recalibrate
    from nni_haloc.training.recipe import Recipe

_HOMES = {
    "costs.analytic": ("mac_table", "param_table"),
    "costs.device.measuring": ("Timing",),
    "costs.device.torch_runtime": ("TorchRuntime",),
    "costs.measured": ("latency_table", "measure_latency"),
    "costs.table": ("CostTable",),
    "plan.budget": ("Limit",),
    "plan.compression": ("compress",),
    "plan.rank_plan": ("RankPlan",),
    "plan.sensitivity": ("sensitivities",),
    "results.front": ("pareto_front",),
    "runs.saved": ("load", "save"),
    "search.evaluator": ("Classification", "classification"),
    "search.space": ("RankSpace", "TableProfiler"),
    "search.strategy": ("Haloc",),
    "space.ranks": ("RankRules",),
    "training.finetuning": ("accuracy", "finetune", "recalibrate"),
    "training.recipe": ("Recipe",),
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
