"""Eq. 6-9, one pure function each. Costs and the budget share one unit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from scipy.optimize import brentq, minimize, root
from torch import Tensor

_DEAREST = 1e4
"""The largest price of a budget's worth of cost: it leaves a candidate that costs 1 % of the budget more a probability of nothing."""

Schedule = Literal["constant", "linear", "cosine"]


def expected_cost(probs: Sequence[Tensor], costs: Sequence[Tensor], fixed: float = 0.0) -> Tensor:
    """Eq. (6), summed over the layers: ``fixed + sum_i sum_j p_ij cost_ij``, differentiable in the probabilities.

    ``probs`` and ``costs`` hold one vector of shape ``(candidates,)`` a layer; ``fixed`` is what is not searched.

    >>> float(expected_cost([torch.tensor([0.5, 0.5])], [torch.tensor([2.0, 4.0])], fixed=1.0))
    4.0
    """
    return torch.stack([(p * c).sum() for p, c in zip(probs, costs, strict=True)]).sum() + fixed


def probability_loss_paper(
    ce: Tensor, expected: Tensor, budget: float, eta: float = 1.0, theta: float = 1.0
) -> Tensor:
    """Eq. (7), the paper's form: ``CE * eta * (E / budget)^theta``. Nothing in it stops at the budget.

    ``eta`` scales the whole loss: under Adam it does nothing, under SGD it is a learning rate. ``theta`` weighs cost against accuracy.

    >>> float(probability_loss_paper(torch.tensor(2.0), torch.tensor(3.0), budget=1.5, theta=2.0))
    8.0
    """
    return ce * eta * (expected / budget) ** theta


def settle(
    logits: np.ndarray, sizes: Sequence[int], costs: np.ndarray, fixed: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Logits ``z - mu c`` whose expected cost, Eq. (6), is the budget, and the prices ``mu (limits,)``: the default search settles by it.

    ``logits (n,)``: those of all layers in a row, free of any price, ``sizes`` of them a layer. ``costs (limits, n)`` and ``fixed
    (limits,)`` are in units of each limit's budget, so that the largest expected cost comes out as 1. ``mu``, the price of a unit of cost,
    is the same in every layer: of all probabilities within the limits these are nearest to those of ``logits`` (in Kullback-Leibler
    divergence), and the prices are the multipliers: none for a limit with room to spare. Where no limit binds, the one nearest to it is
    given a negative price, until it does; where even the dearest network is within all of them, the logits are returned as they are.

    >>> z, mu = settle(np.zeros(2), [2], np.array([[0.5, 1.5]]), np.array([0.25]))
    >>> p = np.exp(z) / np.exp(z).sum()
    >>> round(float(p @ [0.5, 1.5]) + 0.25, 6)
    1.0
    """
    logits, starts = np.asarray(logits, dtype=float), np.cumsum([0, *sizes[:-1]])
    means = np.add.reduceat(costs, starts, axis=1) / sizes
    centred, least = costs - np.repeat(means, sizes, axis=1), fixed + means.sum(1)

    def dual(mu: np.ndarray) -> tuple[float, np.ndarray]:
        """Convex in the prices; its gradient is the room that each limit has."""
        z = logits - mu @ centred
        top = np.maximum.reduceat(z, starts)
        e = np.exp(z - np.repeat(top, sizes))
        sums = np.add.reduceat(e, starts)
        room = 1 - least - centred @ (e / np.repeat(sums, sizes))
        return float((np.log(sums) + top).sum() + mu @ (1 - least)), room

    def along(ray: np.ndarray) -> np.ndarray:
        """The prices on the way to ``ray`` at which a limit is just met, or the end of it."""
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
    result = values.copy()
    result[index] = some
    return result


def schedule(kind: Schedule, progress: float) -> float:
    """The share of lambda in force at ``progress``, 0 to 1, of the search: 1 throughout, or falling to 0, ``linear`` or as a ``cosine``.

    >>> [round(schedule("cosine", t), 3) for t in (0, 0.5, 1)]
    [1.0, 0.5, 0.0]
    """
    if kind == "constant":
        return 1.0
    return 1 - progress if kind == "linear" else (1 + math.cos(math.pi * progress)) / 2


def weight_loss(ce: Tensor, approach: Tensor, lam: float) -> Tensor:
    """Eq. (9): ``CE + lam * L_approach``.

    >>> float(weight_loss(torch.tensor(1.0), torch.tensor(4.0), lam=0.5))
    3.0
    """
    return ce + lam * approach
