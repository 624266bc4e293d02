"""Ranks by a rule of thumb in the place of the search: the rest of a run is the same."""

from __future__ import annotations

from torch import nn

from . import checkpoint
from .compression import RANKS_FILE, restructure
from .job import CHECKPOINT_FILE, FINETUNING_FOLDER, Job, clear, finetuning_identity
from .log import logger
from .predictors import worthwhile
from .ranks import RankPlan, find_layers
from .rules import Problem, plan
from .tables import limits_of, rank_rules
from .yaml_files import ConfigError

EVERY_RANK = {"uniform", "energy", "alds", "error-knapsack"}
"""Rules that run no candidate: they see every rank where the settings leave the step open, so that they can use the whole budget."""


def by_rule(job: Job, resume: bool = False) -> tuple[RankPlan, nn.Module]:
    """The plan of the settings' rule, and the network decomposed at its ranks. Leaves plan, network and cost tables in the job's folder.

    ``resume``: where the folder holds the state of a fine-tuning with these settings, its plan is read back.
    Raises `ConfigError` for settings that turn out not to fit.
    """
    config, state = job.config, job.folder / FINETUNING_FOLDER / CHECKPOINT_FILE
    if resume and state.exists():
        saved = dict(checkpoint.read(state)["identity"])
        saved.pop("ranks")
        if saved == finetuning_identity(config):
            found = RankPlan.load(job.folder / RANKS_FILE)
            return found, restructure(job.model, found)
        logger.info("%s was made with other settings: starting anew", state)
    try:
        problem = _problem(job)
        found = plan(problem, config.rule)
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from None
    clear(job.folder)
    fact = found.chosen_by
    logger.info(
        "plan of rule %s: cost %.6g of %.6g %s, budget %.6g", *(fact[k] for k in ("rule", "cost", "original_cost", "metric", "budget"))
    )
    network = problem.network(found.names)
    job.save(network, found)
    return found, network


def _problem(job: Job) -> Problem:
    config, r = job.config, job.config.rank_space
    rules = rank_rules(config, 1 if config.rule in EVERY_RANK else None)
    limits = limits_of(config, job.model, job.example, rules, job.folder)
    layers = find_layers(job.model, job.example, rules)
    found = layers.candidates(rules)
    candidates, _ = worthwhile(found, [limit.costs for limit in limits], [name for name in found if rules.pins(name)])
    images, labels = job.splits.labelled("plain", r.calibration_images, config.seed)
    method = None if r.decomposition == "auto" else r.decomposition
    return Problem(job.model, layers.specs, candidates, limits, images, labels, method, config.seed)
