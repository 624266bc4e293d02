"""Keep a latency budget in the runtime itself: time the planned network before it is trained."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from scipy.stats import quantile_test
from torch import nn

from nni_haloc.costs.device.measure import time_together
from nni_haloc.costs.device.runtime import Runtime
from nni_haloc.costs.latency import forward_pass
from nni_haloc.costs.table import CostTable
from nni_haloc.plan.budget import Limit, cheapest
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.runs.kept import TOLERANCE
from nni_haloc.space.names import DENSE
from nni_haloc.utils.errors import BudgetMissed, InfeasibleBudget
from nni_haloc.utils.log import logger

Check = Literal["refuse", "warn", "skip"]
Rounds = Sequence[tuple[float, float]]
"""Milliseconds of the original and of the planned network in each round of a measurement."""
METRIC = "latency_ms"
_TRIES = 3
"""How often a plan that is over its budget, or leaves much of it, is made again."""
_AIM = 0.99
"""The share of a budget that a further plan is to take, where two were seen on either side."""
_LEAST_STEP = 0.5
"""The most by which a factor falls at once."""
_FEWEST, _MOST = 6, 30
"""Rounds of a measurement; from the fewest on it ends when the interval is narrow."""
_NARROW = 0.01
"""Half the width of an interval that is narrow enough, relative."""
_RUN_TIME = 0.02
"""Seconds for which each network runs in a round."""
_LONGEST = 60.0
"""Seconds after which a measurement ends, however wide its interval is."""
_CONFIDENCE = 0.95
_DRIFT = 1.25
"""Largest ratio of the original's latency to that of its table for which no warning is given."""


@dataclass(frozen=True)
class Interval:
    """A ratio that was measured in rounds, and its 95 % confidence interval."""

    middle: float
    low: float
    high: float

    @classmethod
    def of(cls, ratios: Sequence[float]) -> Interval:
        """Return the median of some ratios, and its interval, whatever their distribution is.

        On a busy machine a few rounds are far off, which moves a mean and widens its interval.

        Args:
            ratios: one of each round, above 0. Of fewer than six the interval is without bounds.
        """
        interval = quantile_test(ratios, p=0.5).confidence_interval(_CONFIDENCE)
        low, high = float(interval.low), float(interval.high)
        return cls(
            float(np.median(ratios)),
            low if math.isfinite(low) else 0.0,
            high if math.isfinite(high) else math.inf,
        )

    def __str__(self) -> str:
        return f"{self.middle:.3g} (95 % interval {self.low:.3g} to {self.high:.3g})"


@dataclass(frozen=True)
class Verdict:
    """What the measurement of a planned network says of one limit.

    Attributes:
        limit: as it was asked for.
        plan: the plan that was timed.
        share: the planned network's latency over the original's.
        of_budget: the planned network's latency over the budget; where that was given as a
            fraction of the original's, of the original as it was timed beside it.
        original: milliseconds of the original.
        planned: milliseconds of the planned network.
    """

    limit: Limit
    plan: RankPlan
    share: Interval
    of_budget: Interval
    original: float
    planned: float

    @classmethod
    def of(cls, limit: Limit, plan: RankPlan, rounds: Rounds) -> Verdict:
        """Judge a plan by the rounds in which it was timed beside the original."""
        shares = [planned / original for original, planned in rounds]
        if limit.fraction is not None:
            of_budget = [share / limit.fraction for share in shares]
        else:
            of_budget = [planned / limit.budget for _, planned in rounds]
        original, planned = (float(np.median(times)) for times in zip(*rounds, strict=True))
        found = Interval.of(shares), Interval.of(of_budget)
        return cls(limit, plan, *found, original, planned)

    @property
    def is_over(self) -> bool:
        """Whether the network is above its budget for certain."""
        return self.of_budget.low > 1

    @property
    def is_slower(self) -> bool:
        """Whether a network with low ranks is not faster than the original for certain.

        A budget above the original's own latency asks for no speed.
        """
        asked = self.limit.budget < self.original
        return asked and self.share.low >= 1 and not _is_dense(self.plan)

    @property
    def is_kept(self) -> bool:
        """Whether the network may be within its budget, and faster where that was asked for."""
        return not (self.is_over or self.is_slower)

    def leaves_some(self, factor: float) -> bool:
        """Tell whether the network is far below its budget because its table says too much.

        Args:
            factor: how many times their costs in the table the plan's low ranks were taken for.
        """
        return self.of_budget.high < 1 / TOLERANCE and self.factor() < factor

    @property
    def is_missed(self) -> bool:
        """Whether the budget is missed for certain, by more than measurements differ."""
        return self.is_slower or self.of_budget.low > TOLERANCE

    def factor(self) -> float:
        """Return the table's error: how many times its costs the plan's low ranks take.

        It is the one factor on these costs with which the table has the network's share as timed.
        """
        costs, names = self.limit.costs, self.plan.names
        low = math.fsum(costs.costs[x][name] for x, name in names.items() if name != DENSE)
        if not low:
            return 1.0
        return 1 + (self.share.middle * costs.original - costs.total(names)) / low

    def corrected(self, factor: float, candidates: Mapping[str, Mapping[str, Any]]) -> Limit:
        """Return the limit in a table whose low ranks cost ``factor`` times as much.

        Its budget is the one that was asked for; where no network is within it, that of the
        cheapest one.

        Args:
            factor: see `factor`.
            candidates: layer name to the names of its candidates.
        """
        costs = with_factor(self.limit.costs, factor)
        asked = self.share.middle / self.of_budget.middle * self.limit.costs.original
        return replace(
            self.limit, costs=costs, budget=max(asked, costs.total(cheapest(candidates, costs)))
        )

    def facts(self) -> dict[str, float]:
        """Return the figures for the reader of the plan."""
        return {
            "measured_share": self.share.middle,
            "low": self.share.low,
            "high": self.share.high,
            "of_budget": self.of_budget.middle,
            "original_ms": self.original,
            "planned_ms": self.planned,
        }

    def __str__(self) -> str:
        limit = self.limit
        budget = f"{limit.budget:.4g} ms"
        if limit.fraction is not None:
            budget = f"{limit.fraction:g} of the original's"
        return (
            f"the planned network takes {self.share} of the original's latency, {self.planned:.4g} "
            f"of {self.original:.4g} ms, and {self.of_budget.middle:.3g} times its budget of "
            f"{budget}; by the cost table it has "
            f"{limit.costs.total(self.plan.names) / limit.costs.original:.3g} of the original's"
        )


def keep_promise(
    limits: Sequence[Limit],
    make_plan: Callable[[Sequence[Limit]], RankPlan],
    candidates: Mapping[str, Mapping[str, Any]],
    clock: Callable[[RankPlan], Rounds],
    device: str,
    check: Check = "refuse",
    where: str = "",
) -> RankPlan:
    """Make a plan whose network, timed as a whole and not yet trained, keeps its latency budget.

    A plan that is over the budget is made again, three times at most, by a table that is corrected
    by its error so far: a factor on the costs of low ranks. So is one that is more than 3 % below
    the budget, if the table says too much: ranks can then be larger. Only what is certain counts,
    which is a confidence interval that is wholly above the budget, or below. Limits in other
    metrics, and of other devices, are left to their tables. A table that does not say its device is
    not trusted to be this one's: then nothing is refused.

    Args:
        limits: what the whole network may cost; every one holds.
        make_plan: chooses ranks within limits.
        candidates: layer name to the names of its candidates.
        clock: times a plan's network and the original in alternation.
        device: this device, by the name that cost tables have for it.
        check: what becomes of a plan that misses its budget: ``refuse``, ``warn``, or ``skip`` (no
            network is timed).
        where: says where the plan is kept, for the message of a refusal.

    Returns:
        The plan, with the budget as it was asked for. Where it was timed, ``timed`` in its facts
        has the figures.

    Raises:
        BudgetMissed: if its network misses the budget, or is not faster than the original, for
            certain; the error has the plan.
        InfeasibleBudget: if no network is within the limits by their tables.
    """
    plan = make_plan(limits)
    here = [i for i, limit in enumerate(limits) if _is_of(limit, device)]
    if check == "skip" or not here:
        return plan
    corrected, factors = list(limits), {i: _Factor() for i in here}
    tried: list[tuple[RankPlan, list[Verdict]]] = []
    while True:
        rounds = clock(plan)
        verdicts = [Verdict.of(limits[i], plan, rounds) for i in here]
        tried.append((_as_asked(plan, limits, verdicts[0], factors[here[0]].now), verdicts))
        for verdict in verdicts:
            logger.info("%s: %s", METRIC, verdict)
        looked = list(zip(here, verdicts, strict=True))
        kept = all(verdict.is_kept for verdict in verdicts)
        more = kept and all(verdict.leaves_some(factors[i].now) for i, verdict in looked)
        if len(tried) > _TRIES or (kept and not more):
            break
        for i, verdict in looked:
            if more or not verdict.is_kept:
                factors[i] = factors[i].after(verdict)
                corrected[i] = verdict.corrected(factors[i].now, candidates)
        try:
            again = make_plan(corrected)
        except InfeasibleBudget:  # together with the other limits
            break
        asked = min(each.share.middle / each.of_budget.middle for each in verdicts)
        if any(again.ranks == other.ranks for other, _ in tried) or (
            _is_dense(again) and asked < 1
        ):
            break
        logger.info(
            "%s: a plan that %s: low ranks take %.3g times their costs in the table",
            METRIC,
            "uses more of the budget" if more else "is cheaper",
            max(factor.now for factor in factors.values()),
        )
        plan = again
    plan, verdicts = _best(tried)
    _warn_of_drift(verdicts[0])
    for i, verdict in zip(here, verdicts, strict=True):
        known = limits[i].costs.identity.get("device") == device
        _tell(verdict, len(tried) - 1, plan, check if known else "warn", where)
    return plan


def time_rounds(
    original: nn.Module,
    planned: nn.Module,
    shape: tuple[int, ...],
    runtime: Runtime,
    other: Runtime | None = None,
) -> Rounds:
    """Time the planned network and the original in alternation until their ratio is known.

    It is known when its confidence interval is narrow; a busy machine may never get there.

    Args:
        original: the original network; it is left as it is.
        planned: the planned network, with any weights; likewise.
        shape: of the input, batch included.
        runtime: what runs them.
        other: what runs the original in its place: the same runtime in another memory format.

    Returns:
        Milliseconds of the two in each round.
    """
    rounds: list[tuple[float, float]] = []
    with runtime.pinned():
        runs = {
            "original": forward_pass(other or runtime, original, shape),
            "planned": forward_pass(runtime, planned, shape),
        }
        end = time.monotonic() + _LONGEST
        while len(rounds) < _FEWEST or (
            len(rounds) < _MOST and time.monotonic() < end and not _is_narrow(rounds)
        ):
            seconds = time_together(runs, runtime, _RUN_TIME)
            # A clock too coarse for a network gives 0.
            first, second = (max(1e3 * seconds[name], 1e-9) for name in runs)
            rounds.append((first, second))
    return rounds


@dataclass(frozen=True)
class _Factor:
    """How many times their costs in a table low ranks are taken for, and what was seen of others.

    Attributes:
        now: the factor of the next plan.
        over: the largest one of a plan that was over its budget, and that plan's share of it.
        kept: the smallest one of a plan that kept it, and that plan's share of it.
    """

    now: float = 1.0
    over: tuple[float, float] = (0.0, math.inf)
    kept: tuple[float, float] = (math.inf, 0.0)

    def after(self, verdict: Verdict) -> _Factor:
        """Return the factor for the next plan.

        At first it is the table's error as it was seen; between a factor that was too small and one
        that was too large it is where a straight line meets the budget.
        """
        over, kept = self.over, self.kept
        seen = self.now, max(verdict.of_budget.middle, 1.0 if verdict.is_slower else 0.0)
        if verdict.is_kept:
            kept = min(kept, seen)
        else:
            over = max(over, seen)
        found = verdict.factor()
        if over[0] and kept[1]:
            way = (over[1] - _AIM) / (over[1] - kept[1])
            found = over[0] + min(max(way, 0.1), 0.9) * (kept[0] - over[0])
        elif over[0]:
            found = max(found, over[0] * max(verdict.of_budget.middle, verdict.share.middle))
        else:  # where what is fixed is wrong, too, the error may even be below 0
            found = max(found, _LEAST_STEP * self.now)
        return _Factor(found, over, kept)


def _best(tried: Sequence[tuple[RankPlan, list[Verdict]]]) -> tuple[RankPlan, list[Verdict]]:
    """Return the plan that uses most of its budget; where none keeps it, the cheapest.

    One that was seen a little above its budget, which noise may be, comes after those within it.
    """

    def use(each: tuple[RankPlan, list[Verdict]]) -> float:
        return max(verdict.of_budget.middle for verdict in each[1])

    kept = [each for each in tried if all(v.is_kept for v in each[1])]
    within = [each for each in kept if use(each) <= 1 + _NARROW]
    return max(within, key=use) if within else min(kept or tried, key=use)


def _is_dense(plan: RankPlan) -> bool:
    """Tell whether a plan leaves the original network as it is."""
    return all(rank is None for rank in plan.ranks.values())


def _is_narrow(rounds: Rounds) -> bool:
    share = Interval.of([planned / original for original, planned in rounds])
    return share.high <= share.low * (1 + _NARROW) ** 2


def with_factor(table: CostTable, factor: float) -> CostTable:
    """Return a cost table whose low ranks cost ``factor`` times as much."""
    rows = {
        layer: {name: cost * (1.0 if name == DENSE else factor) for name, cost in row.items()}
        for layer, row in table.costs.items()
    }
    return replace(table, costs=rows)


def _is_of(limit: Limit, device: str) -> bool:
    """Tell whether a limit is of the latency of this device, as far as its table says one."""
    return limit.costs.metric == METRIC and limit.costs.identity.get("device", device) == device


def _as_asked(plan: RankPlan, limits: Sequence[Limit], verdict: Verdict, factor: float) -> RankPlan:
    """Return a plan with the facts of the limits that were asked for, and what was measured."""
    first, *others = (limit.facts(plan.names) for limit in limits)
    told = plan.chosen_by.get("also", [])
    facts = {
        **plan.chosen_by,
        **first,
        "also": [{**before, **now} for before, now in zip(told, others, strict=True)],
        "timed": {**verdict.facts(), "table_factor": factor},
    }
    return RankPlan(plan.ranks, facts)


def _warn_of_drift(verdict: Verdict) -> None:
    """Warn if the original now takes another time than the cost table says."""
    expected = verdict.limit.costs.original
    if not 1 / _DRIFT <= verdict.original / expected <= _DRIFT:
        logger.warning(
            "%s: the original network takes %.4g ms now, and %.4g ms by its cost table; the "
            "machine was, or is, busy, or the table is of another runtime: measure the table again "
            "on an idle machine (haloc measure)",
            METRIC,
            verdict.original,
            expected,
        )


def _tell(verdict: Verdict, tries: int, plan: RankPlan, check: Check, where: str) -> None:
    """Refuse a plan that misses its budget, or warn of it, or of a measurement that can't tell."""
    again = f" after {tries} further plan{'s' if tries > 1 else ''}" if tries else ""
    if verdict.is_missed:
        reason = "it is not faster than the original" if verdict.is_slower else "it is too slow"
        if check == "refuse":
            message = f"budget: {verdict}; {reason}{again}"
            kept = f"; nothing was trained{where}"
            remedy = (
                "; measure the cost table on an idle machine (haloc measure), raise the budget, "
                "search more layers (rank_space.kinds), or go on all the same with budget.check: "
                "warn"
            )
            raise BudgetMissed(message + kept + remedy, plan)
        logger.warning(
            "budget: the planned network takes %s times its budget; %s%s",
            verdict.of_budget,
            reason,
            again,
        )
    elif verdict.of_budget.middle > TOLERANCE:
        logger.warning(
            "budget: the planned network takes %s times its budget; the machine is too busy to "
            "tell whether it keeps the budget",
            verdict.of_budget,
        )
