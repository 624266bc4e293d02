"""The search's objective as pure functions, Eq. (6), (7) and (9), and settling at the budget."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import brentq, minimize, root
from torch import Tensor

from nni_haloc.inputs.options import LamSchedule

_DEAREST = 1e4
"""The largest price of a budget's worth of cost.

It leaves a candidate that costs 1 % of the budget more than another no probability.
"""


def expected_cost(probs: Sequence[Tensor], costs: Sequence[Tensor], fixed: float = 0.0) -> Tensor:
    """Compute the expected cost of the network, Eq. (6): ``fixed + sum_i sum_j p_ij cost_ij``.

    Args:
        probs: one vector ``(candidates,)`` for each layer.
        costs: likewise.
        fixed: cost of what is not searched, in the same unit.

    Returns:
        A scalar, differentiable in the probabilities.

    >>> float(expected_cost([torch.tensor([0.5, 0.5])], [torch.tensor([2.0, 4.0])], fixed=1.0))
    4.0
    """
    return torch.stack([(p * c).sum() for p, c in zip(probs, costs, strict=True)]).sum() + fixed


def probability_loss_paper(
    ce: Tensor, expected: Tensor, budget: float, eta: float = 1.0, theta: float = 1.0
) -> Tensor:
    """Compute the paper's loss of the probabilities, Eq. (7): ``CE * eta * (E / budget)^theta``.

    Nothing in it stops at the budget.

    Args:
        ce: cross-entropy, a scalar.
        expected: Eq. (6), a scalar in the budget's unit.
        budget: the limit on the whole network's cost.
        eta: scales the whole loss: under Adam it does nothing, under SGD it is a learning rate.
        theta: weighs cost against accuracy.

    >>> float(probability_loss_paper(torch.tensor(2.0), torch.tensor(3.0), budget=1.5, theta=2.0))
    8.0
    """
    return ce * eta * (expected / budget) ** theta


def settle(
    logits: np.ndarray, sizes: Sequence[int], costs: np.ndarray, fixed: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return logits ``z - mu c`` whose expected cost, Eq. (6), is the budget, and prices ``mu``.

    The price of a unit of cost is the same in every layer. Of all probabilities within the limits,
    these are nearest to those of ``logits`` (in Kullback-Leibler divergence), and the prices are
    the multipliers: none for a limit with room to spare. Where no limit binds, the one nearest to
    it is given a negative price, until it does; where even the dearest network is within all of
    them, the logits are returned as they are.

    Args:
        logits: those of all layers in a row, ``(n,)``, free of any price.
        sizes: number of candidates of each layer; they sum to ``n``.
        costs: the candidates' costs, ``(limits, n)``, in units of each limit's budget, so that the
            largest expected cost comes out as 1.
        fixed: cost of what is not searched, ``(limits,)``, in the same units.

    Returns:
        The settled logits ``(n,)`` and the prices ``(limits,)``.

    >>> z, mu = settle(np.zeros(2), [2], np.array([[0.5, 1.5]]), np.array([0.25]))
    >>> p = np.exp(z) / np.exp(z).sum()
    >>> round(float(p @ [0.5, 1.5]) + 0.25, 6)
    1.0
    """
    logits, starts = np.asarray(logits, dtype=float), np.cumsum([0, *sizes[:-1]])
    means = np.add.reduceat(costs, starts, axis=1) / sizes
    centred, least = costs - np.repeat(means, sizes, axis=1), fixed + means.sum(1)

    def dual(mu: np.ndarray) -> tuple[float, np.ndarray]:
        """Return a convex function of the prices and its gradient: the room in each limit."""
        z = logits - mu @ centred
        top = np.maximum.reduceat(z, starts)
        e = np.exp(z - np.repeat(top, sizes))
        sums = np.add.reduceat(e, starts)
        room = 1 - least - centred @ (e / np.repeat(sums, sizes))
        return float((np.log(sums) + top).sum() + mu @ (1 - least)), room

    def along(ray: np.ndarray) -> np.ndarray:
        """Return the prices on the way to ``ray`` at which a limit is just met, or its end."""
        here, there = (float(dual(mu)[1].min()) for mu in (none, ray))
        return ray * (
            brentq(lambda t: float(dual(t * ray)[1].min()), 0, 1, xtol=1e-14, rtol=1e-14)
            if here * there < 0
            else 1.0
        )

    none = np.zeros(len(costs))
    room = dual(none)[1]
    if room.min() > 0:
        ray = np.eye(len(costs))[int(np.argmin(room))] * -_DEAREST
        if dual(ray)[1].min() > -1e-6:  # the dearest network is within every limit
            return logits, none
        prices = along(ray)
    elif len(costs) == 1:
        prices = along(none + _DEAREST)
    else:
        prices = minimize(
            dual,
            none,
            jac=True,
            bounds=[(0, _DEAREST)] * len(costs),
            options={"gtol": 1e-9, "ftol": 1e-15, "maxls": 50},
        ).x
        paid = np.flatnonzero((prices > 1e-6) & (prices < _DEAREST))
        exact = root(lambda some: dual(_with(prices, paid, some))[1][paid], prices[paid])
        refined = _with(prices, paid, exact.x)
        if exact.success and refined.min() >= 0 and dual(refined)[1].min() > dual(prices)[1].min():
            prices = refined
    return logits - prices @ centred, prices


def _with(values: np.ndarray, index: np.ndarray, some: np.ndarray) -> np.ndarray:
    """Return a copy of the values with some of them replaced."""
    result = values.copy()
    result[index] = some
    return result


def schedule(kind: LamSchedule, progress: float) -> float:
    """Return the share of lambda in force at a point of the search.

    Args:
        kind: ``constant`` stays at 1; ``linear`` and ``cosine`` fall from 1 to 0.
        progress: the share of the search that is over, 0 to 1.

    >>> [round(schedule("cosine", t), 3) for t in (0, 0.5, 1)]
    [1.0, 0.5, 0.0]
    """
    if kind == "constant":
        return 1.0
    return 1 - progress if kind == "linear" else (1 + math.cos(math.pi * progress)) / 2


def weight_loss(ce: Tensor, approach: Tensor, lam: float) -> Tensor:
    """Compute the loss of the weights, Eq. (9): ``CE + lam * L_approach``.

    Args:
        ce: cross-entropy, a scalar.
        approach: what lambda weighs, Eq. (8), a scalar.
        lam: lambda.

    >>> float(weight_loss(torch.tensor(1.0), torch.tensor(4.0), lam=0.5))
    3.0
    """
    return ce + lam * approach
