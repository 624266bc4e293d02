"""Rule `vbmf`: planted ranks, a direct minimisation of the free energy, and MUSCO's weakening."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn

from nni_haloc.costs.analytic import mac_table
from nni_haloc.plan.budget import Limit
from nni_haloc.plan.rules import RULES
from nni_haloc.plan.rules.problem import Problem
from nni_haloc.plan.rules.vbmf import evbmf
from nni_haloc.space.ranks import AllowedRanks, find_layers


def planted(short, long, rank, noise, seed=0):
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.randn(n, rank, generator=generator, dtype=torch.float64) for n in (short, long)
    )
    return left @ right.T + noise * torch.randn(
        short, long, generator=generator, dtype=torch.float64
    )


@pytest.mark.parametrize("rank", [0, 1, 5, 8])
@pytest.mark.parametrize(("short", "long"), [(32, 32), (32, 288), (100, 20)])
def test_a_planted_rank_and_its_noise_are_found(short, long, rank):
    found, variance = evbmf(planted(short, long, rank, 0.3))
    assert found == rank
    assert variance == pytest.approx(0.09, rel=0.15)


def test_rank_does_not_depend_on_scale_or_orientation():
    matrix = planted(24, 60, 6, 0.5)
    rank, variance = evbmf(matrix)
    assert evbmf(matrix.T)[0] == rank == 6
    assert evbmf(1e-3 * matrix) == (rank, pytest.approx(1e-6 * variance, rel=1e-5))


def test_no_noise_and_nothing_at_all():
    assert evbmf(planted(16, 40, 4, 0.0).float())[0] == 4
    assert evbmf(torch.zeros(4, 9)) == (0, 0.0)
    assert evbmf(torch.ones(1, 1))[0] <= 1


def least_free_energy(matrix, most=4):
    """Rank and noise variance at the least variational free energy, over all variables at once.

    One run for each number of components that are not null, up to ``most`` (a null one adds
    nothing). Of a component: the norms a and b of the two sides' means, along its singular vectors,
    and their variances va and vb; its prior variances are the sides' mean squares, u / M and v / L.
    """
    gamma = np.linalg.svd(matrix, compute_uv=False)
    short, long = sorted(matrix.shape)

    def energy(x, k):
        a, b, va, vb = (
            x[: 2 * k].reshape(2, k).tolist() + np.exp(x[2 * k : -1]).reshape(2, k).tolist()
        )
        noise, whole = math.exp(x[-1]), short * long * x[-1] + (gamma**2).sum() / math.exp(x[-1])
        for i in range(k):
            u, v = a[i] ** 2 + long * va[i], b[i] ** 2 + short * vb[i]
            divergence = long * math.log(u / long / va[i]) + short * math.log(v / short / vb[i])
            whole += divergence + (u * v - 2 * a[i] * b[i] * gamma[i]) / noise
        return whole

    results = []
    for k in range(min(short, most + 1)):
        noise = (gamma[k:] ** 2).sum() / short / long
        start = [
            *np.sqrt(gamma[:k]),
            *np.sqrt(gamma[:k]),
            *np.log(np.tile(noise / gamma[:k], 2)),
            math.log(noise),
        ]
        results.append(minimize(energy, np.array(start), (k,), method="BFGS"))
    rank = next(
        k for k, result in enumerate(results) if result.fun < min(r.fun for r in results) + 1e-4
    )
    return rank, math.exp(results[rank].x[-1])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("short", "long", "rank", "noise"),
    [(5, 5, 1, 0.3), (5, 8, 2, 0.6), (4, 12, 1, 1.0), (5, 8, 0, 1.0)],
)
def test_the_solution_has_the_least_free_energy(short, long, rank, noise, seed):
    matrix = planted(short, long, rank, noise, seed)
    expected_rank, expected_noise = least_free_energy(matrix.numpy())
    found_rank, found_noise = evbmf(matrix)
    assert found_rank == expected_rank
    assert found_noise == pytest.approx(expected_noise, rel=1e-3)


def test_a_component_counts_from_where_it_lowers_the_free_energy():
    """Noise's largest singular value moved through the threshold, one per cent to either side."""
    u, noise, v = torch.linalg.svd(planted(60, 120, 0, 1.0), full_matrices=False)

    def matrix(value):
        return (u * torch.cat([torch.tensor([value]), noise[1:]])) @ v

    low, high = float(noise[0]), 2 * float(noise[0])
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (low, middle) if evbmf(matrix(middle))[0] else (middle, high)
    assert [least_free_energy(matrix(share * high).numpy(), 1)[0] for share in (0.99, 1.01)] == [
        0,
        1,
    ]


RANKS = {"0": (9, 5), "1": (6, 12)}


@pytest.fixture(scope="module")
def network():
    """Two convolutions of known ranks, by output and by input channels, with some noise."""
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(16, 24, 3, padding=1),
        nn.Conv2d(24, 16, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    with torch.no_grad():
        for layer, (r1, r2) in RANKS.items():
            weight = net[int(layer)].weight
            factors = [
                torch.randn(n, r, generator=generator)
                for n, r in ((weight.shape[0], r1), (weight.shape[1], r2))
            ]
            core = torch.randn(r1, r2, 3, 3, generator=generator)
            weight.copy_(
                torch.einsum("fa,cb,abij->fcij", *factors, core)
                + 0.5 * torch.randn(weight.shape, generator=generator)
            )
    return net


def by_budget(net, allowed, ranks=None, share=None):
    """A problem whose budget is the cost of the given candidates, or a share of the original's."""
    images = torch.randn(8, 16, 6, 6, generator=torch.Generator().manual_seed(1))
    layers, costs = find_layers(net, images, allowed), mac_table(net, images, allowed)
    budget = costs.total(ranks) if ranks else share * costs.original
    return Problem(
        net,
        layers.specs,
        layers.candidates(allowed),
        [Limit(costs, budget)],
        images,
        torch.zeros(8, dtype=torch.long),
    )


APART, EQUAL = AllowedRanks(step=1, equal=False), AllowedRanks(step=1)


def test_at_their_own_cost_the_planted_ranks_are_chosen(network):
    choice = {layer: f"r{r1}x{r2}" for layer, (r1, r2) in RANKS.items()}
    assert RULES["vbmf"](by_budget(network, APART, choice)) == choice


def test_of_equal_ranks_the_mean_is_chosen(network):
    choice = {layer: f"r{sum(ranks) // 2}" for layer, ranks in RANKS.items()}
    assert RULES["vbmf"](by_budget(network, EQUAL, choice)) == choice


@pytest.mark.parametrize("weakening", [0.75, 0.5])
def test_a_larger_budget_weakens_on_the_way_to_all_channels(network, weakening):
    """MUSCO's formula: the initial rank less a share of its distance to the rank found."""
    choice = {}
    for layer, ranks in RANKS.items():
        channels = network[int(layer)].weight.shape[:2]
        r1, r2 = (n - weakening * (n - r) for n, r in zip(channels, ranks, strict=True))
        choice[layer] = f"r{math.floor(r1 + 0.5)}x{math.floor(r2 + 0.5)}"
    problem = by_budget(network, APART, choice)
    found = RULES["vbmf"](problem)
    distance = [
        np.abs(np.subtract(problem.candidates[n][found[n]], problem.candidates[n][choice[n]])).max()
        for n in choice
    ]
    assert max(distance) <= 1
    assert problem.limits[0].costs.total(found) > 0.97 * problem.limits[0].budget


def test_a_smaller_budget_takes_the_same_share_of_every_rank(network):
    choice = {"0": "r6x3", "1": "r4x8"}  # two thirds
    assert RULES["vbmf"](by_budget(network, APART, choice)) == choice


def test_with_the_whole_budget_nothing_is_compressed(network):
    assert set(RULES["vbmf"](by_budget(network, APART, share=1.0)).values()) == {"dense"}
