"""Make trained convolutional networks smaller and faster by choosing the rank of every layer.

HALOC (AAAI 2023) as a plugin for Microsoft NNI. Names load on first use: importing the package is
quick, and loading a compressed network needs neither NNI nor Lightning.
"""

from __future__ import annotations

import os
import sys

_program = " ".join(sys.orig_argv).partition(" -m")[2].lstrip()
if sys.argv[:1] == ["-m"] and _program.startswith("nni_haloc."):
    # Of ``python -m nni_haloc.trial`` the current folder is the first place where Python looks for
    # modules. Make it the last one: a random.py there is not meant for all packages.
    _here = os.path.abspath(".")
    sys.path.sort(key=lambda place: str(place) == _here)  # a place may be a Path

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nni_haloc.utils.versions import check_supported

if TYPE_CHECKING:
    from nni_haloc.chain.pruning import prune
    from nni_haloc.chain.quantizing import quantize
    from nni_haloc.costs.analytic import mac_table, param_table
    from nni_haloc.costs.device.runtime import Timing
    from nni_haloc.costs.device.torch_runtime import TorchRuntime
    from nni_haloc.costs.latency import latency_table, measure_latency
    from nni_haloc.costs.table import CostTable
    from nni_haloc.inputs.config import load_config
    from nni_haloc.plan.budget import Limit
    from nni_haloc.plan.compression import compress
    from nni_haloc.plan.rank_plan import RankPlan
    from nni_haloc.plan.sensitivity import sensitivities
    from nni_haloc.results.export import export
    from nni_haloc.results.front import pareto_front
    from nni_haloc.results.html_report import html_report
    from nni_haloc.runs.compress_model import Compressed, compress_model
    from nni_haloc.runs.folder import RunFolder
    from nni_haloc.runs.hub import from_pretrained, push_to_hub
    from nni_haloc.runs.run import run
    from nni_haloc.runs.saved import load, save
    from nni_haloc.runs.stages.stage import NetworkStage, Stage
    from nni_haloc.search.evaluator import Classification, classification
    from nni_haloc.search.space import RankSpace, TableProfiler
    from nni_haloc.search.strategy import Haloc, run_search
    from nni_haloc.space.ranks import AllowedRanks
    from nni_haloc.training.finetuning import accuracy, finetune, recalibrate
    from nni_haloc.training.recipe import Recipe
    from nni_haloc.training.reconstruction import reconstruct_blocks
    from nni_haloc.utils.errors import (
        BudgetMissed,
        DataError,
        Diverged,
        HalocError,
        InfeasibleBudget,
        MissingPackage,
        SettingsError,
        UnusableCheckpoint,
    )

_HOMES = {
    "chain.pruning": ("prune",),
    "chain.quantizing": ("quantize",),
    "costs.analytic": (
        "mac_table",
        "param_table",
    ),
    "costs.device.runtime": ("Timing",),
    "costs.device.torch_runtime": ("TorchRuntime",),
    "costs.latency": (
        "latency_table",
        "measure_latency",
    ),
    "costs.table": ("CostTable",),
    "inputs.config": ("load_config",),
    "plan.budget": ("Limit",),
    "plan.compression": ("compress",),
    "plan.rank_plan": ("RankPlan",),
    "plan.sensitivity": ("sensitivities",),
    "results.export": ("export",),
    "results.front": ("pareto_front",),
    "results.html_report": ("html_report",),
    "runs.compress_model": (
        "Compressed",
        "compress_model",
    ),
    "runs.folder": ("RunFolder",),
    "runs.hub": (
        "from_pretrained",
        "push_to_hub",
    ),
    "runs.run": ("run",),
    "runs.saved": (
        "load",
        "save",
    ),
    "runs.stages.stage": (
        "NetworkStage",
        "Stage",
    ),
    "search.evaluator": (
        "Classification",
        "classification",
    ),
    "search.space": (
        "RankSpace",
        "TableProfiler",
    ),
    "search.strategy": (
        "Haloc",
        "run_search",
    ),
    "space.ranks": ("AllowedRanks",),
    "training.finetuning": (
        "accuracy",
        "finetune",
        "recalibrate",
    ),
    "training.recipe": ("Recipe",),
    "training.reconstruction": ("reconstruct_blocks",),
    "utils.errors": (
        "BudgetMissed",
        "DataError",
        "Diverged",
        "HalocError",
        "InfeasibleBudget",
        "MissingPackage",
        "SettingsError",
        "UnusableCheckpoint",
    ),
}
"""Public names by the modules that have them."""
_RENAMED = {"front": "pareto_front", "RankRules": "AllowedRanks"}
"""Names of earlier versions, which give a warning for one release."""

__all__ = sorted(["__version__", *(name for names in _HOMES.values() for name in names)])

__version__ = "0.2.0"  # its only place: setup.py reads it here

check_supported()


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        import warnings

        new = _RENAMED[name]
        message = (
            f"nni_haloc.{name} is now nni_haloc.{new}; the old name goes with the next release"
        )
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        name = new
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
