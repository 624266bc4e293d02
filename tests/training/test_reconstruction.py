"""A compressed network's blocks learn, without labels, to give the original's outputs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.networks import SmallNet
from torch import nn

from nni_haloc.plan.compression import compress
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.training import reconstruction
from nni_haloc.training.reconstruction import reconstruct_blocks

RANKS = {"stem": (4, 2), "body.0": (4, 4), "point": (4,)}


def distance(network, original, images):
    with torch.no_grad():
        return float(F.mse_loss(network.eval()(images), original.eval()(images)))


@pytest.fixture
def compressed(net, images):
    return compress(net, RankPlan(RANKS), images)


def test_the_network_comes_nearer_on_images_that_it_has_not_seen(net, images, compressed, device):
    unseen = torch.randn(256, 3, 8, 8, generator=torch.Generator().manual_seed(9))
    before, original = distance(compressed, net, unseen), copy.deepcopy(net.state_dict())
    statistics = [compressed.norm.running_mean.clone(), compressed.norm.running_var.clone()]
    many = torch.randn(256, 3, 8, 8, generator=torch.Generator().manual_seed(8))
    errors = reconstruct_blocks(compressed, net, many, RANKS, epochs=8, lr=3e-3)
    assert distance(compressed, net, unseen) < 0.7 * before
    assert all(error.after <= error.before for error in errors)
    assert all(torch.equal(value, original[key]) for key, value in net.state_dict().items())
    now = [compressed.norm.running_mean, compressed.norm.running_var]
    assert all(torch.equal(a, b) for a, b in zip(statistics, now, strict=True))
    assert not any("forward" in vars(m) or m._forward_hooks for m in compressed.modules())
    assert all(p.device.type == "cpu" for p in compressed.parameters())


def test_errors_are_those_of_the_whole_networks(net, images, compressed):
    """Each block is given what the compressed ones before it give; by hooks on whole passes."""
    errors = reconstruct_blocks(compressed, net, images, RANKS, epochs=2, held_out=0.25)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    hidden = order[:16]

    def outputs_of(network):
        found = {}
        hooks = [
            network.get_submodule(error.block).register_forward_hook(
                lambda _, __, y, name=error.block: found.update({name: y.clone()})
            )
            for error in errors
        ]
        with torch.no_grad():
            network.eval()(images)
        for hook in hooks:
            hook.remove()
        return found

    outputs, targets = outputs_of(compressed), outputs_of(net)
    assert [error.block for error in errors] == ["stem", "norm", "body", "point", "head"]
    for error in errors:
        y, t = outputs[error.block], targets[error.block]
        expected = float(F.mse_loss(y[hidden], t[hidden]) / t.square().mean())
        assert error.after == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_blocks_before_the_first_low_rank_one_stay(net, images):
    network = compress(net, RankPlan({"point": (4,)}), images)
    before = copy.deepcopy(network.state_dict())
    errors = reconstruct_blocks(network, net, images, ["stem", "body.0", "point"], epochs=2)
    assert [error.block for error in errors] == ["point", "head"]
    changed = {k for k, value in network.state_dict().items() if not torch.equal(value, before[k])}
    assert changed
    assert all(key.startswith(("point", "head")) for key in changed)


def test_a_training_that_explodes_leaves_the_network_as_it_was(net, images, compressed):
    before = copy.deepcopy(compressed.state_dict())
    errors = reconstruct_blocks(compressed, net, images, RANKS, lr=1e30)
    assert all(error.after == error.before for error in errors)
    assert all(torch.equal(value, before[k]) for k, value in compressed.state_dict().items())


def test_frozen_weights_stay_and_the_rest_learns(net, images, compressed):
    compressed.head.requires_grad_(False)
    before = copy.deepcopy(compressed.head.state_dict())
    reconstruct_blocks(compressed, net, images, RANKS, epochs=1)
    assert all(torch.equal(v, before[k]) for k, v in compressed.head.state_dict().items())
    assert not compressed.head.weight.requires_grad


def test_a_seed_gives_the_same_network_and_no_epochs_change_nothing(net, images, compressed):
    state, networks = copy.deepcopy(compressed.state_dict()), []
    for seed in (0, 0, 1):
        network = copy.deepcopy(compressed)
        reconstruct_blocks(network, net, images, RANKS, epochs=1, seed=seed)
        networks.append(network.state_dict())
    first, second, other = networks
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)
    assert reconstruct_blocks(compressed, net, images, RANKS, epochs=0) == []
    assert all(torch.equal(value, state[k]) for k, value in compressed.state_dict().items())


class Joined(nn.Module):
    """What stands between blocks is computed again: a shortcut over two of them, a pooling."""

    def __init__(self):
        super().__init__()
        self.a, self.b = SmallNet().stem, nn.Conv2d(8, 8, 3, padding=1)
        self.c, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu_(self.a(x))
        return self.head(F.avg_pool2d(x + self.c(torch.relu_(self.b(x))), 2).mean((2, 3)))


def test_what_stands_between_blocks_is_computed_again(images):
    torch.manual_seed(0)
    net = Joined().eval()
    network = compress(net, RankPlan({"b": (4, 4), "c": (4, 4)}), images)
    names, seen = ["a", "b", "c", "head"], {}
    for name in names:
        network.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: (
                None if name in seen else seen.update({name: args[0].clone()})
            )
        )
    with torch.no_grad():
        network.eval()(images)
    outputs = [network.get_submodule(name)(seen[name].clone()) for name in names]
    chain = reconstruction._Chain(network, names, images, 20)
    for i, name in enumerate(names):
        torch.testing.assert_close(chain.input_of(i), seen[name])
        chain.outputs.append(outputs[i].detach())
