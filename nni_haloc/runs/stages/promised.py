"""A run's plan keeps its latency budget in the runtime itself, or is refused before training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nni_haloc.costs.from_settings import latency_input, runtime_of
from nni_haloc.plan.budget import Limit
from nni_haloc.plan.compression import restructure
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.runs.job import Job
from nni_haloc.runs.memory_format import with_formats
from nni_haloc.runs.promise import Check, Rounds, keep_promise, time_rounds
from nni_haloc.runs.stages import clear
from nni_haloc.training.random_states import isolated_random_states
from nni_haloc.utils.errors import BudgetMissed
from nni_haloc.utils.log import logger
from nni_haloc.utils.processes import is_first, start_together


def promised_plan(
    job: Job,
    limits: Sequence[Limit],
    make_plan: Callable[[Sequence[Limit]], RankPlan],
    candidates: Mapping[str, Mapping[str, Any]],
    *,
    refusable: bool = True,
) -> RankPlan:
    """Make a run's plan such that its network, timed untrained, keeps the latency budget.

    Args:
        job: the run's settings, data, network and folder.
        limits: the run's limits.
        make_plan: chooses ranks within limits.
        candidates: layer name to the names of its candidates.
        refusable: whether a plan that misses its budget is refused where the settings say so.

    Returns:
        The plan; see `nni_haloc.runs.promise.keep_promise`.

    Raises:
        BudgetMissed: if its network misses the budget for certain; the plan is then in the folder.
        InfeasibleBudget: if no network is within the limits by their tables.
    """
    check: Check = job.config.budget.check
    trainer = job.config.trainer
    if check != "skip" and (trainer.devices * trainer.num_nodes > 1 or start_together()):
        logger.info("budget.check: the planned network is not timed where several processes train")
        check = "skip"
    if check == "refuse" and not refusable:
        check = "warn"
    shape = tuple(latency_input(job.config, job.example).shape)
    costs = limits[0].costs.identity

    def clock(plan: RankPlan) -> Rounds:
        with isolated_random_states():  # what follows is the same where nothing is timed
            planned = job.laid_out(restructure(job.model, plan))
            original, other = job.fastest_original(costs)
            return time_rounds(original, planned, shape, runtime_of(job.config), other)

    def make(limits: Sequence[Limit]) -> RankPlan:
        return with_formats(make_plan(limits), costs)

    where = f", and the plan is in {job.folder.ranks}"
    try:
        return keep_promise(limits, make, candidates, clock, job.device, check, where)
    except BudgetMissed as error:
        if is_first():
            clear(job.folder)
            error.plan.save(job.folder.ranks)
        raise
