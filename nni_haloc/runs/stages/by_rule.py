"""Choose ranks by a rule in the place of the search; the rest of a run is the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from nni_haloc.costs.from_settings import allowed_ranks_of
from nni_haloc.costs.table import CostTable, worthwhile
from nni_haloc.inputs.config import Config
from nni_haloc.plan.budget import Limit
from nni_haloc.plan.compression import restructure
from nni_haloc.plan.known_layers import KnownLayers
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.plan.rules import RULES, Problem, plan
from nni_haloc.runs.identity import check_training, finetuning_identity
from nni_haloc.runs.job import Job
from nni_haloc.runs.stages import clear
from nni_haloc.runs.stages.given_plan import RULE, given_plan
from nni_haloc.runs.stages.promised import promised_plan
from nni_haloc.runs.summary import cost_line
from nni_haloc.space.names import Rank
from nni_haloc.space.ranks import AllowedRanks, Layers, find_layers
from nni_haloc.space.summary import why_nothing
from nni_haloc.training import checkpoint
from nni_haloc.utils.errors import SettingsError, UnusableCheckpoint, as_one_line, first_line
from nni_haloc.utils.log import logger
from nni_haloc.utils.processes import is_first


def by_rule(job: Job, resume: bool = False) -> tuple[RankPlan, nn.Module]:
    """Choose ranks by the settings' rule, and decompose the network at them.

    Leaves plan, network and cost tables in the job's folder.

    Args:
        job: what to compress, and where to.
        resume: read the plan back where the folder holds the state of a fine-tuning with these
            settings.

    Returns:
        The plan and its network, not fine-tuned.

    Raises:
        SettingsError: for settings that turn out not to fit.
        UnusableCheckpoint: where the folder holds the state of other settings.
        BudgetMissed: where the plan's network, timed as a whole, misses its latency budget.
    """
    if resume and job.folder.finetuning.checkpoint.exists() and not _is_trained_otherwise(job):
        return _read_back(job)
    searched = job.folder.searching.checkpoint
    if resume and searched.exists():
        found = f"the folder holds a search, and the rule is {job.config.rule!r}"
        raise UnusableCheckpoint(
            f"{searched}: {found}; go on with 'rule: search' (--rule search), or use another --out"
        )
    rule = job.config.rule
    try:
        with as_one_line():
            chosen, network, known = given_plan(job) if rule == RULE else _choose(job)
    except torch.linalg.LinAlgError as error:  # a rule's own; a candidate's names its layer
        failed = f"a singular value decomposition failed ({first_line(error)})"
        raise SettingsError(f"rule: {rule}: {failed}") from None
    logger.info("%s: %s", rule, cost_line(chosen.chosen_by))
    # What is there may be fine-tuned already, and stages follow it.
    if not (resume and job.holds(chosen)):
        clear(job.folder)
        job.save(network, chosen)
    if is_first():
        known.save(job.folder.layers)
    return chosen, network


def _choose(job: Job) -> tuple[RankPlan, nn.Module, KnownLayers]:
    """Return the rule's plan, its network, and what is known of the layers."""
    problem, pinned = _problem(job)

    def make(limits: Sequence[Limit]) -> RankPlan:
        return plan(problem if limits is problem.limits else problem.within(limits), rule)

    rule = job.config.rule
    chosen = promised_plan(job, problem.limits, make, problem.candidates)
    known = KnownLayers.of(
        problem.specs, problem.candidates, problem.scores, pinned, problem.left_alone
    )
    return chosen, job.laid_out(problem.network(chosen.names)), known


def _is_trained_otherwise(job: Job) -> bool:
    """Tell whether the settings of the fine-tuning have changed, and no others.

    It starts anew then, from a network with the rule's own weights.
    """
    state = checkpoint.read(job.folder.finetuning.checkpoint, checkpoint.REMEDY)
    there, here = dict(state["identity"]), finetuning_identity(job.config)
    there.pop("ranks", None)
    try:
        check_training(job.folder.finetuning.checkpoint, {**state, "identity": there}, here)
    except UnusableCheckpoint:
        differ = {key for key in {**there, **here} if there.get(key) != here.get(key)}
        return differ <= {"finetune", "recalibration_batches"}
    return False


def _read_back(job: Job) -> tuple[RankPlan, nn.Module]:
    """Return the plan that a fine-tuning has begun with, and a network of its structure."""
    state = job.folder.finetuning.checkpoint
    saved = checkpoint.read(state, checkpoint.REMEDY)
    identity = {key: value for key, value in saved["identity"].items() if key != "ranks"}
    check_training(state, {**saved, "identity": identity}, finetuning_identity(job.config))
    try:
        chosen = RankPlan.load(job.folder.ranks)
        return chosen, job.laid_out(restructure(job.model, chosen))
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"{error}: the plan of this fine-tuning is missing or damaged; start without --resume"
        ) from None


def rank_spaces(config: Config) -> list[AllowedRanks]:
    """Return the rank spaces that the settings' rule may choose from, the widest first."""
    rule = None if config.rule == "search" else RULES[config.rule]
    every_rank, pairs = (getattr(rule, mark, False) for mark in ("every_rank", "pairs"))
    wide = {"every_rank": every_rank, "pairs": pairs}
    return [
        allowed_ranks_of(config, **options)
        for options in (wide, {"every_rank": every_rank}, {})
        if options is wide or rule is not None
    ]


def known_candidates(
    layers: Layers, spaces: Sequence[AllowedRanks], tables: Sequence[CostTable]
) -> dict[str, dict[str, Rank]]:
    """Return the candidates of the first rank space that all tables know; else of the last one.

    Args:
        layers: the layers of the first space.
        spaces: rank spaces, the widest first.
        tables: the cost tables of the run's limits.

    Returns:
        Layer name to candidate name to rank.
    """
    for allowed in spaces:
        candidates = layers.candidates(allowed)
        names = [(layer, name) for layer, row in candidates.items() for name in row]
        if all(name in table.costs.get(layer, {}) for table in tables for layer, name in names):
            break
    if allowed is not spaces[0]:
        logger.info("not every rank is in the cost table: the rule has fewer to choose from")
    return candidates


def _problem(job: Job) -> tuple[Problem, list[str]]:
    """Return what the rule chooses from, and the layers that are pinned."""
    if job.made is not None and job.made.problem is not None:
        job.limits(rank_spaces(job.config)[0])  # the tables go into the folder
        return job.made.problem
    limits = job.limits(rank_spaces(job.config)[0])
    return make_problem(job, limits, [limit.costs for limit in limits])


def make_problem(
    job: Job, limits: Sequence[Limit], tables: Sequence[CostTable]
) -> tuple[Problem, list[str]]:
    """Return what a rule chooses from: candidates, limits and calibration images.

    Args:
        job: the run's settings, data, network and folder.
        limits: what the whole network may cost.
        tables: a candidate that is cheaper than the dense layer in any of them is kept.

    Returns:
        The problem, and the layers that are pinned.
    """
    config, r = job.config, job.config.rank_space
    spaces = rank_spaces(config)
    allowed = spaces[0]
    layers = find_layers(job.model, job.example, allowed)
    every = known_candidates(layers, spaces, tables)
    pinned = [name for name in every if allowed.pins(name)]
    candidates, dropped = worthwhile(every, tables, pinned)
    left_alone = {**layers.left_alone, **dropped}
    if not candidates:
        raise ValueError(why_nothing(job.model, left_alone))
    images, labels = job.splits.labelled("plain", r.calibration_images, config.seed)
    bf16 = config.search.precision == "bf16-mixed"
    method = None if r.decomposition == "auto" else r.decomposition
    problem = Problem(
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
        left_alone,
    )
    return problem, pinned
