"""Choose the memory format in which a network has the better plan within the same budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import numpy as np
import torch
from torch import nn

from nni_haloc.costs.device.runtime import Runtime
from nni_haloc.costs.table import CostTable
from nni_haloc.inputs.options import MemoryFormat
from nni_haloc.inputs.registries import RULES
from nni_haloc.plan.budget import Limit
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.plan.rules.problem import Problem
from nni_haloc.plan.rules.scored import error_knapsack, least_movement, squared_errors
from nni_haloc.runs.promise import Interval, time_rounds
from nni_haloc.space.modules import copy_of
from nni_haloc.space.ranks import macs
from nni_haloc.utils.errors import InfeasibleBudget, first_line
from nni_haloc.utils.files import is_number
from nni_haloc.utils.log import logger

FAR = 1.25
"""A format in which the original takes more than so many times as long gets no cost table."""
_UNSURE = 1.5
"""Ends of an interval that are further apart than this say little."""
MACS_KEPT = "share of the MACs kept"
_CHEAP = ("uniform", "energy", "alds", "vbmf")
"""Rules without a score of each candidate that are run for both formats."""
_SAME = 1e-6
"""Relative difference of two plans below which they count as equally good."""


@dataclass(frozen=True)
class Formats:
    """What is known of the memory formats of a network.

    Attributes:
        original_ms: the original network's latency in each format, timed in alternation. Their
            ratio is `times`.
        times: how many times as long it takes in the slower one.
        is_far: whether that is above `FAR` for certain.
        faster: the format in which it is faster. All shares of the original's latency refer to it,
            because the user has it for free.
        by: what tells which of two plans is the better one; empty where no two were made.
        objective: its value for the plan of each format; a format without one has no plan within
            the budget.
    """

    original_ms: Mapping[MemoryFormat, float]
    times: float
    is_far: bool
    faster: MemoryFormat
    by: str = ""
    objective: Mapping[MemoryFormat, float] = field(default_factory=dict)

    @property
    def chosen(self) -> MemoryFormat:
        """The format of the better plan; of two that are equally good the faster original's."""
        values = [self.objective.get(each) for each in get_args(MemoryFormat)]
        if self.is_far or not self.objective:
            return self.faster
        (slower,) = (each for each in get_args(MemoryFormat) if each != self.faster)
        own, other = self.objective.get(self.faster), self.objective.get(slower)
        if own is None or other is None:
            return slower if own is None else self.faster
        gain = other - own if self.by == MACS_KEPT else own - other
        return slower if gain > _SAME * max(abs(value or 0.0) for value in values) else self.faster

    def facts(self) -> dict[str, Any]:
        """Return what readers of tables, plans and figures are told."""
        facts = {"faster": self.faster, "times": self.times, "original_ms": dict(self.original_ms)}
        return {**facts, **({"by": self.by, "objective": dict(self.objective)} if self.by else {})}

    def told(self, table: CostTable) -> CostTable:
        """Return a table of one of the formats that says what is known of both.

        In the slower format its original is that of the faster one, by the ratio of the two as
        timed in alternation: tables are measured one after the other, on a machine that drifts.
        """
        facts = self.facts()
        if table.identity.get("memory_format") != self.faster:
            slow = table.elsewhere is None
            facts["original"] = table.original / self.times if slow else table.original
        return replace(table, identity={**table.identity, "formats": facts})

    @classmethod
    def of(cls, facts: Any) -> Formats | None:
        """Read what `facts` returned back; None for anything else."""
        known = get_args(MemoryFormat)
        if not isinstance(facts, Mapping) or facts.get("faster") not in known:
            return None
        times, objective = (facts.get(key, {}) for key in ("original_ms", "objective"))
        ratio: Any = facts.get("times")
        by = str(facts.get("by", ""))
        if not (_is_row(times, len(known)) and _is_row(objective) and is_number(ratio)):
            return None
        return cls(times, ratio, not by, facts["faster"], by, objective)

    def __str__(self) -> str:
        (slower,) = (each for each in get_args(MemoryFormat) if each != self.faster)
        text = (
            f"memory format: {self.chosen}; the original takes {self.original_ms[self.faster]:.4g} "
            f"ms in {self.faster}, {self.original_ms[slower]:.4g} ms in "
            f"{slower}, {self.times:.3g} times as much"
        )
        if not self.by:
            return f"{text}: no cost table was measured in {slower}"
        if not self.objective:
            return f"{text}; no plan keeps the budget in either format"
        plans = ", ".join(
            f"{each}: {self.objective[each]:.4g}" if each in self.objective else f"{each}: none"
            for each in (self.faster, slower)
        )
        return f"{text}; {self.by} of the plan within the budget: {plans}"


def _is_row(values: Any, least: int = 0) -> bool:
    """Tell whether values are numbers by memory format, as many as ``least``."""
    return (
        isinstance(values, Mapping)
        and least <= len(values)
        and set(values) <= set(get_args(MemoryFormat))
        and all(is_number(value) and value >= 0 for value in values.values())
    )


def formats_in(identity: Mapping[str, Any]) -> Formats | None:
    """Return what a cost table's identity says of the memory formats; None where it says none."""
    return Formats.of(identity.get("formats"))


def in_format(model: nn.Module, memory_format: MemoryFormat) -> nn.Module:
    """Return a copy of a network in a memory format."""
    layout = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    return copy_of(model).to(memory_format=layout[memory_format])


def laid_out(network: nn.Module, memory_format: str) -> nn.Module:
    """Put a network into channels-last format, if that is the one; else leave it as it is."""
    if memory_format == "channels_last":
        return network.to(memory_format=torch.channels_last)
    return network


def is_affected(model: nn.Module) -> bool:
    """Tell whether a network has kernels that a memory format concerns."""
    return any(parameter.dim() == 4 for parameter in model.parameters())


def time_formats(
    model: nn.Module, shape: tuple[int, ...], runtimes: Mapping[MemoryFormat, Runtime]
) -> Formats | None:
    """Time the original network in each memory format, in alternation.

    Args:
        model: the original network; it is left as it is.
        shape: of its input, batch included.
        runtimes: the runtime in each format.

    Returns:
        What is known of the two; None for a network that does not run in both, such as one that
        calls ``view`` on a convolution's output.
    """
    one, two = get_args(MemoryFormat)
    first, second = in_format(model, one), in_format(model, two)
    try:
        rounds = time_rounds(first, second, shape, runtimes[two], runtimes[one])
    except Exception as error:  # of the network's own code; one in both formats is told later
        reason = first_line(error)
        logger.info("memory format: %s; the network can't be timed in %s: %s", one, two, reason)
        return None
    share = Interval.of([b / a for a, b in rounds])
    # The ratio of two medians may differ from the median ratio where a machine is busy.
    middle = float(np.median([a for a, _ in rounds]))
    found: dict[MemoryFormat, float] = {one: middle, two: middle * share.middle}
    if share.high > _UNSURE * share.low:
        logger.warning(
            "memory format: the machine is too busy to tell how much faster the original is in one "
            "of them: in %s it takes %s times as long as in %s",
            two,
            share,
            one,
        )
    far = share.low > FAR or share.high < 1 / FAR
    larger = max(share.middle, 1 / share.middle)
    formats = Formats(found, larger, far, one if share.middle >= 1 else two)
    if far:
        logger.info("%s", formats)
    return formats


def fastest_original(
    model: nn.Module,
    runtime: Runtime,
    runtime_in: Callable[[MemoryFormat], Runtime],
    identity: Mapping[str, Any],
) -> tuple[nn.Module, Runtime]:
    """Return the original network in the memory format in which it is faster, and what times it.

    Args:
        model: the original network in the run's format.
        runtime: the runtime in the run's format.
        runtime_in: returns the runtime in a format.
        identity: of the run's cost table.
    """
    formats = formats_in(identity)
    if formats is None or formats.faster == runtime.identity().get("memory_format"):
        return model, runtime
    return in_format(model, formats.faster), runtime_in(formats.faster)


def with_formats(plan: RankPlan, identity: Mapping[str, Any]) -> RankPlan:
    """Return a plan whose facts say how its cost table's memory format was chosen, if it was."""
    formats = formats_in(identity)
    if formats is None:
        return plan
    facts = {"memory_format": identity.get("memory_format"), "formats": formats.facts()}
    return RankPlan(plan.ranks, {**plan.chosen_by, **facts})


def judge_plan(
    formats: Formats, limits: Mapping[MemoryFormat, Sequence[Limit]], plan: RankPlan
) -> Formats:
    """Judge a plan that is given by its latency in each format, as a share of the original's."""
    costs = {name: own[0].costs for name, own in limits.items()}
    shares = {name: table.total(plan.names) / table.original for name, table in costs.items()}
    return _judged(formats, "share of the original's latency", shares)


def judge_rule(
    formats: Formats,
    limits: Mapping[MemoryFormat, Sequence[Limit]],
    make_problem: Callable[[Sequence[Limit]], Problem],
    rule: str,
) -> tuple[Formats, Problem | None]:
    """Judge each format by the plan that a rule makes within its limits.

    The search, and rules that train or try networks, are paid for once: the knapsack of
    sensitivities, from which the search starts, stands in for them.

    Args:
        formats: the original's times.
        limits: the limits in each format.
        make_problem: makes the problem within some limits, of candidates that all tables have.
        rule: the rule, or ``search``.

    Returns:
        The formats with their plans' objectives, and the problem, with all that was found out of
        its candidates; None where no format has a plan within its limits.
    """
    problem, values, by = None, {}, ""
    for name, own in limits.items():
        try:
            problem = make_problem(own) if problem is None else problem.within(own)
            by, values[name] = _objective(problem, rule)
        except InfeasibleBudget:  # of both formats: whoever plans next says so
            continue
    return _judged(formats, by or "plans", values), problem


def _judged(formats: Formats, by: str, values: Mapping[MemoryFormat, float]) -> Formats:
    judged = replace(formats, by=by, objective=values)
    logger.info("%s", judged)
    return judged


def _objective(problem: Problem, rule: str) -> tuple[str, float]:
    """Return what a rule's plan is judged by, in words, and its value."""
    if rule == "error-knapsack":
        return "sum of squared errors", _sum(squared_errors(problem), error_knapsack(problem))
    if rule not in _CHEAP:
        return "sum of sensitivities", _sum(problem.evidence.added, least_movement(problem))
    choice = RULES[rule](problem)
    kept, whole = (
        sum(macs(problem.specs[layer], rank) for layer, rank in ranks.items())
        for ranks in (
            {layer: problem.candidates[layer][name] for layer, name in choice.items()},
            dict.fromkeys(choice),
        )
    )
    return MACS_KEPT, kept / whole


def _sum(losses: Mapping[str, Mapping[str, float]], choice: Mapping[str, str]) -> float:
    return sum(losses[layer][name] for layer, name in choice.items())
