"""Ranks by a rule of thumb in the place of the search: the rest of a run is the same."""

from __future__ import annotations

import torch
from torch import nn

from nni_haloc.costs.from_settings import rules_of
from nni_haloc.costs.table import worthwhile
from nni_haloc.plan.compression import restructure
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.plan.rules import described, plan
from nni_haloc.plan.rules.problem import Problem
from nni_haloc.runs.identity import finetuning_identity
from nni_haloc.runs.job import Job
from nni_haloc.runs.limits import limits_of
from nni_haloc.search.multitrial import MultiTrial, run_multitrial
from nni_haloc.search.space import RankSpace
from nni_haloc.space.ranks import find_layers
from nni_haloc.space.summary import why_nothing
from nni_haloc.training import checkpoint
from nni_haloc.utils.errors import SettingsError, first_line, reason_of
from nni_haloc.utils.log import logger

EVERY_RANK = {"uniform", "energy", "alds", "vbmf", "error-knapsack", "learned"}
"""Rules that run no candidate: they see every rank where the settings leave the step open, so that they can use the whole budget."""

NNI_STRATEGIES: dict[str, MultiTrial] = {
    "nni-evolution": "regularized-evolution",
    "nni-random": "random",
}
"""Rules that are strategies of NNI's, to its name for them."""

TRIALS = 400
"""Networks that these try: in time about the sensitivities of all candidates (some 150 passes) and one epoch of the search, ResNet-20."""


def by_rule(job: Job, resume: bool = False) -> tuple[RankPlan, nn.Module]:
    """The plan of the settings' rule, and the network decomposed at its ranks. Leaves plan, network and cost tables in the job's folder.

    ``resume``: where the folder holds the state of a fine-tuning with these settings, its plan is read back.
    Raises `SettingsError` for settings that turn out not to fit, `UnusableCheckpoint` where that state is of others.
    """
    config, state = job.config, job.folder.finetuning.checkpoint
    if resume and state.exists():
        saved = {
            key: value
            for key, value in checkpoint.read(state)["identity"].items()
            if key != "ranks"
        }
        checkpoint.check_same(state, saved, finetuning_identity(config))
        try:
            found = RankPlan.load(job.folder.ranks)
            return found, restructure(job.model, found)
        except (OSError, ValueError) as error:
            raise SettingsError(
                f"{error}: there is a fine-tuning to go on with, but not its plan; start without --resume"
            ) from None
    try:
        problem = _problem(job)
        found, network = (
            _by_nni(job, problem)
            if config.rule in NNI_STRATEGIES
            else _by_thumb(problem, config.rule)
        )
    except (OSError, ValueError) as error:
        raise SettingsError(reason_of(error)) from None
    except (
        torch.linalg.LinAlgError
    ) as error:  # of a rule's own; those of the candidates name their layer
        raise SettingsError(
            f"rule: {config.rule}: a singular value decomposition failed ({first_line(error)})"
        ) from None
    fact = found.chosen_by
    logger.info(
        "plan of rule %s: cost %.6g of %.6g %s, budget %.6g",
        *(fact[k] for k in ("rule", "cost", "original_cost", "metric", "budget")),
    )
    if not (
        resume and job.holds(found)
    ):  # what is there may be fine-tuned already, and stages follow it
        job.folder.clear()
        job.save(network, found)
    return found, network


def _by_thumb(problem: Problem, rule: str) -> tuple[RankPlan, nn.Module]:
    found = plan(problem, rule)
    return found, problem.network(found.names)


def _by_nni(job: Job, problem: Problem) -> tuple[RankPlan, nn.Module]:
    """The network of least cross-entropy on the calibration images that a strategy of NNI's found in the search's rank space."""
    rule, costs = job.config.rule, [limit.costs for limit in problem.limits]
    space = RankSpace(
        job.model, job.example, costs, rules_of(job.config), problem.images, problem.decomposition
    )
    choice = run_multitrial(
        space,
        problem.limits,
        lambda network: -problem.loss(network),
        NNI_STRATEGIES[rule],
        TRIALS,
        problem.seed,
    )
    return described(problem, choice, rule), space.freeze(choice)


def _problem(job: Job) -> Problem:
    config, r = job.config, job.config.rank_space
    rules = rules_of(config, 1 if config.rule in EVERY_RANK else None)
    limits = limits_of(config, job.model, job.example, rules, job.folder)
    layers = find_layers(job.model, job.example, rules)
    found = layers.candidates(rules)
    if any(
        name not in limit.costs.costs.get(layer, {})
        for limit in limits
        for layer, row in found.items()
        for name in row
    ):
        logger.info("not every rank is in the cost table: the rule has the search's to choose from")
        found = layers.candidates(rules_of(config))
    candidates, dropped = worthwhile(
        found, [limit.costs for limit in limits], [name for name in found if rules.pins(name)]
    )
    if not candidates:
        raise ValueError(why_nothing(job.model, {**layers.left_alone, **dropped}))
    images, labels = job.splits.labelled("plain", r.calibration_images, config.seed)
    bf16 = config.search.precision == "bf16-mixed"
    method = None if r.decomposition == "auto" else r.decomposition
    return Problem(
        job.model,
        layers.specs,
        candidates,
        limits,
        images,
        labels,
        method,
        config.seed,
        job.loader("train", shuffle=True),
        bf16,
    )
