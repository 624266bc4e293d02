"""What the finished network really takes of a budget in a metric that is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from nni_haloc.costs.device.costs_file import MEASURED
from nni_haloc.runs.folder import Figures
from nni_haloc.utils.errors import HalocError, reason_of
from nni_haloc.utils.log import logger

OF_BUDGET = {metric: f"{metric}_of_budget" for metric in MEASURED}
"""The figure of each measured metric: the network's measured cost, divided by the budget."""
_MOST = 1.05
"""Above this the budget counts as not kept: two measurements of one network differ by less."""


def measured_of_budget(
    limits: Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]],
    device: str,
    measure: Callable[[str], float],
) -> Figures:
    """Measure the finished network in the metric of each limit; divide by the budget.

    A budget is kept by the cost table, which may be wrong: then this is the figure that says so. It
    is a warning above 1.05. A limit of another device can't be looked at here, and has no figure.

    Args:
        limits: what a plan says of each limit (`nni_haloc.plan.budget.Limit.facts`), and the
            identity of the limit's cost table.
        device: this device, by the name that identities have for it.
        measure: returns the finished network's cost in a metric, for the batch of the tables.

    Returns:
        ``latency_ms_of_budget``, ``energy_mj_of_budget``, as far as there are such limits: 1 is the
        budget itself. Of two limits in one metric it is the larger one.
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
        shares[key] = max(cost / budget, shares.get(key, 0.0))
        if cost > _MOST * budget:
            _warn(metric, cost, facts)
    return shares


def _warn(metric: str, cost: float, facts: Mapping[str, Any]) -> None:
    unit, budget = MEASURED[metric], facts["budget"]
    logger.warning(
        "%s: the compressed network takes %.4g %s, %.2f times its budget of %.4g %s; by the cost "
        "table it is %.4g %s. Measure the table on an idle machine, in more rounds "
        "(haloc measure), or lower the budget",
        metric,
        cost,
        unit,
        cost / budget,
        budget,
        unit,
        facts.get("cost", float("nan")),
        unit,
    )
