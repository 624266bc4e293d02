"""Take the ranks of the settings' ``plan`` in the place of choosing them."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from typing import get_args

from torch import Tensor, nn

from nni_haloc.costs.from_settings import allowed_ranks_of
from nni_haloc.inputs.config import Config
from nni_haloc.inputs.options import Kind
from nni_haloc.plan.budget import Limit
from nni_haloc.plan.compression import compress, layer_specs
from nni_haloc.plan.known_layers import KnownLayers
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.runs.job import Job
from nni_haloc.runs.stages.promised import promised_plan
from nni_haloc.space.names import DENSE, Rank
from nni_haloc.space.ranks import AllowedRanks, Layers, find_layers
from nni_haloc.space.replaceable import LAYERS
from nni_haloc.utils.errors import SettingsError, as_one_line
from nni_haloc.utils.log import logger

RULE = "plan"
"""Value of the setting ``rule`` where the ranks are those of a file."""
_OTHERS = "not in the plan"


def given_plan(job: Job) -> tuple[RankPlan, nn.Module, KnownLayers]:
    """Return the plan that the settings name, its network, and what is known of its layers.

    A plan above a budget is a warning with the numbers: nothing is chosen that could keep it.

    Raises:
        SettingsError: if the plan does not fit the network, or a cost table lacks one of its ranks.
    """
    config, r = job.config, job.config.rank_space
    plan, layers, allowed = fit_plan(config, job.model, job.example)
    limits = job.limits(allowed)
    candidates = layers.candidates(allowed)
    for limit in limits:
        with as_one_line(where=f"plan: {config.plan}"):
            limit.costs.restrict(candidates)
    images = job.splits.images("plain", r.calibration_images, config.seed)
    method = None if r.decomposition == "auto" else r.decomposition
    with as_one_line(where=f"plan: {config.plan}"):
        network = compress(job.model, plan, images, method)
    chosen = promised_plan(
        job,
        limits,
        lambda limits: RankPlan(plan.ranks, _facts(config, plan, limits)),
        candidates,
        refusable=False,
    )
    known = KnownLayers.of(layers.specs, candidates, None, (), layers.left_alone)
    return chosen, network, known


def fit_plan(
    config: Config, model: nn.Module, example: Tensor
) -> tuple[RankPlan, Layers, AllowedRanks]:
    """Read the settings' plan, and check that it fits the network.

    Returns:
        The plan, its layers, and the rank space that has the plan alone.

    Raises:
        SettingsError: names the file, and what does not fit.
    """
    file = str(config.plan)
    where = f"plan: {file}"
    with as_one_line(where="plan"):
        plan = RankPlan.load(file)
    if not plan.ranks:
        raise SettingsError(f"{where}: expected layers and their ranks, found none")
    with as_one_line(where=where):
        layer_specs(model, plan)
        # Each layer of the plan is pinned by its name, in which nothing is a pattern.
        pins = {glob.escape(name): _pin(rank) for name, rank in plan.ranks.items()}
        others = [
            glob.escape(name)
            for name, module in model.named_modules()
            if isinstance(module, LAYERS) and name not in plan.ranks
        ]
        kinds: tuple[Kind, ...] = get_args(Kind)
        allowed = AllowedRanks(kinds=kinds, exclude=tuple(others), pin=pins)
        try:
            layers = find_layers(model, example, allowed)
        except ValueError as error:  # a layer that can't be replaced by others
            raise ValueError(str(error).removeprefix("pin: ")) from None
    reasons = _reasons(config, model, example, layers)
    return plan, Layers(layers.specs, reasons), allowed


def _pin(rank: Rank) -> tuple[int, ...] | str:
    return DENSE if rank is None else rank


def _reasons(config: Config, model: nn.Module, example: Tensor, layers: Layers) -> dict[str, str]:
    """Return why the layers that are not in the plan are not, as far as the settings say it."""
    alone = find_layers(model, example, allowed_ranks_of(config)).left_alone
    return {name: alone.get(name, _OTHERS) for name in layers.left_alone}


def _facts(config: Config, plan: RankPlan, limits: Sequence[Limit]) -> Mapping[str, object]:
    """Return how the plan was chosen, and what it costs; warn of a budget that it exceeds."""
    for limit in limits:
        if not limit.holds(plan.names):
            cost, budget = limit.costs.total(plan.names), limit.budget
            logger.warning(
                "plan: by the cost table it costs %.6g %s, %.2f times the budget of %.6g",
                cost,
                limit.costs.metric,
                cost / budget,
                budget,
            )
    first, *others = (limit.facts(plan.names) for limit in limits)
    changed = plan.chosen_by.get("changed", {}) if isinstance(plan.chosen_by, dict) else {}
    file = {"rule": RULE, "plan": config.plan, "changed": changed}
    return {**file, **first, "also": others, "seed": config.seed}
