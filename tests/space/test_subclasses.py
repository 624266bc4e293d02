"""Subclasses of layers: decomposed if they compute what the base does; else they say why not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nni_haloc.chain.quantizing import quantize
from nni_haloc.inputs.registries import LAYER_CLASSES
from nni_haloc.plan.compression import compress
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.search.space import RankSpace
from nni_haloc.space.ranks import AllowedRanks

ALL = AllowedRanks(kinds=("conv", "pointwise", "linear"))
HERE = __name__


class Same(nn.Conv2d):
    pass


class Prepared(nn.Conv2d):
    """Chooses its own padding and first weights, and what it prints."""

    def __init__(self, channels):
        super().__init__(channels, channels, 3, padding=1, bias=False)

    def reset_parameters(self):
        nn.init.orthogonal_(self.weight)

    def extra_repr(self):
        return "prepared"


class Grandchild(Same):
    pass


class Plain(nn.Linear):
    pass


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class Inner(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight * 2, bias)


class Called(nn.Conv2d):
    def __call__(self, x):
        return super().__call__(x) + 1


class Harmless(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class OneDimensional(nn.Conv1d):
    pass


def network(*layers):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(layers)

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    return Net()


IMAGES = torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "layer",
    [Same(8, 8, 3), Same(8, 8, 1), Prepared(8), Grandchild(8, 8, 3, stride=2, bias=False)],
    ids=lambda layer: type(layer).__name__,
)
def test_a_subclass_that_keeps_forward_is_its_base(layer):
    net = network(nn.Conv2d(8, 8, 3, padding=1), layer)
    space = RankSpace(net, IMAGES, calibration=IMAGES)
    assert "layers.1" in space.candidates
    dense = dict.fromkeys(space.candidates, "dense")
    with torch.no_grad():
        torch.testing.assert_close(space.freeze(dense).eval()(IMAGES), net(IMAGES))
    full = {"layers.1": (8, 8) if space.specs["layers.1"].kind == "conv" else (8,)}
    with torch.no_grad():  # at full rank it is the layer
        torch.testing.assert_close(compress(net, RankPlan(full))(IMAGES), net(IMAGES))
    quantized = quantize(net, IMAGES)
    assert set(quantized.calibration()) == {"layers.0", "layers.1"}
    assert type(net.layers[1]) is type(layer)


@pytest.mark.parametrize("kind", [Standardised, Inner, Called])
def test_a_convolution_of_its_own_is_left_alone_with_its_name_and_the_way_to_register_it(kind):
    net = network(nn.Conv2d(8, 8, 3), kind(8, 8, 3))
    space = RankSpace(net, IMAGES)
    name = f"{HERE}.{kind.__name__}"
    assert space.left_alone == {
        "layers.1": f"{name} has a forward of its own; if it computes what nn.Conv2d does:"
        f" nni_haloc.inputs.registries.LAYER_CLASSES.register({name!r})(nn.Conv2d)"
    }


def test_linear_layers_of_their_own_are_left_alone():
    normed = nn.utils.parametrizations.weight_norm(Plain(16, 16))
    net = network(nn.Linear(16, 16), Harmless(16, 16), normed)
    space = RankSpace(net, torch.randn(2, 16), allowed=ALL)
    assert list(space.candidates) == ["layers.0"]
    assert f"{HERE}.Harmless has a forward of its own" in space.left_alone["layers.1"]
    assert space.left_alone["layers.2"] == "ParametrizedPlain is not decomposed"


def test_other_classes_are_named_in_full():
    net = network(nn.Linear(8, 16), OneDimensional(4, 4, 3), nn.Conv1d(4, 4, 3))
    space = RankSpace(net, torch.randn(2, 4, 8), allowed=ALL)
    assert space.left_alone == {
        "layers.1": f"{HERE}.OneDimensional is not decomposed",
        "layers.2": "Conv1d is not decomposed",
    }


def test_a_registered_class_is_decomposed(monkeypatch):
    monkeypatch.setattr(LAYER_CLASSES, "_added", {})
    net = network(Plain(16, 16), Harmless(16, 16))
    x = torch.randn(2, 16)
    assert list(RankSpace(net, x, allowed=ALL).candidates) == ["layers.0"]
    LAYER_CLASSES.register(f"{HERE}.Harmless")(nn.Linear)
    assert list(RankSpace(net, x, allowed=ALL).candidates) == ["layers.0", "layers.1"]
    with torch.no_grad():
        torch.testing.assert_close(compress(net, RankPlan({"layers.1": (16,)}))(x), net(x))
    LAYER_CLASSES.register(f"{HERE}.Standardised")(nn.Linear)  # of another base
    assert "layers.1" not in RankSpace(network(Same(8, 8, 3), Standardised(8, 8, 3)), IMAGES).specs


def test_timms_linear_layer_is_known():
    kind = type("Linear", (Harmless,), {"__module__": "timm.layers.linear"})
    space = RankSpace(network(nn.Linear(16, 16), kind(16, 16)), torch.randn(2, 16), allowed=ALL)
    assert list(space.candidates) == ["layers.0", "layers.1"]
