"""What the finished network really takes of a budget in a metric that is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from nni_haloc.costs.device.costs_file import MEASURED
from nni_haloc.runs.folder import Figures
from nni_haloc.utils.errors import HalocError, reason_of
from nni_haloc.utils.log import logger
from nni_haloc.utils.printing import percent

OF_BUDGET = {metric: f"{metric}_of_budget" for metric in MEASURED}
"""The figure of each measured metric: the network's measured cost, divided by the budget.

A latency budget that is a fraction is that much of the original's, timed beside the network's.
"""
TOLERANCE = 1.03
"""Up to this share of it the budget counts as met: two measurements of one network differ so."""


def measured_of_budget(
    limits: Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]],
    device: str,
    measure: Callable[[str], float],
    original: Mapping[str, float] | None = None,
) -> Figures:
    """Measure the finished network in the metric of each limit; divide by the budget.

    A budget is kept by the cost table, which may be wrong: then these are the figures that say so.
    A fraction is taken of the original's cost as it was measured beside the network's, since the
    table's milliseconds are of another moment; without such a measurement, of the table's. Above
    1.03 it is a warning. A limit of another device can't be looked at here: no figure.

    Args:
        limits: what a plan says of each limit (`nni_haloc.plan.budget.Limit.facts`), with its
            ``fraction`` where the budget is one of the original's cost, and the identity of the
            limit's cost table.
        device: this device, by the name that identities have for it.
        measure: returns the finished network's cost in a metric, for the batch of the tables.
        original: the original's cost by metric, as far as it was measured beside the network's.

    Returns:
        ``latency_ms_of_budget``, ``energy_mj_of_budget``, as far as there are such limits: 1 is the
        budget itself. Of two limits in one metric it is the larger one. ``measured_share``, the
        network's latency over the original's, where a limit is one of latency; and ``budget_met``,
        1 if none of these shares of a budget is above 1.03, else 0.
    """
    shares: Figures = {}
    for facts, identity in limits:
        metric, budget = facts.get("metric"), facts.get("budget")
        if metric not in MEASURED or not budget:
            continue
        if identity.get("device", device) != device:
            logger.info("%s: the budget is one of another device, %s", metric, identity["device"])
            continue
        try:
            cost = measure(metric)
        except (HalocError, ValueError, RuntimeError) as error:
            logger.warning("%s: the network can't be measured here: %s", metric, reason_of(error))
            continue
        key = OF_BUDGET[metric]
        beside, fraction = (original or {}).get(metric), facts.get("fraction")
        asked = fraction * beside if beside and fraction is not None else budget
        if cost > TOLERANCE * asked:
            _warn(metric, cost, asked, facts)
        if beside and metric == "latency_ms":
            shares["measured_share"] = cost / beside
        shares[key] = max(cost / asked, shares.get(key, 0.0))
    measured = [share for key, share in shares.items() if key in OF_BUDGET.values()]
    return {**shares, "budget_met": float(max(measured) <= TOLERANCE)} if measured else shares


def missed_budgets(stages: Mapping[str, Figures]) -> list[str]:
    """Say of each measured budget that a finished network is above it, for the run's report.

    Args:
        stages: stage to its figures, as ``metrics.json`` has them.
    """
    return [
        f"the network takes {percent(figures[key])} of its budget of {metric}, measured at the "
        f"end; up to {percent(TOLERANCE, 0)} counts as met"
        for figures in stages.values()
        for metric, key in OF_BUDGET.items()
        if figures.get(key, 0.0) > TOLERANCE
    ]


def _warn(metric: str, cost: float, asked: float, facts: Mapping[str, Any]) -> None:
    unit, fraction = MEASURED[metric], facts.get("fraction")
    if fraction is None or asked == facts["budget"]:
        of = f"its budget of {asked:.4g} {unit}"
    else:
        of = f"its budget, {percent(fraction)} of the original's {asked / fraction:.4g} {unit}"
    logger.warning(
        "%s: the compressed network takes %.4g %s, %.2f times %s; by the cost table it is %.4g of "
        "%.4g %s. Measure the table on an idle machine, in more rounds (haloc measure), or lower "
        "the budget",
        metric,
        cost,
        unit,
        cost / asked,
        of,
        facts.get("cost", float("nan")),
        facts["budget"],
        unit,
    )
