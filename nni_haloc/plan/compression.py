"""Make a compressed network from a trained one and a plan."""

from __future__ import annotations

from torch import nn

from nni_haloc.inputs.options import Decomposition
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.space.candidates import build_candidates
from nni_haloc.space.frozen import keep_frozen, let_train
from nni_haloc.space.layers import LayerSpec
from nni_haloc.space.modules import Example, copy_of, replace_modules
from nni_haloc.space.names import rank_name
from nni_haloc.utils.wrapped import unwrapped


def compress(
    model: nn.Module,
    plan: RankPlan,
    calibration: Example | None = None,
    method: Decomposition | None = None,
) -> nn.Module:
    """Return a compressed copy of a trained network, decomposed afresh at the plan's ranks.

    For the weights that a search trained, see `Haloc.network`. Frozen parameters stay frozen, as in
    `RankSpace`.

    Args:
        model: the trained network; it is not changed.
        plan: the rank of each layer.
        calibration: images ``(N, ...)`` to decompose for, or a tuple or dict of inputs where the
            network takes several; without them the decomposition is by the weights.
        method: how layers are decomposed, see `build_candidates`.

    Returns:
        A network of plain `torch.nn` layers, independent of ``model``.

    Raises:
        ValueError: if the plan names a layer that the network does not have, or that can't be
            decomposed so.
    """
    model = unwrapped(model)
    specs = layer_specs(model, plan)
    wanted = {
        name: {rank_name(rank): rank} for name, rank in plan.ranks.items() if rank is not None
    }
    built = build_candidates(model, specs, wanted, calibration, method)
    compressed = copy_of(model)
    replace_modules(compressed, {name: next(iter(row.values())) for name, row in built.items()})
    let_train(compressed)
    return compressed


def restructure(model: nn.Module, plan: RankPlan) -> nn.Module:
    """Return a copy of a network with the plan's layers in place, to load a state dict into.

    Their weights are random.
    """
    model = unwrapped(model)
    specs, modules = layer_specs(model, plan), dict(model.named_modules())
    compressed, built = copy_of(model), {}
    for name, rank in plan.ranks.items():
        if rank is not None:
            built[name] = specs[name].build(rank)
            keep_frozen(built[name], modules[name])
    replace_modules(compressed, built)
    let_train(compressed, told=True)
    return compressed


def layer_specs(model: nn.Module, plan: RankPlan) -> dict[str, LayerSpec]:
    """Return the specifications of the plan's layers.

    Raises:
        ValueError: if the network does not have a layer, or it can't be decomposed so.
    """
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
