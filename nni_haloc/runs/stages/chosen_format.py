"""Settle a run's memory format ``auto``: by measurement once, and by what it left on a resume."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

from nni_haloc.costs.from_settings import latency_input, runtime_of, with_known_format
from nni_haloc.costs.table import CostTable
from nni_haloc.inputs.options import MemoryFormat
from nni_haloc.plan.budget import Limit
from nni_haloc.plan.rules.problem import Problem
from nni_haloc.runs.job import Job, Made
from nni_haloc.runs.limits import keep_tables, make_limits
from nni_haloc.runs.memory_format import (
    Formats,
    formats_in,
    is_affected,
    judge_plan,
    judge_rule,
    time_formats,
)
from nni_haloc.runs.stages.by_rule import make_problem, rank_spaces
from nni_haloc.runs.stages.given_plan import RULE, fit_plan
from nni_haloc.training import checkpoint
from nni_haloc.training.random_states import isolated_random_states
from nni_haloc.utils.errors import as_one_line
from nni_haloc.utils.log import logger

_SETTLED = ("runtime", "device", "dtype", "threads", "graph", "tf32", "input")
"""What a table of an earlier start must have in common with this one for its format to stay."""


def with_chosen_format(job: Job, resume: bool = False) -> Job:
    """Return the job in the memory format that its settings ask for.

    Of ``auto`` that is the one with the better plan within the same budget, by measurement. The
    original network is timed in both formats. Where it is far slower in one, the other is chosen;
    else the cost table is measured in both, and a plan made in each.

    Args:
        job: the run's settings, data, network and folder; `Job.active`.
        resume: keep the format that an interrupted run in the folder has chosen.

    Raises:
        SettingsError: if a table can't be measured.
    """
    if job.config.cost.memory_format != "auto":
        return job
    known = with_known_format(job.config).cost.memory_format  # of settings that `Job.at` was given
    if known != "auto":
        return job.in_format(known)
    if not is_affected(job.model) or job.example.dim() != 4:
        return job.in_format("contiguous")
    if resume and (kept := _kept(job)) is not None:
        logger.info("memory format: %s, as this run has chosen before", kept[0])
        return job.in_format(*kept)
    with as_one_line(), isolated_random_states():  # what follows is the same in a given format
        shape = tuple(latency_input(job.config, job.example).shape)
        runtimes = {each: runtime_of(job.config, each) for each in get_args(MemoryFormat)}
        formats = time_formats(job.model, shape, runtimes)
        if formats is None:
            return job.in_format("contiguous")
        if formats.is_far:
            return job.in_format(formats.chosen, formats)
        return _better(job, formats)


def _kept(job: Job) -> tuple[MemoryFormat, Formats | None] | None:
    """Return the format that an earlier start in the folder has chosen, and by what."""
    formats: Formats | None = None
    known: Any = None
    try:
        identity = CostTable.load(job.folder.costs).identity
    except (OSError, ValueError):
        identity = {}
    timing = job.timing
    if all(identity.get(key) == timing.get(key) for key in _SETTLED):
        formats, known = formats_in(identity), identity.get("memory_format")
    for training in (job.folder.searching, job.folder.finetuning):
        if training.checkpoint.exists():
            saved = checkpoint.read(training.checkpoint, checkpoint.REMEDY)["identity"]
            chosen = saved.get("cost.memory_format", "contiguous")
            return chosen, formats if known == chosen else None
    return None if formats is None else (known, formats)


def _better(job: Job, formats: Formats) -> Job:
    """Return the job in the format with the better plan, with the tables that were measured."""
    plan = None
    if job.config.rule == RULE:
        plan, _, allowed = fit_plan(job.config, job.model, job.example)
    else:
        allowed = rank_spaces(job.config)[0]
    order = sorted(get_args(MemoryFormat), key=lambda each: each != formats.faster)
    limits: dict[MemoryFormat, list[Limit]] = {}
    for each in order:
        own = job.in_format(each)
        logger.info("memory format: costs in %s", each)
        limits[each] = make_limits(own.config, own.model, job.example, allowed, job.folder, formats)
    if plan is not None:
        formats = judge_plan(formats, limits, plan)
        return job.in_format(formats.chosen, formats, Made(_told(formats, limits)))
    tables = [limit.costs for own in limits.values() for limit in own]
    pinned: list[str] = []

    def problem_within(own: Sequence[Limit]) -> Problem:
        problem, pinned[:] = make_problem(job, own, tables)
        return problem

    try:
        formats, problem = judge_rule(formats, limits, problem_within, job.config.rule)
    except ValueError:  # such as that no rank is faster in either format: the table shows it
        keep_tables(job.config, limits[order[0]], job.folder)
        raise
    chosen = _told(formats, limits)
    made = Made(chosen)
    if problem is not None and job.config.rule != "search":
        made = Made(chosen, (problem.within(chosen), pinned))
    return job.in_format(formats.chosen, formats, made)


def _told(formats: Formats, limits: dict[MemoryFormat, list[Limit]]) -> list[Limit]:
    """Return the limits of the chosen format; their latency table says what it was chosen by."""
    first, *others = limits[formats.chosen]
    return [replace(first, costs=formats.told(first.costs)), *others]
