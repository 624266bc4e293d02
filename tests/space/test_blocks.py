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


class Sequences(nn.Module):
    """The first dimension of what its layers see is not the images."""

    def __init__(self):
        super().__init__()
        self.place, self.inner = nn.Embedding(6, 4), nn.Linear(4, 4)
        self.folded, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):  # (N, 6, 4)
        x = self.inner((x + self.place(torch.arange(6))).transpose(0, 1)).transpose(0, 1)
        return self.head(self.folded(x.reshape(-1, 4)).reshape(x.shape).mean(1))


def test_modules_whose_first_dimension_is_not_the_images_are_no_blocks():
    assert blocks_of(Sequences(), torch.randn(3, 6, 4), ()) == ["head"]


def test_a_module_inside_of_another_by_its_second_name_is_no_block_of_its_own():
    class Aliased(nn.Module):
        def __init__(self):
            super().__init__()
            inner = SmallNet()
            self.stem = inner.stem
            self.inner, self.out = inner, nn.Linear(4, 2)

        def forward(self, x):
            return self.out(self.inner(x))

    layers = ["stem", "inner.body.0", "inner.point"]
    assert blocks_of(Aliased(), torch.randn(3, 3, 8, 8), layers, 3) == ["inner", "out"]
    assert "inner" not in blocks_of(Aliased(), torch.randn(3, 3, 8, 8), layers, 2)


def test_recurrent_hooked_and_scripted_modules_are_no_blocks():
    model = SmallNet()
    model.norm.register_forward_hook(lambda *_: None)
    model.act = torch.jit.script(nn.ReLU())
    model.late = nn.Sequential(nn.LSTM(4, 4))
    assert blocks_of(model, torch.randn(3, 3, 8, 8), ()) == ["stem", "body", "point", "head"]
