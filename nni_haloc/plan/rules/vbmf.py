"""Rule `vbmf`: take the ranks that variational Bayes tells from noise, scaled to the limits."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.optimize import brentq, minimize_scalar
from torch import Tensor

from nni_haloc.plan.budget import Choice
from nni_haloc.plan.rules.problem import Problem, sees_every_rank
from nni_haloc.plan.rules.thresholds import fill_budget
from nni_haloc.space.layers import kernel_factors

FACTORS = np.linspace(2, 0, 2001).tolist()
"""The common factors that are tried, best first."""


@sees_every_rank
def vbmf(problem: Problem) -> Choice:
    """Choose ranks as MUSCO does (Gusak et al., 2019).

    Its ranks are `evbmf` of each kernel's unfoldings by output and by input channels, each on its
    own. One factor for the whole network meets the limits, the largest that does. Between 2 and 1
    it weakens the compression as MUSCO does, on the straight line from all channels to the ranks of
    `evbmf`; between 1 and 0 it multiplies these. Each layer gets the candidate nearest to its two
    ranks, dense standing for all channels; where r1 = r2, that is the one nearest to their mean.
    The budget that the factor leaves goes to layers that the next larger one gives more. Costs have
    no say but in that and in the factor.
    """
    weights = dict(problem.model.named_modules())
    names, ranks, signal, full = {}, {}, {}, {}
    for layer, row in problem.candidates.items():
        spec = problem.specs[layer]
        (weight,) = kernel_factors(weights[layer])
        signal[layer] = np.array(
            [evbmf(weight.flatten(1))[0], evbmf(weight.transpose(0, 1).flatten(1))[0]]
        )
        channels = (
            (spec.out_channels, spec.in_channels)
            if spec.kind == "conv"
            else (min(spec.out_channels, spec.in_channels),) * 2
        )
        names[layer], full[layer] = list(row), np.array(channels)
        ranks[layer] = np.array(
            [channels if rank is None else (rank[0], rank[-1]) for rank in row.values()]
        )

    def choice(factor: float) -> Choice:
        chosen = {}
        for layer, rank in signal.items():
            target = rank * factor if factor < 1 else rank + (factor - 1) * (full[layer] - rank)
            chosen[layer] = names[layer][int(np.square(ranks[layer] - target).sum(1).argmin())]
        return chosen

    return fill_budget(problem, choice, FACTORS)


def evbmf(matrix: Tensor) -> tuple[int, float]:
    """Estimate a matrix's rank and noise by empirical variational Bayesian matrix factorization.

    The global solution of Nakajima, Sugiyama, Babacan and Tomioka, "Global analytic solution of
    fully-observed variational Bayesian matrix factorization", JMLR 14, 2013: the noise variance
    minimises the free energy, and the rank is the number of singular values above a threshold that
    depends on it. Singular values are taken to be no smaller than what float32 tells from 0.

    Args:
        matrix: ``(L, M)``.

    Returns:
        The rank and the noise variance.
    """
    values = torch.linalg.svdvals(matrix.detach().double()).square().cpu().numpy()
    if not values.any():
        return 0, 0.0
    values = values.clip(min=values[0] * np.finfo(np.float32).eps ** 2)
    short, long = sorted(matrix.shape)
    alpha = short / long
    tau = brentq(lambda t: math.log1p(t) / t + math.log1p(t / alpha) / (t / alpha) - 1, alpha, 2.6)
    # Of squared singular values, in units of the long side times the noise variance.
    threshold = (1 + tau) * (1 + alpha / tau)

    def energy(log_noise: float) -> float:
        """Return the free energy, all else at its best, up to a factor and a constant."""
        x = values / (long * math.exp(log_noise))
        signal = x[x > threshold] - (1 + alpha)
        t = (signal + np.sqrt(signal**2 - 4 * alpha)) / 2
        return float((x - np.log(x)).sum() + (np.log1p(t) + alpha * np.log1p(t / alpha) - t).sum())

    most = math.ceil(short / (1 + alpha)) - 1  # components that can be signal
    low = max(values[most] / threshold, values[most:].mean()) / long
    # The minimum is within the grid, but there may be local ones.
    grid = np.linspace(math.log(low), math.log(values.mean() / long), 257)
    best = int(np.argmin([energy(noise) for noise in grid]))
    bounds = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    noise = math.exp(
        minimize_scalar(energy, bounds=bounds, method="bounded", options={"xatol": 1e-9}).x
    )
    return int((values > long * noise * threshold).sum()), noise
