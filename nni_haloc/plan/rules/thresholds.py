"""Rules that choose one threshold for the whole network, the best within the limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from nni_haloc.plan.budget import Choice, check_feasible, choose
from nni_haloc.plan.rules.problem import Problem, sees_every_rank
from nni_haloc.space.layers import LayerSpec, kernel_factors
from nni_haloc.space.names import Rank


@sees_every_rank
def uniform(problem: Problem) -> Choice:
    """Choose one fraction of the channels in every layer ("Std. Tucker"): rule ``uniform``.

    Each layer gets its largest candidate that keeps no more than the fraction. The budget that the
    fraction leaves goes to layers that the next larger one gives more.
    """
    shares = {
        layer: {name: _share(problem.specs[layer], rank) for name, rank in row.items()}
        for layer, row in problem.candidates.items()
    }

    def choice(limit: float) -> Choice:
        names = {}
        for layer, row in shares.items():
            least = min(row, key=lambda name: max(row[name]))
            within = [name for name in row if max(row[name]) <= limit] or [least]
            names[layer] = max(within, key=lambda name: sum(row[name]))
        return names

    fractions = sorted(
        {max(share) for row in shares.values() for share in row.values()}, reverse=True
    )
    return fill_budget(problem, choice, fractions)


@sees_every_rank
def energy(problem: Problem) -> Choice:
    """Choose one threshold on the relative output error: rule ``energy``.

    Each layer gets the lowest rank that keeps it, or stays dense if none does. Costs have no say in
    which candidate a layer gets, only in the threshold.
    """
    return _threshold(problem, problem.errors, lambda layer, name: _size(problem, layer, name))


@sees_every_rank
def alds(problem: Problem) -> Choice:
    """Choose ranks as ALDS does (Liebenwein et al., 2021): rule ``alds``.

    The largest relative error of any layer, in the spectral norm, is minimised. A rank's error is
    that of the truncated singular value decomposition of the weights, ``s[r] / s[0]``, the larger
    of a kernel's two unfoldings (output, input). Each layer gets the candidate that costs least and
    keeps the bound. ALDS's own layers are grouped, and its search among group numbers has no
    counterpart here.
    """
    weights = dict(problem.model.named_modules())
    errors = {}
    for layer, row in problem.candidates.items():
        (weight,) = kernel_factors(weights[layer])
        sides = (
            [weight.flatten(1), weight.transpose(0, 1).flatten(1)] if weight.dim() > 2 else [weight]
        )
        spectra = [torch.linalg.svdvals(side.detach().double()).tolist() for side in sides]
        errors[layer] = {
            name: max(_cut(s, r) for s, r in zip(spectra, rank, strict=True)) if rank else 0.0
            for name, rank in row.items()
        }
    return _threshold(problem, errors, problem.cost)


def _threshold(
    problem: Problem, errors: Mapping[str, Mapping[str, float]], price: Callable[[str, str], float]
) -> Choice:
    """Choose the lowest price in each layer among errors within one bound.

    The bound is the least that keeps the limits.
    """

    def choice(bound: float) -> Choice:
        names = {}
        for layer, row in errors.items():
            within = [name for name in row if row[name] <= bound] or [min(row, key=row.__getitem__)]
            names[layer] = min(within, key=lambda name: (price(layer, name), row[name]))
        return names

    return first_within(
        problem, choice, sorted({error for row in errors.values() for error in row.values()})
    )


def first_within(
    problem: Problem, choice: Callable[[float], Choice], numbers: list[float]
) -> Choice:
    """Try thresholds from best to worst; return the first choice within the limits.

    If there is none, because low ranks are not always the cheapest by a measured table, return the
    cheapest choice.

    Args:
        problem: the candidates and the limits.
        choice: returns the choice for a threshold.
        numbers: the thresholds, best first.
    """
    for number in numbers:
        names = choice(number)
        if problem.holds(names):
            return names
    return check_feasible(problem.candidates, problem.limits)


def fill_budget(
    problem: Problem, choice: Callable[[float], Choice], numbers: list[float]
) -> Choice:
    """Try thresholds from best to worst; return the first choice within the limits, filled up.

    The budget that it leaves goes to layers that the next better threshold gives a larger rank, as
    much rank as fits.

    Args:
        problem: the candidates and the limits.
        choice: returns the choice for a threshold.
        numbers: the thresholds, best first.
    """
    low = first_within(problem, choice, numbers)
    size = {layer: _size(problem, layer, name) for layer, name in low.items()}
    larger = (
        more
        for more in map(choice, reversed(numbers))
        if more != low and all(_size(problem, n, more[n]) >= size[n] for n in low)
    )
    high = next(larger, low)
    return choose(
        {n: {low[n]: 0.0, high[n]: _size(problem, n, high[n]) - size[n]} for n in low},
        problem.limits,
    )


def _size(problem: Problem, layer: str, name: str) -> float:
    """Return the sum of a candidate's fractions."""
    return sum(_share(problem.specs[layer], problem.candidates[layer][name]))


def _share(spec: LayerSpec, rank: Rank) -> tuple[float, ...]:
    """Return a rank's fractions of the output and input channels; of a matrix's smaller side."""
    if rank is None:
        return (1.0, 1.0)
    if len(rank) == 1:
        return (rank[0] / min(spec.out_channels, spec.in_channels),) * 2
    return (rank[0] / spec.out_channels, rank[1] / spec.in_channels)


def _cut(values: Sequence[float], rank: int) -> float:
    """Return the relative error of the best approximation of a rank, in the spectral norm.

    Args:
        values: the matrix's singular values, falling.
        rank: of the approximation.
    """
    return values[rank] / values[0] if rank < len(values) and values[0] else 0.0
