"""NNI's quantizers: they simulate 8-bit weights and inputs of layers in float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, get_args

import torch
from nni.compression.quantization import LsqQuantizer, PtqQuantizer, QATQuantizer
from torch import Tensor, nn

from nni_haloc.chain.workarounds import Loop, start_lsq
from nni_haloc.inputs.options import Quantizer
from nni_haloc.space.modules import copy_of, evaluating
from nni_haloc.space.replaceable import class_of
from nni_haloc.utils.placement import accelerated

Training = Callable[[nn.Module], Any]
_BATCH = 64
"""Calibration images that are run at once."""


class Simulated:
    """A network that computes as its 8-bit version would; see `quantize`.

    Attributes:
        network: the network, with the rounding in place.
    """

    def __init__(self, network: nn.Module, quantizer: Any) -> None:
        self.network, self._quantizer = network, quantizer

    def calibration(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Return how each layer's tensors are rounded, in a form for JSON.

        Returns:
            Layer name to ``weight`` or ``_input_0`` to ``scale``, ``zero_point`` and others.
        """
        config = self._quantizer.get_calibration_config()
        return {
            layer: {name: _plain(row) for name, row in targets.items()}
            for layer, targets in sorted(config.items())
        }

    def unwrapped(self) -> nn.Module:
        """Take out the rounding and return the network, its weights as trained, in float32."""
        self._quantizer.unwrap_model()
        return self.network


def quantize(
    network: nn.Module,
    images: Tensor,
    quantizer: Quantizer = "ptq",
    train: Training = lambda network: None,
) -> Simulated:
    """Round the weights and inputs of a copy's convolutions and linear layers to 8 bits, by NNI.

    Weights have a scale for each output channel, with ``lsq`` one for the whole layer.

    Args:
        network: the network; it is left as it is.
        images: training images from which the ranges are taken, ``(N, ...)``.
        quantizer: ``ptq`` only takes the ranges; ``qat`` and ``lsq`` start from those of the first
            64 images and train with the rounding in place.
        train: trains the network that it is given, for ``qat`` and ``lsq``.

    Returns:
        The copy, in evaluation mode, which computes as its 8-bit version would.

    Raises:
        ValueError: for an unknown quantizer, or if there is no layer to quantize.
    """
    if quantizer not in get_args(Quantizer):
        raise ValueError(
            f"quantizer: expected one of {', '.join(get_args(Quantizer))}, found {quantizer!r}"
        )
    network = copy_of(network).eval()
    layers = []
    for name, module in network.named_modules():
        if (base := class_of(module)) is not None:
            module.__class__ = base  # NNI knows no subclass, though it computes the same
            layers.append(name)
    if not layers:
        raise ValueError(
            f"nothing to quantize in {type(network).__name__}: no convolution or linear layer"
        )
    eight = {"quant_dtype": "int8", "quant_scheme": "symmetric"}
    weight = {**eight, "granularity": "default" if quantizer == "lsq" else "out_channel"}
    settings = [
        {
            "op_names": layers,
            "target_names": ["_input_", "weight"],
            "target_settings": {"weight": weight},
            **eight,
        }
    ]

    def calibrate() -> None:
        with evaluating(network), accelerated(network) as device, torch.no_grad():
            for batch in images.split(_BATCH):
                network(batch.to(device))

    if quantizer == "ptq":
        made: Any = PtqQuantizer(network, settings, Loop(lambda after_step: None, calibrate))
        made.compress(max_steps=1, max_epochs=None)
        return Simulated(network.eval(), made)
    home = next(network.parameters()).device
    kind = {"qat": QATQuantizer, "lsq": LsqQuantizer}[quantizer]
    # Both round from the first step on, so they have no use for `after_step`.
    made = kind(network, settings, Loop(lambda after_step: train(network)))
    end = start_lsq(made) if quantizer == "lsq" else lambda: None
    for wrapper in made._module_wrappers.values():
        # The quantizer tracks ranges only in training mode, in which BatchNorm must not be.
        wrapper.training = True
    with accelerated(network):
        made.track_forward(images[:_BATCH])
    end()
    network.eval()
    made.compress(max_steps=None, max_epochs=1)  # as long as `train` says
    return Simulated(network.to(home).eval(), made)


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value.flatten().tolist() if isinstance(value, Tensor) else value
        for key, value in row.items()
    }
