"""Decomposed layers against the dense ones, over the geometries that a convolution can have."""

import pytest
import torch
from helpers.geometries import GEOMETRIES, convolution
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nni_haloc.space.layers import LayerSpec, TuckerConv2d, kernel_factors
from nni_haloc.space.ranks import macs, params
from nni_haloc.space.tucker import decompose, reconstruct


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_at_full_rank_the_tucker_layer_is_the_dense_one(geometry):
    torch.manual_seed(0)
    conv, x = convolution(geometry), torch.randn(2, 4, 9, 10, dtype=torch.float64)
    spec = LayerSpec.of("conv", conv, (tuple(x.shape),))
    (factors,) = decompose(conv.weight, [(5, 4)], "hosvd")
    layer = spec.assemble(factors, conv.bias).double()
    with torch.no_grad():
        for target, value in zip(layer.factors(), factors, strict=True):
            target.copy_(
                value.reshape(target.shape)
            )  # in float64; assembling is in torch's default precision
    torch.testing.assert_close(
        layer(x), conv(x), atol=1e-6 if conv.bias is not None else 1e-10, rtol=1e-7
    )
    torch.testing.assert_close(
        nn.functional.conv2d(spec.pad(x), conv.weight, conv.bias, conv.stride, 0, conv.dilation),
        conv(x),
    )
    assert spec.output_shape(tuple(x.shape)) == tuple(conv(x).shape)


@pytest.mark.parametrize("geometry", GEOMETRIES[::7], ids=str)
@pytest.mark.parametrize("rank", [None, (3, 2)])
def test_counts_are_those_of_torchs_counter(geometry, rank):
    conv, x = convolution(geometry).float(), torch.randn(1, 4, 9, 10)
    spec = LayerSpec.of("conv", conv, (tuple(x.shape),))
    layer = spec.build(rank)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert 2 * macs(spec, rank) == counter.get_total_flops()
    assert params(spec, rank) == sum(p.numel() for p in layer.parameters())


@pytest.mark.parametrize("stride", [1, 2])
def test_pointwise_and_linear_layers_are_two_factors(stride):
    torch.manual_seed(0)
    conv, linear = nn.Conv2d(6, 5, 1, stride, padding=1), nn.Linear(6, 5)
    for module, x in ((conv, torch.randn(2, 6, 7, 7)), (linear, torch.randn(2, 3, 6))):
        spec = LayerSpec.of("layer", module, (tuple(x.shape),))
        layer = spec.assemble(decompose(module.weight.flatten(1), [(5,)])[0], module.bias)
        torch.testing.assert_close(layer(x), module(x), atol=1e-5, rtol=1e-5)
        assert spec.output_shape(tuple(x.shape)) == tuple(module(x).shape)
        with FlopCounterMode(display=False) as counter:
            spec.build((3,))(x)
        assert 2 * macs(spec, (3,)) * 2 == counter.get_total_flops()  # a batch of two
        assert params(spec, (3,)) == sum(p.numel() for p in spec.build((3,)).parameters())


def test_a_tucker_layer_is_three_plain_convolutions():
    layer = LayerSpec.of("conv", nn.Conv2d(8, 6, 3, 2, 1)).build((4, 2))
    assert isinstance(layer, TuckerConv2d)
    assert [type(m) for m in layer] == [nn.Conv2d] * 3
    assert (layer.core.stride, layer.core.padding, layer.factor_in.bias, layer.core.bias) == (
        (2, 2),
        (1, 1),
        None,
        None,
    )
    assert reconstruct(layer.factors()).shape == (6, 8, 3, 3)
    assert len(kernel_factors(layer)) == 3


def test_layers_that_cannot_be_decomposed_are_refused_by_name():
    with pytest.raises(TypeError, match="down.*ungrouped"):
        LayerSpec.of("down", nn.Conv2d(4, 4, 3, groups=2))
