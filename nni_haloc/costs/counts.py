"""Count a network: multiply-accumulates and parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nni_haloc.space.modules import Example, batch_size_of, call, copy_of


def network_counts(model: nn.Module, example_input: Tensor) -> dict[str, int]:
    """Count multiply-accumulates for one image, plain and as the paper does, and parameters.

    Args:
        model: the network.
        example_input: ``(N, ...)``.
    """
    return {
        "MACs (convolutions and matrix products)": count_macs(model, example_input),
        "MACs (the paper's count: normalisation and pooling, too)": count_paper_macs(
            model, example_input
        ),
        "parameters": count_params(model),
    }


def count_macs(model: nn.Module, example_input: Example) -> int:
    """Count the multiply-accumulates of one image's forward pass, by torch's own counter.

    Convolutions and matrix products are counted; biases, normalisation and activations are not.

    Args:
        model: the network.
        example_input: ``(N, ...)``; the count is divided by N.
    """
    return _counted(model, example_input, {})


def count_paper_macs(model: nn.Module, example_input: Example) -> int:
    """Count multiply-accumulates as the paper's tables do, which is as the package `thop` does.

    It is `count_macs`, plus two for each number that batch normalisation returns, and one for each
    number that goes into an average pooling or comes out of it. ResNet-18 has 1,819.07 M by this
    count, MobileNetV2 314.19 M.

    Args:
        model: the network.
        example_input: ``(N, ...)``; the count is for one image.
    """

    def normalised(x: torch.Size, *args: Any, **kwargs: Any) -> int:
        return 4 * math.prod(x)

    def averaged(x: torch.Size, *args: Any, out_shape: torch.Size, **kwargs: Any) -> int:
        return 2 * (math.prod(x) + math.prod(out_shape))

    aten = torch.ops.aten
    norms = (
        aten.native_batch_norm,
        aten._native_batch_norm_legit_no_training,
        aten.cudnn_batch_norm,
    )
    means = (aten.mean, aten._adaptive_avg_pool2d, aten.avg_pool2d)
    return _counted(
        model, example_input, {**dict.fromkeys(norms, normalised), **dict.fromkeys(means, averaged)}
    )


def _counted(
    model: nn.Module, example_input: Example, more: Mapping[Any, Callable[..., int]]
) -> int:
    """Return half of the floating-point operations for one image.

    ``more`` maps operators that torch does not count to functions that do. Attention is run as
    matrix products, because torch does not count all of its fused operations.
    """
    model = copy_of(model).eval()
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False, custom_mapping=dict(more)) as counter,
    ):
        call(model, example_input)
    return counter.get_total_flops() // (2 * batch_size_of(example_input))


def count_params(model: nn.Module) -> int:
    """Count the parameters, shared ones once."""
    return sum(p.numel() for p in model.parameters())
