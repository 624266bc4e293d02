"""A trained model and a plan make a compressed model; a run's folder gives it back."""

from __future__ import annotations

from torch import nn

from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.space.candidates import build_candidates
from nni_haloc.space.layers import LayerSpec
from nni_haloc.space.modules import Example, copy_of, replace_modules
from nni_haloc.space.names import rank_name
from nni_haloc.space.tucker import Method


def compress(
    model: nn.Module,
    plan: RankPlan,
    calibration: Example | None = None,
    method: Method | None = None,
) -> nn.Module:
    """A compressed copy of a trained ``model``, its layers decomposed afresh at the plan's ranks.

    By the data where ``calibration`` images ``(N, ...)`` are given (a tuple or dict of inputs where the model takes several), else by the
    weights (`build_candidates`). For the weights that a search trained, see `Haloc.network`. Raises ValueError if the
    plan names a layer that the model does not have or can't be decomposed so.
    """
    specs = _specs(model, plan)
    wanted = {
        name: {rank_name(rank): rank} for name, rank in plan.ranks.items() if rank is not None
    }
    built = build_candidates(model, specs, wanted, calibration, method)
    compressed = copy_of(model)
    replace_modules(compressed, {name: next(iter(row.values())) for name, row in built.items()})
    return compressed


def restructure(model: nn.Module, plan: RankPlan) -> nn.Module:
    """A copy of ``model`` with the plan's layers in place and random weights in them: what a state dict is loaded into."""
    specs = _specs(model, plan)
    compressed = copy_of(model)
    replace_modules(
        compressed,
        {name: specs[name].build(rank) for name, rank in plan.ranks.items() if rank is not None},
    )
    return compressed


def _specs(model: nn.Module, plan: RankPlan) -> dict[str, LayerSpec]:
    modules = dict(model.named_modules())
    specs = {}
    for name, rank in plan.ranks.items():
        if not name or name not in modules:
            raise ValueError(f"the plan's layer {name!r} is not in {type(model).__name__}")
        try:
            specs[name] = spec = LayerSpec.of(name, modules[name])
        except TypeError as error:
            raise ValueError(f"the plan's layer {error}") from None
        try:
            spec.check_rank(rank)
        except ValueError as error:
            raise ValueError(f"the plan's {error}") from None
    return specs
