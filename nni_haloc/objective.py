"""Eq. 6-9, one pure function each. Costs and the budget share one unit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor

_ROUNDS = 100

Schedule = Literal["constant", "linear", "cosine"]


def expected_cost(probs: Sequence[Tensor], costs: Sequence[Tensor], fixed: float = 0.0) -> Tensor:
    """Eq. (6), summed over the layers: ``fixed + sum_i sum_j p_ij cost_ij``, differentiable in the probabilities.

    ``probs`` and ``costs`` hold one vector of shape ``(candidates,)`` a layer; ``fixed`` is what is not searched.

    >>> float(expected_cost([torch.tensor([0.5, 0.5])], [torch.tensor([2.0, 4.0])], fixed=1.0))
    4.0
    """
    return torch.stack([(p * c).sum() for p, c in zip(probs, costs, strict=True)]).sum() + fixed


def probability_loss_paper(ce: Tensor, expected: Tensor, budget: float, eta: float = 1.0, theta: float = 1.0) -> Tensor:
    """Eq. (7), the paper's form: ``CE * eta * (E / budget)^theta``. Nothing in it stops at the budget.

    ``eta`` scales the whole loss: under Adam it does nothing, under SGD it is a learning rate. ``theta`` weighs cost against accuracy.

    >>> float(probability_loss_paper(torch.tensor(2.0), torch.tensor(3.0), budget=1.5, theta=2.0))
    8.0
    """
    return ce * eta * (expected / budget) ** theta


def settle(logits: np.ndarray, sizes: Sequence[int], costs: np.ndarray, fixed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits ``z - mu c`` whose expected cost, Eq. (6), is the budget, and the prices ``mu (limits,)``: the default search settles by it.

    ``logits (n,)``: those of all layers in a row, ``sizes`` of them a layer. ``costs (limits, n)`` and ``fixed (limits,)`` are in units of
    each limit's budget, so that the largest expected cost comes out as 1. ``mu``, the price of a unit of cost, is the same in every layer:
    of all probabilities with that expected cost these are nearest to the present ones (in Kullback-Leibler divergence). With several
    limits, prices are set one after the other until none is exceeded. Where even the dearest network is within all of them, the logits are
    returned as they are.

    >>> z, mu = settle(np.zeros(2), [2], np.array([[0.5, 1.5]]), np.array([0.25]))
    >>> p = np.exp(z) / np.exp(z).sum()
    >>> round(float(p @ [0.5, 1.5]) + 0.25, 6)
    1.0
    """
    starts = np.cumsum([0, *sizes[:-1]])

    def ratios(z: np.ndarray) -> np.ndarray:
        e = np.exp(z - np.repeat(np.maximum.reduceat(z, starts), sizes))
        return fixed + costs @ (e / np.repeat(np.add.reduceat(e, starts), sizes))

    z, prices = np.asarray(logits, dtype=float), np.zeros(len(costs))
    for _ in range(_ROUNDS):
        now = ratios(z)
        k = int(np.argmax(now))
        if abs(now[k] - 1) < 1e-9:
            break
        above = now[k] > 1
        direction = costs[k] - np.repeat(np.add.reduceat(costs[k], starts) / sizes, sizes)

        def excess(mu: float, z: np.ndarray = z, k: int = k, direction: np.ndarray = direction, above: bool = above) -> float:
            moved = ratios(z - mu * direction)
            return float(moved[k] if above else moved.max()) - 1

        far = 1.0 if above else -1.0
        while (excess(far) > 0) == above and abs(far) < 1e9:
            far *= 4
        if not above and excess(far) < 1e-6:  # the dearest network is within every limit
            break
        price = far if excess(far) > 0 and above else brentq(excess, 0, far)
        z, prices[k] = z - price * direction, prices[k] + price
    return z, prices


def approach_loss(outputs: Iterable[Tensor], targets: Iterable[Tensor]) -> Tensor:
    """Eq. (8): mean squared error between feature maps of the sampled candidates and of the original layers, summed over the layers.

    >>> float(approach_loss([torch.zeros(2, 2)], [torch.full((2, 2), 3.0)]))
    9.0
    """
    terms = [torch.nn.functional.mse_loss(y, t) for y, t in zip(outputs, targets, strict=True)]
    return torch.stack(terms).sum()


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
