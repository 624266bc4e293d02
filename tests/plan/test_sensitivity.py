"""What each candidate alone adds to the loss, against replacing it by hand."""

import copy
from collections import Counter

import pytest
import torch
from helpers.host_copies import waits
from torch import nn

from nni_haloc.plan.sensitivity import loss, sensitivities
from nni_haloc.space.candidates import build_candidates
from nni_haloc.space.modules import replace_modules
from nni_haloc.space.ranks import AllowedRanks, find_layers


@pytest.fixture
def modules(net, images):
    layers = find_layers(net, images[:1])
    return build_candidates(net, layers.specs, layers.candidates(AllowedRanks()), images)


def by_hand(network, images, labels):
    """Mean of ``-log softmax`` image by image, in float64."""
    network = copy.deepcopy(network).double().eval()
    with torch.no_grad():
        logits = torch.cat([network(image[None].double().clone()) for image in images])
    return float(-logits.log_softmax(1)[range(len(labels)), labels].mean())


def test_the_loss_is_the_mean_over_all_images_whatever_the_batches(net, images, labels, device):
    expected = by_hand(net, images, labels)
    for batch_size in (1, 7, 64, 1000):
        found = loss(net.double(), images.double(), labels, batch_size)
        assert found == pytest.approx(expected, rel=1e-12)
    assert all(p.device.type == "cpu" for p in net.parameters())


def test_on_a_device_a_sensitivity_is_what_a_swap_by_hand_adds(
    net, modules, images, labels, device
):
    """In float64, with candidates that stay where they are."""
    for row in modules.values():
        for module in row.values():
            module.double()
    before = copy.deepcopy({layer: nn.ModuleDict(row) for layer, row in modules.items()})
    net, images = net.double().eval(), images.double()
    found = sensitivities(net, modules, images, labels, batch_size=24)
    original = by_hand(net, images, labels)
    for layer, row in modules.items():
        for name, module in row.items():
            replaced = copy.deepcopy(net)
            replace_modules(replaced, {layer: copy.deepcopy(module)})
            added = by_hand(replaced, images, labels) - original
            assert found[layer][name] == pytest.approx(added, abs=1e-12), (layer, name)
            for ours, theirs in zip(
                module.parameters(), before[layer][name].parameters(), strict=True
            ):
                assert ours.device.type == "cpu"
                assert torch.equal(ours, theirs)


def test_the_device_is_waited_for_no_more_often_for_more_candidates(
    net, modules, images, labels, device
):
    numbers, batches = [], []
    few = {layer: dict(list(row.items())[:2]) for layer, row in modules.items()}
    for rows in (few, modules):
        with waits() as found:
            sensitivities(net, rows, images, labels, 16, progress=lambda *at: batches.append(at))
        numbers.append(len(found))
    assert numbers[0] == numbers[1]
    assert batches == 2 * [(done, 4) for done in range(5)]


def test_each_candidate_is_put_alone_into_the_original(net, modules, images, labels):
    """Every candidate of every layer, in a network made by hand from the original; what was tried
    before leaves no trace.
    """
    assert {layer: len(row) for layer, row in modules.items()} == {
        "stem": 2,
        "body.0": 4,
        "point": 3,
    }
    before = copy.deepcopy(net.state_dict())
    found = sensitivities(net.train(), modules, images, labels, batch_size=24)
    assert net.training
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    original = by_hand(net, images, labels)
    for layer, row in modules.items():
        assert list(found[layer]) == list(row)
        for name, module in row.items():
            replaced = copy.deepcopy(net)
            parent, _, child = layer.rpartition(".")
            setattr(replaced.get_submodule(parent), child, copy.deepcopy(module))
            assert found[layer][name] == pytest.approx(
                by_hand(replaced, images, labels) - original, abs=2e-6
            ), (layer, name)


def test_one_pass_a_candidate_and_one_for_the_original_and_its_copies(net, modules, images, labels):
    """The classifier is no candidate: it runs once in every pass."""
    calls = []
    net.head.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    sensitivities(net, modules, images, labels)
    calls = [n for n in calls if n > 2]  # less what is tried first
    assert calls == [64] * (1 + sum(len(set(row) - {"dense"}) for row in modules.values()))


class Residual(nn.Module):
    """Blocks that add in place to what a layer gave (as torchvision's do), a layer with two names
    and two calls, one that is not called.
    """

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.blocks = nn.Sequential(Block(), Block())
        self.twice = nn.Conv2d(6, 6, 3, padding=1)
        self.same = self.twice
        self.idle = nn.Conv2d(6, 6, 3)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.blocks(self.stem(x))
        x = self.same(self.twice(x).relu_()).relu_()
        return self.head(x.mean((2, 3)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.side = (
            nn.Conv2d(6, 6, 3, padding=1),
            nn.Conv2d(6, 6, 3, padding=1),
            nn.Conv2d(6, 6, 1),
        )
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.two(self.act(self.one(x)))
        out += self.side(x)
        return self.act(out)


@pytest.fixture
def residual():
    torch.manual_seed(0)
    return Residual().eval()


def test_a_pass_goes_on_from_the_layer_that_is_replaced(residual, images, labels):
    """Against whole passes, with operations in place on what was kept; and the calls that are made
    are counted.
    """
    layers = ["stem", "blocks.0.one", "blocks.0.side", "blocks.1.two", "twice", "idle"]
    rows = {
        layer: {name: copy.deepcopy(residual.get_submodule(layer)) for name in ("a", "b")}
        for layer in layers
    }
    for row in rows.values():
        for module in row.values():
            nn.init.normal_(module.weight, std=0.3)
    calls = Counter()
    for name in ("stem", "blocks.0.one", "blocks.1.one", "blocks.1.two", "twice", "head"):
        residual.get_submodule(name).forward = Counted(calls, name, residual.get_submodule(name))
    found = sensitivities(residual, rows, images, labels)
    # twice for each of the layers that stand before it, once for the original; never where it is
    # itself replaced
    assert calls == {
        "stem": 3,
        "blocks.0.one": 5,
        "blocks.1.one": 9,
        "blocks.1.two": 9,
        "twice": 22,
        "head": 13,
    }
    check(residual, rows, found, images, labels)
    assert found["idle"] == pytest.approx({"a": 0, "b": 0}, abs=1e-6)


def check(network, rows, found, images, labels):
    original = by_hand(network, images, labels)
    for layer, row in rows.items():
        for name, module in row.items():
            replaced = copy.deepcopy(network)
            replace_modules(replaced, {layer: module})
            assert found[layer][name] == pytest.approx(
                by_hand(replaced, images, labels) - original, abs=5e-6
            ), (layer, name)


class Effects(nn.Module):
    """``in place``: an activation overwrites what is used again.

    ``left behind``: a module leaves something for another to find. ``input``: the images themselves
    are overwritten.
    """

    def __init__(self, effect):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.act = nn.ReLU(inplace=effect == "in place")
        self.block, self.head, self.effect = Leaving(self.a), nn.Linear(3, 4), effect

    def forward(self, x):
        if self.effect == "input":
            x.sub_(0.5)
        y = self.block(x) if self.effect == "left behind" else self.a(x)
        z = self.b(self.act(y)) + (self.block.left if self.effect == "left behind" else y)
        return self.head(self.c(z).relu().mean((2, 3)))


class Leaving(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        self.left = self.inner(x)
        return self.left.sin()


@pytest.mark.parametrize("effect", ["in place", "left behind", "input"])
def test_effects_besides_a_calls_output_are_not_lost(effect, images, labels):
    torch.manual_seed(0)
    network = Effects(effect).eval()
    rows = {
        layer: {name: nn.Conv2d(3, 3, 3, padding=1) for name in ("x", "y")}
        for layer in ("a", "b", "c")
    }
    before = images.clone()
    found = sensitivities(network, rows, images, labels, batch_size=24)
    assert torch.equal(images, before)
    check(network, rows, found, images, labels)


class Counted:
    def __init__(self, calls, name, module):
        self.calls, self.name, self.forward = calls, name, type(module).forward
        self.module = module

    def __call__(self, x):
        self.calls[self.name] += len(x) > 2  # less what is tried first
        return self.forward(self.module, x)

    def __deepcopy__(self, memo):
        return Counted(self.calls, self.name, memo.get(id(self.module), self.module))


def test_a_candidate_whose_loss_is_not_finite_is_named(net, images, labels):
    bad = copy.deepcopy(net.stem)
    with torch.no_grad():
        bad.weight.fill_(float("nan"))
    with pytest.raises(
        ValueError,
        match=r"^layer 'stem', candidate 'r2': the loss on the calibration images is nan$",
    ):
        sensitivities(net, {"stem": {"r2": bad}}, images, labels)
