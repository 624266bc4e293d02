"""A network is cut into blocks that are called one after another."""

import torch
import torchvision
from helpers.networks import SmallNet
from torch import nn

from nni_haloc.space.blocks import blocks_of


def convolutions(model):
    return [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]


def test_blocks_are_the_largest_that_hold_few_layers():
    model = torchvision.models.resnet18().eval()
    layers = convolutions(model)
    image = torch.randn(1, 3, 64, 64)
    stages = [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]
    assert blocks_of(model, image, layers, 3) == ["conv1", "bn1", *stages, "fc"]
    assert blocks_of(model, image, layers, 5)[2:6] == ["layer1", "layer2", "layer3", "layer4"]
    single = blocks_of(model, image, layers, 1)
    assert {"layer1.0.conv1", "layer1.0.bn1", "layer2.0.downsample"} <= set(single)
    assert not any(a.startswith(f"{b}.") for a in single for b in single)


class Odd(nn.Module):
    """Calls one layer twice, one with two inputs, one never, and one by its second name."""

    def __init__(self):
        super().__init__()
        self.late, self.twice = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.first, self.never = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.pair, self.act = nn.Bilinear(4, 4, 2), nn.ReLU()
        self.also = self.first

    def forward(self, x):
        x = self.twice(self.act(self.twice(self.also(x))))
        x = self.late(x).mean((2, 3))
        return self.pair(x, x)


def test_what_is_not_called_once_with_one_tensor_is_no_block():
    model = Odd()
    before = {name: len(m._forward_hooks) for name, m in model.named_modules()}
    assert blocks_of(model, torch.randn(1, 3, 2, 2), ()) == ["first", "late"]
    assert before == {name: len(m._forward_hooks) for name, m in model.named_modules()}


def test_the_network_itself_is_no_block():
    model = SmallNet()
    found = blocks_of(model, torch.randn(1, 3, 8, 8), convolutions(model), 99)
    assert found == ["stem", "norm", "body", "point", "head"]
