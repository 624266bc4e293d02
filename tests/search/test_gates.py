"""The gate gradient against running every candidate, in float64."""

import numpy as np
import pytest
import torch
from helpers.geometries import GEOMETRIES, convolution
from nni.mutable.frozen import frozen_context
from torch import nn

from nni_haloc.search import gates, supernet
from nni_haloc.search.gates import RunningMean, gate, sample
from nni_haloc.search.supernet import MixedRankLayer
from nni_haloc.space.layers import LayerSpec


def mixed(module, x, ranks):
    """A mixed layer in float64 with unlike random weights in every candidate."""
    spec = LayerSpec.of("layer", module, (tuple(x.shape),))
    candidates = {f"c{i}": spec.build(rank).double() for i, rank in enumerate(ranks)}
    with frozen_context():
        return MixedRankLayer(
            candidates, nn.Parameter(torch.randn(len(ranks), dtype=torch.float64)), spec
        )


def oracle(layer, x, loss):
    """ProxylessNAS as written: dL/dy at the sampled path, its inner product with every candidate's
    output, the softmax's Jacobian.
    """
    with torch.enable_grad():
        y = layer[layer.names[layer.sampled]](x).detach().requires_grad_()
        (grad_y,) = torch.autograd.grad(loss(y), y)
    with torch.no_grad():
        g = torch.stack([(grad_y * candidate(x)).sum() for candidate in layer])
    p = torch.softmax(layer.alpha / layer.temperature, -1).detach()
    return p * (g - p @ g) / layer.temperature, g


@pytest.fixture(params=[(True, True), (True, False), (False, True), (False, False)], ids=str)
def way(request, monkeypatch):
    """Each way to run the sampled candidate (dense kernel, factors) with each way to take the
    gradients (contraction, all candidates).
    """
    monkeypatch.setattr(supernet, "runs_dense", lambda *_: request.param[0])
    monkeypatch.setattr(gates, "contracts", lambda *_: request.param[1])


def check(module, x, ranks):
    layer = mixed(module, x, ranks)
    layer.temperature, layer.searching = 0.7, True
    target = None

    def loss(y):
        nonlocal target
        target = torch.randn_like(y) if target is None else target
        return ((y - target) ** 3).sum()

    for sampled in range(len(ranks)):
        layer.sampled = sampled
        expected, g = oracle(layer, x, loss)
        x_ = x.clone().requires_grad_()
        by_alpha, by_x = torch.autograd.grad(loss(layer(x_)), [layer.alpha, x_])
        torch.testing.assert_close(
            by_alpha, expected, rtol=1e-10, atol=1e-10 * float(g.abs().max())
        )
        plain = x.clone().requires_grad_()
        torch.testing.assert_close(
            by_x, torch.autograd.grad(loss(layer[layer.names[sampled]](plain)), plain)[0]
        )


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_alpha_gradient_equals_running_every_candidate(geometry, way):
    torch.manual_seed(0)
    check(
        convolution(geometry),
        torch.randn(3, 4, 9, 10, dtype=torch.float64),
        [None, (3, 2), (2, 2), (5, 4)],
    )


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_alpha_gradient_of_pointwise_and_linear_layers(stride, bias, way):
    torch.manual_seed(0)
    check(
        nn.Conv2d(6, 5, 1, stride, padding=1, bias=bias),
        torch.randn(3, 6, 7, 7, dtype=torch.float64),
        [None, (2,), (4,)],
    )
    check(nn.Linear(6, 5, bias), torch.randn(3, 6, dtype=torch.float64), [None, (2,), (4,)])
    check(nn.Linear(6, 5, bias), torch.randn(3, 2, 4, 6, dtype=torch.float64), [None, (2,), (4,)])


def test_a_layer_called_twice_sums_the_gradients_of_its_calls(way):
    torch.manual_seed(0)
    x = torch.randn(3, 4, 9, 10, dtype=torch.float64)
    layer = mixed(convolution({"kernel_size": 3, "padding": 1}, f=4), x, [None, (2, 2)])
    layer.searching = True

    def gradients(*losses):
        """Of alpha, and of the gates, which the scores of plans are made of."""
        layer.pending = None
        (of_alpha,) = torch.autograd.grad(sum(each() for each in losses), layer.alpha)
        return of_alpha, layer.pending

    def first():
        return (layer(x) * 2).sum()

    def second():
        return (layer(2 * x) ** 2).sum()

    for both, one, other in zip(
        gradients(first, second), gradients(first), gradients(second), strict=True
    ):
        torch.testing.assert_close(both, one + other)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_weight_gradients_are_the_same_by_dense_kernel_and_by_factors(geometry, monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(3, 4, 9, 10, dtype=torch.float64)
    layer = mixed(convolution(geometry), x, [None, (3, 2)])
    for layer.sampled in (0, 1):
        found = []
        for dense in (True, False):
            monkeypatch.setattr(supernet, "runs_dense", lambda *_, dense=dense: dense)
            leaf = x.clone().requires_grad_()
            found.append(
                torch.autograd.grad(
                    (layer(leaf) ** 3).sum(),
                    [leaf, *layer[layer.names[layer.sampled]].parameters()],
                )
            )
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("searching", [True, False])
@pytest.mark.parametrize("channels", [4, 64])
def test_no_unsampled_candidate_runs(searching, channels):
    """In 4 channels the sampled one runs by its dense kernel, in 64 by its factors."""
    torch.manual_seed(0)
    x = torch.randn(8, channels, 16, 16, requires_grad=True)
    conv = nn.Conv2d(channels, channels, 3)
    layer = mixed(conv, x.detach(), [None, (2, 2), (3, 3)]).float()
    calls = []
    for name in layer.names:
        layer[name].register_forward_hook(lambda *_, name=name: calls.append(name))
    layer.searching, layer.sampled = searching, 1
    layer(x).sum().backward()
    assert calls == (["c1"] if channels == 64 else [])


def test_gate_gradients_under_bf16_are_those_of_float64_to_its_precision(way):
    torch.manual_seed(0)
    x = torch.randn(16, 16, 12, 12, dtype=torch.float64)
    layer = mixed(nn.Conv2d(16, 16, 3, padding=1), x, [None, (4, 4), (8, 8), (12, 12)])
    layer.searching, layer.sampled = True, 2
    target = torch.randn(16, 16, 12, 12)
    (expected,) = torch.autograd.grad((layer(x) * target).sum(), layer.alpha)
    layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = torch.autograd.grad((layer(x.float()) * target).sum(), layer.alpha)
    assert float((found.double() - expected).norm() / expected.norm()) < 0.02


def test_without_searching_alpha_takes_no_part():
    x = torch.randn(3, 4, 9, 10, dtype=torch.float64)
    layer = mixed(convolution({"kernel_size": 3}), x, [None, (2, 2)])
    layer(x).sum().backward()
    assert layer.alpha.grad is None


def test_the_gate_hands_its_input_through_and_may_be_written_into():
    y = torch.randn(5, requires_grad=True)
    p = torch.full((2,), 0.5, requires_grad=True)
    out = gate(y * 1, p, torch.randn(5), lambda x, grad: torch.stack([grad.sum(), -grad.sum()]))
    torch.testing.assert_close(out, y)
    out.mul_(2)
    by_y, by_p = torch.autograd.grad((out * 3).sum(), [y, p])
    torch.testing.assert_close(by_y, torch.full((5,), 6.0))
    torch.testing.assert_close(by_p, torch.tensor([30.0, -30.0]))


def test_sampling_follows_the_probabilities():
    generator = np.random.default_rng(0)
    p = np.array([0.1, 0.6, 0.0, 0.3])
    counts = np.bincount([sample(p, generator) for _ in range(4000)], minlength=4)
    assert counts / 4000 == pytest.approx(p, abs=0.03)
    assert counts[2] == 0


def test_the_running_mean_is_centred_and_skips_what_is_not_finite():
    mean = RunningMean(3)
    p = np.array([0.5, 0.25, 0.25])
    for g in ([1.0, 2.0, 3.0], [float("nan"), 0.0, 0.0], [3.0, 0.0, 1.0]):
        mean.add(np.array(g), p)
    expected = (np.array([1.0, 2.0, 3.0]) - 1.75 + np.array([3.0, 0.0, 1.0]) - 1.75) / 2
    assert mean.mean == pytest.approx(expected)
