"""Tell which parameters of a network are frozen, and keep them so in what is made of it."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from nni_haloc.space.layers import last_bias
from nni_haloc.utils.log import logger


def trains(parameter: Tensor) -> bool:
    """Tell whether a parameter may have gradients at all: integers have none."""
    return parameter.is_floating_point() or parameter.is_complex()


def is_for_inference(model: nn.Module) -> bool:
    """Tell whether a network was prepared for inference: none of its parameters is trained.

    Then they do not count as frozen: nobody wants a part of the network to stay as it is.

    Args:
        model: the network.
    """
    return not any(parameter.requires_grad for parameter in model.parameters())


def let_train(model: nn.Module, *, told: bool = False) -> None:
    """Have all parameters of a network trained, if it was prepared for inference.

    Args:
        model: the network; changed in place. One that is frozen in part is left as it is.
        told: whether the log need not say so.
    """
    parameters = [parameter for parameter in model.parameters() if trains(parameter)]
    if parameters and is_for_inference(model):
        for parameter in parameters:
            parameter.requires_grad_(True)
        if not told:
            logger.info(
                "no parameter of %s requires gradients: it is taken for a network prepared for"
                " inference, and all of them are trained",
                type(model).__name__,
            )


def keep_frozen(candidate: nn.Module, layer: nn.Module) -> None:
    """Freeze of a layer's candidate what is frozen of the layer: its kernel, its bias.

    Args:
        candidate: what may take the layer's place; changed in place.
        layer: a convolution or linear layer.
    """
    for parameter in candidate.parameters():
        parameter.requires_grad_(cast(Tensor, layer.weight).requires_grad)
    bias = last_bias(candidate)
    if bias is not None:
        bias.requires_grad_(cast(Tensor, layer.bias).requires_grad)
