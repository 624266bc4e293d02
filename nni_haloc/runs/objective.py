"""What a tuner maximises, of a network's accuracy and its costs."""

from __future__ import annotations

from collections.abc import Mapping

from nni_haloc.inputs.schema.objective import Objective


def objective_value(
    objective: Objective,
    metric: float,
    costs: Mapping[str, float],
    original: Mapping[str, float],
) -> float:
    """Return the number that a tuner maximises.

    With ``x`` the cost over the limit, a ``limit`` gives ``metric`` where x is at most 1. Above, it
    is ``metric * x ** -strength`` (soft) or ``1 - x`` (hard). A ``sum`` adds up the metric and the
    costs' shares of the original's, each times its weight.

    Args:
        objective: the settings.
        metric: the task's metric, such as top-1 (0 to 1).
        costs: the network's ``latency_ms``, ``macs`` and ``params``, as far as they count.
        original: the same of the original network.

    Returns:
        The larger, the better.
    """
    if objective.kind == "limit":
        limit = objective.absolute
        if limit is None:
            limit = (objective.fraction or 1.0) * original[objective.cost]
        over = costs[objective.cost] / limit
        if over <= 1:
            return metric
        return metric * over**-objective.strength if objective.penalty == "soft" else 1 - over
    if objective.kind == "sum":
        values = {"metric": metric}
        values |= {cost: costs[cost] / original[cost] for cost in objective.costs}
        return sum(weight * values[name] for name, weight in objective.weights.items())
    return metric
