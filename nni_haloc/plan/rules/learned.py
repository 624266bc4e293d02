"""Rule `learned`: learn ranks in training, by alternating compression as LCNN does.

Idelbayev and Carreira-Perpinan, CVPR 2020.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nni_haloc.inputs.labels import LabelCheck
from nni_haloc.plan.budget import Choice, Limit, check_feasible, choose
from nni_haloc.plan.rules.problem import Problem, sees_every_rank
from nni_haloc.space.frozen import let_train
from nni_haloc.space.modules import copy_of
from nni_haloc.space.outputs import cross_entropy, logits_of
from nni_haloc.space.tucker import Tucker2, hosvd, reconstruct
from nni_haloc.training.random_states import isolated_random_states
from nni_haloc.utils.log import logger
from nni_haloc.utils.placement import accelerated

ROUNDS, STEPS = 11, 32
"""Alternations, and steps of training in each.

352 in all: an epoch of CIFAR-10 in batches of 128, as a search makes by default.
"""

PENALTY, GROWTH = 0.03, 1.3
"""The penalty's weight μ in the first alternation, and its factor from one to the next."""

LR, MOMENTUM = 0.02, 0.9


@sees_every_rank
def learned(problem: Problem) -> Choice:
    """Choose the ranks of a network that is trained while it is drawn towards low-rank kernels.

    In turns, a copy of the network is trained on ``problem.train`` with the penalty
    ``μ/2 ||W - W'||²`` (L step), and ``W'`` becomes the truncated HOSVD of ``W`` at the ranks that
    minimise ``λ cost + μ/2 ||W - W'||²`` (C step). The penalty shrinks what the loss does not hold
    in place; what is left earns its layer more rank. LCNN's μ grows at a constant λ, and the ranks
    with it; here λ is whatever lets the cost grow evenly from the cheapest choice to the limits,
    which is a knapsack on the error, solved exactly. (With the limits' ranks from the start, the
    first choice is the last: the penalty spares the ranks that a layer has and shrinks those that
    it lacks.)

    The ranks alone are the result: the network that gets them is decomposed from the original
    weights as by every rule, so that it is ranks that are compared.

    Raises:
        ValueError: without ``problem.train``.
    """
    if problem.train is None:
        raise ValueError("rule: 'learned' needs training images beyond the calibration images")
    network = copy_of(problem.model).train()
    let_train(network, told=True)
    modules = dict(network.named_modules())
    weights: dict[str, nn.Parameter] = {
        layer: modules[layer].weight for layer in problem.candidates
    }
    batches, checked = _endless(problem.train), LabelCheck()
    least = check_feasible(problem.candidates, problem.limits)
    with accelerated(network) as device, isolated_random_states():
        torch.manual_seed(problem.seed)  # of the augmentation
        optimizer = torch.optim.SGD(network.parameters(), LR, MOMENTUM)
        for i in range(ROUNDS):
            logger.info("rule learned: round %d of %d", i + 1, ROUNDS)
            _, targets = _compress(problem, weights, _limits(problem, least, i / ROUNDS))
            for images, labels in islice(batches, STEPS):
                distance = torch.stack(
                    [(weights[layer] - target).square().sum() for layer, target in targets.items()]
                ).sum()
                logits = logits_of(network(images.to(device)))
                loss = cross_entropy(logits, checked(labels, logits).to(device))
                loss = loss + PENALTY * GROWTH**i / 2 * distance
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return _compress(problem, weights, problem.limits)[0]


def _limits(problem: Problem, least: Choice, share: float) -> list[Limit]:
    """Return limits on the way from a choice's costs to the problem's."""
    costs = [limit.costs.total(least) for limit in problem.limits]
    return [
        Limit(limit.costs, cost + share * (limit.budget - cost))
        for limit, cost in zip(problem.limits, costs, strict=True)
    ]


def _compress(
    problem: Problem, weights: Mapping[str, Tensor], limits: Sequence[Limit]
) -> tuple[Choice, dict[str, Tensor]]:
    """Take the C step: return the choice of the least total ``||W - W'||²``, and every ``W'``."""
    alike: dict[tuple[int, int, int, int], list[str]] = {}
    for layer in problem.candidates:
        spec = problem.specs[layer]
        shape = spec.out_channels, spec.in_channels, *spec.kernel_size
        alike.setdefault(shape, []).append(layer)
    scores: dict[str, dict[str, float]] = {}
    whole: dict[str, Tucker2] = {}
    for shape, layers in alike.items():
        kernels = torch.stack([weights[layer].detach().reshape(shape) for layer in layers])
        # A matrix's HOSVD is its singular value decomposition.
        (factors,) = hosvd(kernels, [shape[:2]])
        energy = factors.core.square().sum((3, 4)).cumsum(1).cumsum(2)
        gained = (energy - energy[:, -1:, -1:]).cpu().numpy()
        for i, layer in enumerate(layers):
            whole[layer] = Tucker2(*(value[i] for value in factors))
            scores[layer] = {
                name: 0.0 if rank is None else float(gained[i, rank[0] - 1, rank[-1] - 1])
                for name, rank in problem.candidates[layer].items()
            }
    choice = choose({layer: scores[layer] for layer in problem.candidates}, limits)
    targets = {}
    for layer, (out, core, inn) in whole.items():
        rank, weight = problem.candidates[layer][choice[layer]], weights[layer].detach()
        r1, r2 = core.shape[:2] if rank is None else (rank[0], rank[-1])
        targets[layer] = (
            reconstruct(Tucker2(out[:, :r1], core[:r1, :r2], inn[:r2]))
            .reshape(weight.shape)
            .to(weight)
        )
    return choice, targets


def _endless(loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from loader
