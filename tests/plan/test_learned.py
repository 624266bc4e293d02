"""Rule `learned`: its compression against numpy, its training counted, and ranks that only training
can tell.
"""

import dataclasses

import numpy as np
import pytest
import torch
from helpers.problems import every, loader, problem, total
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nni_haloc.costs.table import CostTable
from nni_haloc.plan.budget import Limit
from nni_haloc.plan.rules import RULES
from nni_haloc.plan.rules import learned as learning
from nni_haloc.space.ranks import AllowedRanks


def test_without_training_the_learned_ranks_are_the_best_for_the_kernels(
    net, images, labels, monkeypatch, device
):
    """Oracle: HOSVD by numpy, every choice tried."""
    monkeypatch.setattr(learning, "ROUNDS", 0)
    one, errors = problem(net, images, labels, (0.45,), train=loader(images, labels)), {}
    for layer, row in one.candidates.items():
        weight = net.get_submodule(layer).weight.detach().double().numpy()
        bases = [
            np.linalg.svd(np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1))[0]
            for axis in (0, 1)
        ]

        def error(rank, weight=weight, bases=bases):
            p, q = (
                basis[:, :r] @ basis[:, :r].T
                for basis, r in zip(bases, (rank[0], rank[-1]), strict=True)
            )
            return ((weight - np.einsum("ab,bcij,cd->adij", p, weight, q)) ** 2).sum()

        errors[layer] = {name: 0.0 if rank is None else error(rank) for name, rank in row.items()}
    best = min(total(errors, c) for c in every(one))
    assert total(errors, RULES["learned"](one)) == pytest.approx(best, rel=1e-6)


def test_learning_takes_its_steps_and_ends_near_low_rank(net, images, labels, monkeypatch, device):
    """Batches are counted; limits widen to the problem's; kernels end nearer to low rank than they
    began; random states are left alone.
    """
    distances, budgets, taken, compress = [], [], [], learning._compress

    def spied(problem, weights, limits):
        choice, targets = compress(problem, weights, limits)
        distances.append(
            sum(
                float((weights[layer].detach() - target).norm() ** 2)
                for layer, target in targets.items()
            )
        )
        budgets.append(limits[0].budget)
        return choice, targets

    monkeypatch.setattr(learning, "_compress", spied)
    one = problem(net, images, labels, (0.45,), train=loader(images, labels))
    net.head.register_forward_pre_hook(
        lambda module, args: taken.append(len(args[0])) if module.training else None
    )
    state = torch.random.get_rng_state()
    RULES["learned"](one)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert taken == [16] * learning.ROUNDS * learning.STEPS
    assert len(budgets) == 1 + learning.ROUNDS
    assert budgets == sorted(set(budgets))
    assert (budgets[0], budgets[-1]) == (
        min(map(one.limits[0].costs.total, every(one))),
        one.limits[0].budget,
    )
    spied(one, {layer: net.get_submodule(layer).weight for layer in one.candidates}, one.limits)
    assert distances[-2] < 0.5 * distances[-1]


class Augmented(TensorDataset):
    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image + torch.randn_like(image), label


def test_the_seed_decides_the_augmentation_too(net, images, labels, monkeypatch):
    trained, compress = [], learning._compress
    monkeypatch.setattr(learning, "ROUNDS", 1)
    monkeypatch.setattr(learning, "STEPS", 2)
    monkeypatch.setattr(
        learning,
        "_compress",
        lambda one, weights, limits: trained.append(weights) or compress(one, weights, limits),
    )
    for state, seed in ((0, 5), (1, 5), (1, 6)):
        torch.manual_seed(state)
        batches = DataLoader(
            Augmented(images, labels), 16, generator=torch.Generator().manual_seed(0)
        )
        RULES["learned"](problem(net, images, labels, seed=seed, train=batches))
    first, again, other = (weights["body.0"] for weights in trained[::2])
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


class Halves(nn.Module):
    """Two linear layers on a half of the input each."""

    def __init__(self):
        super().__init__()
        self.needed, self.idle = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x):
        return self.needed(x[:, :8]) + 0.1 * self.idle(x[:, 8:])


def test_learned_ranks_go_where_the_loss_needs_them(monkeypatch):
    """The labels are a rotation of one half, which the network has hardly learned: its kernels
    alone give the other half the ranks.
    """
    torch.manual_seed(0)
    net = Halves()
    nn.init.orthogonal_(net.needed.weight, 0.1)
    nn.init.orthogonal_(net.idle.weight, 0.3)
    x = torch.randn(512, 16)
    y = (x[:, :8] @ nn.init.orthogonal_(torch.empty(8, 8))).argmax(1)
    allowed = AllowedRanks(step=1, kinds=("linear",), dense=False)
    one = problem(
        net, x, y, (1.0,), allowed, train=DataLoader(TensorDataset(x, y), 64, shuffle=True)
    )
    costs = {
        layer: {name: float(rank[0]) for name, rank in row.items()} | {"dense": 8.0}
        for layer, row in one.candidates.items()
    }
    one = dataclasses.replace(one, limits=[Limit(CostTable("macs", costs, 0.0), 4.0)])
    assert RULES["learned"](one) == {"needed": "r3", "idle": "r1"}
    monkeypatch.setattr(learning, "ROUNDS", 0)
    assert RULES["learned"](one) == {"needed": "r1", "idle": "r3"}


def test_learning_needs_training_images(net, images, labels):
    with pytest.raises(ValueError, match="rule: 'learned' needs training images"):
        RULES["learned"](problem(net, images, labels))
