"""The sampled path as one compiled dense network: the same search as without it."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers.searches import search
from torch import nn

from nni_haloc.search.approach import FeatureMaps
from nni_haloc.search.dense_path import DensePath
from nni_haloc.search.updates import HalocModule
from nni_haloc.space.ranks import AllowedRanks
from nni_haloc.training import compiled
from nni_haloc.utils.errors import SettingsError

COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
OPTIONS = [
    {},
    {"lam": 0.0},
    {"approach_share": 0.25, "alpha_every": 2},
    {"approach": "weights"},
    {"objective": "paper"},
    {"allowed": AllowedRanks(kinds=("conv", "pointwise", "linear"), pin={"stem": 2})},
]


@pytest.fixture
def float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def uncompiled(monkeypatch):
    """Run what would be compiled as it is: the mathematics alone is looked at."""
    monkeypatch.setattr(compiled, "_compiled", lambda network, inputs: network)


def double(net, loaders):
    for loader in loaders:
        loader.dataset.tensors = tuple(
            x.double() if x.is_floating_point() else x for x in loader.dataset.tensors
        )
    return net.double()


def outcome(strategy):
    values = {f"alpha {k}": layer.alpha.detach() for k, layer in strategy.mixed_layers.items()}
    values |= {f"score {k}": torch.tensor(list(r.values())) for k, r in strategy.scores().items()}
    return values | strategy.supernet.state_dict()


@pytest.mark.parametrize("options", OPTIONS)
def test_a_search_by_dense_kernels_is_the_same(
    net, images, loaders, float64, uncompiled, monkeypatch, options, device
):
    """Of every parameter and buffer, alpha and the scores, after two epochs in float64."""
    net, images = double(net, loaders), images.double()
    options = {"alpha_optimizer": "sgd", "epochs": 2, **options}
    runs = []
    plain = FeatureMaps._targets
    monkeypatch.setattr(FeatureMaps, "_targets", lambda *a, **k: runs.append(1) or plain(*a, **k))
    sampled = search(net, images, loaders, **options)
    before = len(runs)
    dense = search(net, images, loaders, compile=True, **options)
    assert len(runs) == before  # nothing has run as ever
    for (name, a), (other, b) in zip(outcome(sampled).items(), outcome(dense).items(), strict=True):
        assert name == other
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    plans = sampled.plan(), dense.plan()
    assert plans[0].ranks == plans[1].ranks
    facts, others = (dict(plan.chosen_by) for plan in plans)
    expected = others.pop("expected_cost")
    assert facts.pop("expected_cost") == pytest.approx(expected, rel=1e-9)
    assert facts == others


class Reused(nn.Module):
    """Calls one layer twice, leaves one out, and writes over an output in place."""

    def __init__(self):
        super().__init__()
        self.stem, self.twice = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.unused, self.head = nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu_(self.stem(x))
        return self.head(torch.relu_(self.twice(torch.relu_(self.twice(x)))).mean((2, 3)))


def test_a_layer_called_twice_and_activations_in_place(
    images, loaders, float64, uncompiled, device
):
    torch.manual_seed(0)
    net, images = double(Reused(), loaders), images.double()
    options = {"alpha_optimizer": "sgd", "epochs": 2}
    found = [outcome(search(net, images, loaders, compile=c, **options)) for c in (False, True)]
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-7, atol=1e-9)


@COMPILER
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_compiled_search_is_the_same_to_float_tolerance(
    net, images, loaders, precision, monkeypatch, device
):
    if device.type == "cpu" and precision != "32-true":  # one program is slow enough to make
        monkeypatch.setattr(compiled, "_compiled", lambda network, inputs: network)
    options = {"alpha_optimizer": "sgd", "precision": precision}
    found = [search(net, images, loaders, compile=c, **options) for c in (False, True)]
    tolerance = 1e-3 if precision == "32-true" else 5e-2
    for (name, a), b in zip(outcome(found[0]).items(), outcome(found[1]).values(), strict=True):
        if a.is_floating_point() and not name.startswith("score"):
            assert float((a - b).norm()) <= tolerance * max(1.0, float(a.norm())), name


def test_shapes_never_change(net, images, loaders, uncompiled, monkeypatch):
    """So that one graph serves every path."""
    shapes, running = set(), DensePath._forward

    def forward(self, *inputs):
        shapes.add(tuple(tuple(dense.kernel.shape) for dense in self.dense))
        return running(self, *inputs)

    monkeypatch.setattr(DensePath, "_forward", forward)
    search(net, images, loaders, epochs=2, compile=True)
    assert len(shapes) == 1


def test_several_processes_are_refused():
    two = SimpleNamespace(trainer=SimpleNamespace(world_size=2))
    with pytest.raises(SettingsError, match="^compile: expected one process, .*; found 2$"):
        HalocModule._compiled(two, None)
