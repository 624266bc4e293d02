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
    assert any(error.before > error.after > 0 for error in errors)
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
    chain = reconstruction._Chain(network, images, 20)
    for name, output in zip(names, outputs, strict=True):
        block = network.get_submodule(name)
        torch.testing.assert_close(chain.input_of(block), seen[name])
        chain.passed.append((block, output.detach()))


class Sometimes(nn.Module):
    """Calls a layer for some images alone."""

    def __init__(self):
        super().__init__()
        self.stem, self.rare = SmallNet().stem, nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        y = torch.relu(self.stem(x))
        chosen = x.mean((1, 2, 3)) > 0
        if chosen.any():
            y = torch.where(chosen[:, None, None, None], self.rare(y), y)
        return self.head(y.mean((2, 3)))


class Writes(SmallNet):
    """Writes into its input."""

    def forward(self, x):
        x -= 0.5
        return super().forward(x)


class Doubled(SmallNet):
    """Two blocks share a parameter, one is called twice, and so is none."""

    def __init__(self):
        super().__init__()
        self.more = nn.Conv2d(12, 12, 1)
        self.more.weight = self.point.weight

    def forward(self, x):
        x = self.body(self.norm(self.stem(x)) + self.norm(self.stem(x.flip(3))))
        return self.head((x + self.act(self.more(self.point(x)))).mean((2, 3)))


def hooked():
    net = SmallNet()
    net.norm.register_forward_hook(lambda _, __, y: 2 * y)
    return net


def patched():
    net = SmallNet()
    forward = net.stem.forward
    net.stem.forward = lambda x: 2 * forward(x)
    return net


def scripted():
    net = SmallNet()
    net.act = torch.jit.script(nn.ReLU())
    return net


@pytest.mark.parametrize("make", [Sometimes, Writes, Doubled, hooked, patched, scripted])
def test_odd_networks_come_no_farther_and_stay_what_they_are(make, images):
    """Each reported error is that of the whole network, on the same held-out images."""
    torch.manual_seed(0)
    net = make().eval()
    net.stem.weight.data *= 3
    network = copy.deepcopy(net)
    with torch.no_grad():
        network.stem.weight[:, :, 0] = 0  # any other weights will do
    before, given = distance(network, net, images.clone()), images.clone()
    attributes = {name: set(vars(m)) for name, m in network.named_modules()}
    errors = reconstruct_blocks(network, net, images, ["stem"], epochs=6, lr=3e-3)
    assert distance(network, net, images.clone()) <= before
    assert torch.equal(images, given)
    assert attributes == {name: set(vars(m)) for name, m in network.named_modules()}
    for error in errors:
        seen = []
        for model in (network, net):
            hook = model.get_submodule(error.block).register_forward_hook(
                lambda _, __, y, seen=seen: seen.append(y.clone())
            )
            with torch.no_grad():
                model(images.clone())
            hook.remove()
        hidden = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:13]
        expected = F.mse_loss(seen[0][hidden], seen[1][hidden]) / seen[1].square().mean()
        assert error.after == pytest.approx(float(expected), rel=1e-3, abs=1e-6)


def test_it_works_where_gradients_are_off_and_leaves_half_precision_alone(net, images, compressed):
    with torch.inference_mode():
        errors = reconstruct_blocks(compressed, net, images, RANKS, epochs=1)
    assert errors
    assert reconstruct_blocks(compressed.half(), net.half(), images.half(), RANKS) == []


def test_a_share_that_leaves_nothing_to_learn_from_is_refused(net, images, compressed):
    with pytest.raises(ValueError, match="^held_out: expected a share from 0 to below 1, found 1"):
        reconstruct_blocks(compressed, net, images, RANKS, held_out=1)
