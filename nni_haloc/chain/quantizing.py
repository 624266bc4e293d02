"""NNI's quantizers: weights and the inputs of layers as 8 bits hold them, simulated in float32."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from nni.compression.quantization import LsqQuantizer, PtqQuantizer, QATQuantizer
from torch import Tensor, nn

from nni_haloc.chain.workarounds import Loop, start_lsq
from nni_haloc.space.modules import evaluating

Quantizer = Literal["ptq", "qat", "lsq"]
Training = Callable[[nn.Module], Any]
_BATCH = 64
"""Of calibration images."""


class Simulated:
    """A network that computes as its 8-bit one would: ``network``; see `simulate`."""

    def __init__(self, network: nn.Module, quantizer: Any) -> None:
        self.network, self._quantizer = network, quantizer

    def calibration(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Layer to ``weight`` or ``_input_0`` to what it is rounded by (``scale``, ``zero_point``, ...), as JSON holds it."""
        found = self._quantizer.get_calibration_config()
        return {
            layer: {name: _plain(row) for name, row in targets.items()}
            for layer, targets in sorted(found.items())
        }

    def unwrapped(self) -> nn.Module:
        """The network with its weights in float32, as they were trained; ``network`` is no longer simulated."""
        self._quantizer.unwrap_model()
        return self.network


def simulate(
    network: nn.Module,
    images: Tensor,
    quantizer: Quantizer = "ptq",
    train: Training = lambda network: None,
) -> Simulated:
    """A copy of ``network`` with the weights and inputs of its convolutions and linear layers rounded to 8 bits, by NNI.

    ``images (N, ...)``: training images on which the ranges are found. ``ptq`` leaves it at that; ``qat`` and ``lsq`` start from the ranges
    of the first 64 and train with the rounding in place: ``train(network)``. Weights have a scale for each output channel, under ``lsq``
    one for all.
    """
    if quantizer not in get_args(Quantizer):
        raise ValueError(
            f"quantizer: expected one of {', '.join(get_args(Quantizer))}, found {quantizer!r}"
        )
    network = copy.deepcopy(network).eval()
    layers = [
        name for name, module in network.named_modules() if type(module) in (nn.Conv2d, nn.Linear)
    ]
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
        with evaluating(network), torch.no_grad():
            for batch in images.split(_BATCH):
                network(batch)

    if quantizer == "ptq":
        made: Any = PtqQuantizer(network, settings, Loop(lambda after_step: None, calibrate))
        made.compress(max_steps=1, max_epochs=None)
        return Simulated(network.eval(), made)
    kind = {"qat": QATQuantizer, "lsq": LsqQuantizer}[quantizer]
    made = kind(
        network, settings, Loop(lambda after_step: train(network))
    )  # both round from the first step on: they have no use for it
    end = start_lsq(made) if quantizer == "lsq" else lambda: None
    for wrapper in made._module_wrappers.values():
        wrapper.training = True  # the quantizer tracks ranges in training alone; BatchNorm must not
    made.track_forward(images[:_BATCH])
    end()
    network.eval()
    made.compress(max_steps=None, max_epochs=1)  # as long as `train` says
    return Simulated(network.eval(), made)


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value.flatten().tolist() if isinstance(value, Tensor) else value
        for key, value in row.items()
    }
