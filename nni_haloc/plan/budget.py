"""Choose candidates by their score without exceeding a budget, Eq. (5)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from nni_haloc.costs.device.costs_file import amount
from nni_haloc.costs.table import CostTable
from nni_haloc.space.summary import by_reason
from nni_haloc.utils.errors import InfeasibleBudget
from nni_haloc.utils.quiet import without_prints

_ROOM = 1e4
"""Each limit's slack is rescaled to this, and the scores' spread likewise.

HiGHS's absolute tolerance of 1e-6 is then 1e-10 of the slack.
"""

_NEARLY = 1e-8
"""Share of a budget by which a choice may miss the floor.

Costs are sums, and a budget may be the very cost of a choice.
"""

_NODES = 10_000
"""Nodes of HiGHS's tree, after which the best choice so far is taken.

Where scores are costs in disguise, the proof alone takes hours.
"""

_FEASIBILITY_NODES = 1_000_000
"""Nodes where several limits may exclude each other; the first choice within them is enough."""

_INFEASIBLE = 2
"""scipy's status of a proof that there is no solution. That of a limit of nodes is 4, not 1."""

_CUTS = 8
"""Choices just above a limit that are cut off one by one.

After them the slack is tightened, which may cut off what just fits, too.
"""

_CORE = 300
"""Candidates that lie nearest to the bound, of which a good choice is made first."""
_HALVINGS, _DEAREST = 60, 1e30
"""How often the interval of prices is halved; the largest price, times the slack."""

Choice = dict[str, str]
"""Layer to candidate."""
Scores = Mapping[str, Mapping[str, float]]
Candidates = Mapping[str, Iterable[str]]


class UndecidedBudget(InfeasibleBudget):
    """The solver has found no network within the limits, and no proof that there is none."""


@dataclass(frozen=True)
class Limit:
    """The most that the whole network may cost in one table.

    Attributes:
        costs: the table.
        budget: the limit, in the table's unit.
        fraction: the limit as a fraction of the original's cost, where it was given as one.
    """

    costs: CostTable
    budget: float
    fraction: float | None = None

    @classmethod
    def of(
        cls,
        costs: CostTable,
        fraction: float | None = None,
        absolute: float | None = None,
        name: str = "budget_absolute",
    ) -> Limit:
        """Return the limit for a budget that is given in one of two ways.

        Args:
            costs: table of what each candidate costs.
            fraction: the budget as a fraction of the original's cost, above 0 to 1.
            absolute: the budget in the table's unit.
            name: what the caller's users call ``absolute``, for the message.

        Returns:
            The limit, in the table's unit.

        Raises:
            ValueError: unless exactly one of the two is given, and in its range.
        """
        if fraction is not None and absolute is None:
            if not 0 < fraction <= 1:
                raise ValueError(
                    "budget: expected a fraction of the original's cost, above 0 to 1, found"
                    f" {fraction}; for a number of {costs.metric} use {name}"
                )
            return cls(costs, fraction * costs.original, fraction)
        if absolute is not None and fraction is None:
            if not 0 < absolute < math.inf:
                raise ValueError(
                    f"{name}: expected a number of {costs.metric} above 0, found {absolute}"
                )
            return cls(costs, absolute)
        raise ValueError(
            "expected either budget, a fraction of the original's cost, or"
            f" {name}, a number of {costs.metric}"
        )

    def holds(self, choice: Mapping[str, str]) -> bool:
        """Tell whether a choice is within the limit, by its exact cost.

        Args:
            choice: layer name to candidate name; other layers are dense.
        """
        return self.costs.total(choice) <= self.budget

    def facts(self, choice: Mapping[str, str]) -> dict[str, Any]:
        """Return what a choice costs, for the reader of a plan.

        Args:
            choice: layer name to candidate name; other layers are dense.

        Returns:
            ``metric``; ``budget``, ``cost`` and ``original_cost``, in the table's unit.
        """
        return {
            "metric": self.costs.metric,
            "budget": self.budget,
            "cost": self.costs.total(choice),
            "original_cost": self.costs.original,
        }

    def __str__(self) -> str:
        return amount(self.budget, self.costs.metric)


def cheapest(candidates: Candidates, costs: CostTable) -> Choice:
    """Return the choice that costs least in one table."""
    return {
        layer: min(names, key=costs.costs[layer].__getitem__) for layer, names in candidates.items()
    }


def check_feasible(
    candidates: Candidates, limits: Sequence[Limit], left_alone: Mapping[str, str] | None = None
) -> Choice:
    """Return a choice within every limit, or raise.

    Args:
        candidates: layer name to the names of its candidates.
        limits: what the whole network may cost; every one holds.
        left_alone: name of each other layer to the reason, for the message.

    Raises:
        InfeasibleBudget: if there is none; the message names a limit that can't be met, by itself
            or beside those before it, and the share of the cost that no candidate changes.
        UndecidedBudget: if the solver cannot decide (several tight limits and very many layers).
    """
    for i, limit in enumerate(limits):
        _refuse_unless_met(limit, cheapest(candidates, limit.costs), "", left_alone, i == 0)
    choice = cheapest(candidates, limits[0].costs)
    for i, limit in enumerate(limits):
        if not limit.holds(choice):
            cheap = {
                layer: {name: -limit.costs.costs[layer][name] for name in names}
                for layer, names in candidates.items()
            }
            before = " and ".join(map(str, limits[:i]))
            within = _within(cheap, limits[: i + 1]) or _best_if_known(cheap, limits[:i])
            if within is None:
                kept = _kept_as_it_is(limit, cheapest(candidates, limit.costs), left_alone)
                raise InfeasibleBudget(f"budget: no network is within {before} and {limit}{kept}")
            choice = within
            _refuse_unless_met(limit, choice, f" within {before}", left_alone)
    return choice


def choose(
    scores: Scores,
    limits: Sequence[Limit],
    use: float = 0.0,
    left_alone: Mapping[str, str] | None = None,
) -> Choice:
    """Choose the candidates with the highest total score within every limit, Eq. (5).

    This is a multiple-choice knapsack with one constraint for each limit, solved by HiGHS. Because
    its constraints hold only to a tolerance, costs are recomputed exactly and a choice that does
    not fit, or uses too little, is cut off. When its nodes are used up, the best choice so far is
    taken; if there is none, that of `check_feasible`.

    Args:
        scores: layer to candidate to a finite number; the candidates are those that it names.
        limits: what the whole network may cost; every one holds.
        use: take the best of the choices that use at least this fraction, 0 to 1, of what one of
            the budgets leaves above its cheapest network; where there are none, twice as much may
            be left unused, and so on.
        left_alone: see `check_feasible`.

    Raises:
        InfeasibleBudget: see `check_feasible`.
        ValueError: if a score is not finite.
    """
    for layer, row in scores.items():
        for candidate, score in row.items():
            if not math.isfinite(score):
                raise ValueError(
                    f"score of layer {layer!r}, candidate {candidate!r}:"
                    f" expected a finite number, found {score}"
                )
    fitting = check_feasible(scores, limits, left_alone)
    # Where the best of all choices uses enough, no floor is needed, and without a floor nothing
    # that costs as much as a better candidate is: of every pair of ranks, a few are left.
    best = _best_if_known(_worth_trying(_undominated(scores, limits), limits), limits)
    if best is not None and (use <= 0 or any(_uses(best, scores, x) >= use for x in limits)):
        return best
    choices: list[Choice] = []
    while use > 0 and not choices:
        choices = [
            choice for limit in limits if (choice := _best_if_known(scores, limits, (limit, use)))
        ]
        use = min(2 * use - 1, use - 0.01)
    return max(
        choices or [_best_if_known(scores, limits) or fitting],
        key=lambda choice: math.fsum(
            scores[layer][candidate] for layer, candidate in choice.items()
        ),
    )


def choose_least(
    losses: Scores,
    limits: Sequence[Limit],
    use: float = 0.0,
    left_alone: Mapping[str, str] | None = None,
) -> Choice:
    """Choose the candidates with the lowest total loss within every limit; see `choose`."""
    scores = {layer: {name: -loss for name, loss in row.items()} for layer, row in losses.items()}
    return choose(scores, limits, use, left_alone)


def _undominated(scores: Scores, limits: Sequence[Limit]) -> dict[str, dict[str, float]]:
    """Leave out each candidate that another one of its layer is as good as, at no higher cost."""
    kept: dict[str, dict[str, float]] = {}
    for layer, row in scores.items():
        names = list(row)
        costs = np.array([[limit.costs.costs[layer][name] for name in names] for limit in limits])
        score = np.array([row[name] for name in names])
        order = np.lexsort((*costs, -score))  # the best first, of equals the cheapest
        if len(limits) == 1:  # of every pair of ranks there are tens of thousands
            least = np.minimum.accumulate(costs[0, order])
            left = order[costs[0, order] < np.concatenate([[np.inf], least[:-1]])].tolist()
            kept[layer] = {names[i]: row[names[i]] for i in sorted(left)}
            continue
        left = []
        best = np.empty((len(limits), 0))  # the costs of those that are left
        for i in order:
            own = costs[:, [i]]
            if not (best <= own).all(0).any():
                left.append(int(i))
                best = np.hstack([best[:, ~(own <= best).all(0)], own])
        kept[layer] = {names[i]: row[names[i]] for i in sorted(left)}
    return kept


def _worth_trying(scores: Scores, limits: Sequence[Limit]) -> Scores:
    """Leave out each candidate that no best choice within one limit can have.

    With a price on the cost the layers are chosen one by one, and what they gain, less what they
    pay, plus the price of the whole slack, is an upper bound of every choice within the limit
    (Lagrange). A candidate that is further behind its layer's best than this bound is above a
    choice that is known is in no better one. Of every pair of ranks, some hundred are left.
    """
    if len(limits) != 1 or not scores:
        return scores
    limit = limits[0]
    least = cheapest(scores, limit.costs)
    costs = limit.costs.costs
    gains = {layer: np.array(list(row.values())) for layer, row in scores.items()}
    excess = {
        layer: np.array([costs[layer][name] for name in row]) - costs[layer][least[layer]]
        for layer, row in scores.items()
    }
    slack = _slack(limit, least)
    bound, price, held = _bound(gains, excess, slack)
    if not held:
        return scores
    behind = {layer: gains[layer] - price * excess[layer] for layer in gains}
    behind = {layer: values.max() - values for layer, values in behind.items()}

    def within(room: float) -> dict[str, dict[str, float]]:
        return {
            layer: {
                name: gain
                for (i, (name, gain)) in enumerate(row.items())
                if behind[layer][i] <= room or i == held[layer]
            }
            for layer, row in scores.items()
        }

    known = _sum(gains, held)
    every = np.sort(np.concatenate(list(behind.values())))
    if len(every) > _CORE and every[_CORE] < bound - known:  # a better choice leaves fewer
        choice = _best_if_known(within(float(every[_CORE])), limits)
        if choice is not None:
            known = max(known, math.fsum(scores[x][name] for x, name in choice.items()))
    spread = math.fsum(np.ptp(values) for values in gains.values())
    return within(bound - known + _NEARLY * (spread + abs(bound)))


def _bound(
    gains: Mapping[str, np.ndarray], excess: Mapping[str, np.ndarray], slack: float
) -> tuple[float, float, dict[str, int]]:
    """Return the least bound that a price gives, that price, and a choice within the slack.

    Args:
        gains: layer to the scores of its candidates.
        excess: layer to their costs above the cheapest one's.
        slack: what the excesses may sum to.
    """

    def priced(price: float) -> tuple[float, dict[str, int]]:
        taken = {layer: int(np.argmax(gains[layer] - price * excess[layer])) for layer in gains}
        values = (gains[layer][i] - price * excess[layer][i] for layer, i in taken.items())
        return math.fsum([price * slack, *values]), taken

    low, high = 0.0, 1.0 / slack
    while _sum(excess, priced(high)[1]) > slack and high < _DEAREST / slack:
        high *= 4
    bounds: list[tuple[float, float]] = []
    held: dict[str, int] = {}
    for _ in range(_HALVINGS):
        price = (low + high) / 2
        bound, taken = priced(price)
        bounds.append((bound, price))
        if _sum(excess, taken) > slack:
            low = price
        else:
            high = price
            filled = _filled(taken, gains, excess, slack)
            held = max(held or filled, filled, key=lambda each: _sum(gains, each))
    return *min(bounds), held


def _sum(values: Mapping[str, np.ndarray], taken: Mapping[str, int]) -> float:
    return math.fsum(values[layer][i] for layer, i in taken.items())


def _filled(
    taken: Mapping[str, int],
    gains: Mapping[str, np.ndarray],
    excess: Mapping[str, np.ndarray],
    slack: float,
) -> dict[str, int]:
    """Spend what a choice leaves of the slack, on one layer after another, where it gains most."""
    taken = dict(taken)
    while True:
        left = slack - _sum(excess, taken)
        best, gained = None, 0.0
        for layer, i in taken.items():
            fits = excess[layer] <= excess[layer][i] + left
            values = np.where(fits, gains[layer], -np.inf)
            at = int(np.argmax(values))
            if values[at] - gains[layer][i] > gained:
                best, gained = (layer, at), values[at] - gains[layer][i]
        if best is None:
            return taken
        taken[best[0]] = best[1]


def _uses(choice: Choice, candidates: Candidates, limit: Limit) -> float:
    """Return the fraction of what a budget leaves above its cheapest network that a choice uses."""
    least = limit.costs.total(cheapest(candidates, limit.costs))
    room = limit.budget - least
    return (limit.costs.total(choice) - least) / room if room > 0 else 1.0


def _within(scores: Scores, limits: Sequence[Limit]) -> Choice | None:
    """Return the best choice within the limits; any, if time runs out; None if there is none."""
    try:
        return _best(scores, limits)
    except UndecidedBudget:
        return _best(
            {layer: dict.fromkeys(row, 0.0) for layer, row in scores.items()},
            limits,
            nodes=_FEASIBILITY_NODES,
        )


def _best_if_known(
    scores: Scores, limits: Sequence[Limit], floor: tuple[Limit, float] | None = None
) -> Choice | None:
    """Return `_best`, or None where the solver can't tell."""
    try:
        return _best(scores, limits, floor)
    except UndecidedBudget:
        return None


def _best(
    scores: Scores,
    limits: Sequence[Limit],
    floor: tuple[Limit, float] | None = None,
    nodes: int | None = None,
) -> Choice | None:
    """Return the best choice within the limits, or None if there is none.

    Every limit must be met by its own cheapest choice.

    Args:
        scores: see `choose`.
        limits: see `choose`.
        floor: a limit and the fraction of its slack, above its cheapest network, that the choice
            must use.
        nodes: of HiGHS's tree; None is `_NODES`.

    Raises:
        UndecidedBudget: if the nodes do not suffice to find a choice.
    """
    least = [cheapest(scores, limit.costs) for limit in limits]
    # A candidate too dear even beside the cheapest of everything else is out, however little it
    # is: the rest is small against the slack.
    flat = [
        (layer, candidate)
        for layer, row in scores.items()
        for candidate in row
        if all(
            limit.holds({**low, layer: candidate}) for limit, low in zip(limits, least, strict=True)
        )
    ]
    if not flat:
        return None if scores else {}
    score = np.array([scores[layer][candidate] for layer, candidate in flat])
    index = {layer: i for i, layer in enumerate(scores)}
    one_each = np.zeros((len(index), len(flat)))
    one_each[[index[layer] for layer, _ in flat], range(len(flat))] = 1
    constraints = [LinearConstraint(one_each, 1, 1)]
    scale = np.array(
        [_slack(limit, choice) / _ROOM for limit, choice in zip(limits, least, strict=True)]
    )
    excess = np.array(
        [
            [
                limit.costs.costs[layer][name] - limit.costs.costs[layer][choice[layer]]
                for layer, name in flat
            ]
            for limit, choice in zip(limits, least, strict=True)
        ]
    )
    excess /= scale[:, None]
    budgets = np.array([limit.budget for limit in limits])
    room, low = np.full(len(limits), _ROOM), np.full(len(limits), -np.inf)
    floors = low.copy()  # the same in each table's unit
    for k, limit in enumerate(limits):
        if floor and limit is floor[0]:
            low[k] = floor[1] * _ROOM - _NEARLY * limit.budget / scale[k]
            floors[k] = limit.costs.total(least[k]) + low[k] * scale[k]
    attempt = 0
    while True:
        with without_prints():
            result = milp(
                -(score - score.min()) / (float(np.ptp(score)) or 1.0) * _ROOM,
                constraints=[*constraints, LinearConstraint(excess, low, room)],
                integrality=np.ones(len(flat)),
                bounds=Bounds(0, 1),
                # With presolve, scipy 1.17 has called a choice optimal that was not.
                options={
                    "mip_rel_gap": 0,
                    "presolve": False,
                    "node_limit": _NODES if nodes is None else nodes,
                },
            )
        if result.x is None:
            # After more cuts it may be for the slack that was taken away.
            if result.status == _INFEASIBLE and attempt <= _CUTS:
                return None
            raise UndecidedBudget(
                f"budget: found no network within {' and '.join(map(str, limits))},"
                " which is no proof that there is none"
            )
        taken = result.x > 0.5
        choice = dict(flat[i] for i in np.flatnonzero(taken))
        costs = np.array([limit.costs.total(choice) for limit in limits])
        over, short = costs - budgets, floors - costs
        if (over <= 0).all() and (short <= 0).all():
            return choice
        constraints.append(LinearConstraint(taken[None].astype(float), -np.inf, len(index) - 1))
        attempt += 1
        if attempt > _CUTS:
            room -= np.where(over > 0, np.maximum(over / scale, 1e-9 * _ROOM), 0)
            low += np.where(short > 0, np.maximum(short / scale, 1e-9 * _ROOM), 0)


def _slack(limit: Limit, cheapest_choice: Choice) -> float:
    """Return how much more than the cheapest choice a network may cost; 1 if nothing."""
    # Half a unit in the last place more than the budget: a sum that rounds to the budget is within.
    rounding = math.ulp(limit.budget) / 2
    terms = limit.costs.terms(cheapest_choice)
    return math.fsum([limit.budget, rounding, *(-term for term in terms)]) or 1.0


def _refuse_unless_met(
    limit: Limit,
    cheapest_choice: Mapping[str, str],
    beside: str,
    left_alone: Mapping[str, str] | None,
    first: bool = False,
) -> None:
    """Raise `InfeasibleBudget` if a limit's cheapest choice is above it."""
    if not limit.holds(cheapest_choice):
        least = limit.costs.total(cheapest_choice)
        budget, cost = _told_apart(limit.budget, least, limit.costs.metric)
        share = f"{least / limit.costs.original:.3g}"
        doubt = "".join(f"; the table is doubtful: {each}" for each in limit.costs.doubts()[:1])
        raise InfeasibleBudget(
            f"budget: {budget} is below the cheapest network{beside}, {cost}"
            f", {share} of the original's{doubt}",
            f"{_remedy(limit, least)}{_kept_as_it_is(limit, cheapest_choice, left_alone)}",
            costs=limit.costs,
            least=least,
            first=first,
        )


def _told_apart(budget: float, least: float, metric: str) -> tuple[str, str]:
    """Write two costs with as many digits as tell them apart, three at least."""
    for digits in range(3, 18):
        texts = amount(budget, metric, digits), amount(least, metric, digits)
        if texts[0] != texts[1]:
            break
    return texts


def _remedy(limit: Limit, least: float) -> str:
    """Say which budget is enough, and what makes a latency's share of the layers larger."""
    original = limit.costs.original
    if limit.fraction is None:
        remedy = f"set absolute: {_rounded_up(least, 1.0, 3)} or more"
    elif least <= original:
        remedy = f"set {_rounded_up(least, original, 2)} or more"
    else:
        remedy = "no share will do: layers are pinned to ranks that cost more than the original"
    if limit.costs.metric == "latency_ms":
        known = limit.costs.identity
        best = "formats" in known or known.get("memory_format") == "channels_last"
        other = "" if best else ", memory_format channels_last"
        remedy += f", or a larger batch_size{other} (see docs: Meet a latency budget)"
    return remedy


def _kept_as_it_is(
    limit: Limit, cheapest_choice: Mapping[str, str], left_alone: Mapping[str, str] | None
) -> str:
    """Say which share of the original's cost no candidate changes, and why.

    Nothing is said where that is within the budget, and no half of the cheapest network's cost.
    """
    rest = limit.costs.restrict({layer: {} for layer in cheapest_choice})[1]
    if not left_alone or rest <= min(limit.budget, limit.costs.total(cheapest_choice) / 2):
        return ""
    share = f"{rest / limit.costs.original:.3g}"
    return f"; {share} of the original's stays as it is ({by_reason(left_alone)})"


def _rounded_up(cost: float, original: float, digits: int) -> str:
    """Return a cost as a multiple of another one, rounded up to a few digits.

    As a budget, it is accepted.
    """
    step = 10.0 ** (math.floor(math.log10(cost / original)) + 1 - digits)
    steps = math.ceil(cost / original / step)
    while float(text := f"{float(f'{steps * step:.{digits}g}'):.15g}") * original < cost:
        steps += 1
    return text
