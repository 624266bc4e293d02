"""Eq. 6-9, one pure function each. Costs and the budget share one unit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


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


def probability_loss(ce: Tensor, expected: Tensor, budget: float, beta: float = 2.0) -> Tensor:
    """Eq. (7) made to settle, the default: ``CE + beta * |E / budget - 1|``; where beta outweighs CE's pull, E comes to rest at the budget.

    >>> float(probability_loss(torch.tensor(2.0), torch.tensor(3.0), budget=2.0, beta=2.0))
    3.0
    """
    return ce + beta * (expected / budget - 1).abs()


def approach_loss(outputs: Iterable[Tensor], targets: Iterable[Tensor]) -> Tensor:
    """Eq. (8): mean squared error between feature maps of the sampled candidates and of the original layers, summed over the layers.

    >>> float(approach_loss([torch.zeros(2, 2)], [torch.full((2, 2), 3.0)]))
    9.0
    """
    terms = [torch.nn.functional.mse_loss(y, t) for y, t in zip(outputs, targets, strict=True)]
    return torch.stack(terms).sum()


def weight_loss(ce: Tensor, approach: Tensor, lam: float) -> Tensor:
    """Eq. (9): ``CE + lam * L_approach``.

    >>> float(weight_loss(torch.tensor(1.0), torch.tensor(4.0), lam=0.5))
    3.0
    """
    return ce + lam * approach
