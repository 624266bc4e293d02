"""NNI's quantizers: they simulate weights and inputs of layers in few bits, in float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nni_haloc.chain.quantizers import Quantizer
from nni_haloc.chain.workarounds import Loop
from nni_haloc.inputs.registries import QUANTIZERS
from nni_haloc.space.modules import copy_of, evaluating
from nni_haloc.space.replaceable import class_of
from nni_haloc.training.finetuning import recalibrate
from nni_haloc.utils.errors import expected_one_of
from nni_haloc.utils.placement import accelerated

Training = Callable[[nn.Module], Any]
_BATCH = 64
"""Calibration images that are run at once."""


class Simulated:
    """A network that computes as its quantized version would; see `quantize`.

    Attributes:
        network: the network, with the rounding in place.
    """

    def __init__(self, network: nn.Module, quantizer: Any, kind: Quantizer) -> None:
        self.network, self._quantizer, self._kind = network, quantizer, kind

    def calibration(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Return how each layer's tensors are rounded, in a form for JSON.

        Returns:
            Layer name to ``weight`` or ``_input_0`` to ``scale``, ``zero_point`` and others. The
            weights are those of `unwrapped`.
        """
        config = self._quantizer.get_calibration_config()
        found = {
            layer: {name: _plain(row) for name, row in targets.items()}
            for layer, targets in sorted(config.items())
        }
        if self._kind.replaces is not None:
            scale, bits = self._kind.replaces
            facts = {"scale": [scale], "zero_point": [0.0], "quant_bits": bits}
            for row in found.values():
                row["weight"] = {**facts, "quant_dtype": f"int{bits}", "quant_scheme": "symmetric"}
        return found

    def unwrapped(self) -> nn.Module:
        """Take out the rounding and return the network in float32.

        Its weights are as trained, not rounded; with ``dorefa`` and ``bnn`` they are those that the
        quantized network computes with.
        """
        if self._kind.replaces is not None:
            with torch.no_grad():
                for wrapper in self._quantizer._module_wrappers.values():
                    space = wrapper.quantization_target_spaces["weight"]
                    wrapper.weight.copy_(wrapper._apply_quant_helper(wrapper.weight, space))
        self._quantizer.unwrap_model()
        return self.network


def quantize(
    network: nn.Module,
    images: Tensor,
    quantizer: str = "ptq",
    train: Training = lambda network: None,
) -> Simulated:
    """Round the weights and inputs of a copy's convolutions and linear layers to 8 bits, by NNI.

    Weights have a scale for each output channel with ``ptq`` and ``qat``, else one for the layer.

    Args:
        network: the network; it is left as it is.
        images: training images from which the ranges are taken, ``(N, ...)``.
        quantizer: ``ptq`` only takes the ranges; the others train with the rounding in place.
            ``qat``, ``lsq`` and ``lsq+`` (which has zero points) start from the ranges of the first
            64 images. ``dorefa`` divides the tanh of a layer's weights by the largest one, and
            ``bnn`` leaves their signs alone and inputs as they are; both recalibrate BatchNorm on
            the images first, because it has to take up the other sizes.
        train: trains the network that it is given, for all but ``ptq``.

    Returns:
        The copy, in evaluation mode, which computes as its quantized version would.

    Raises:
        ValueError: for an unknown quantizer, or if there is no layer to quantize.
    """
    if quantizer not in QUANTIZERS:
        raise ValueError(f"quantizer: {expected_one_of(QUANTIZERS, quantizer)}")
    kind: Quantizer = QUANTIZERS[quantizer]
    network = copy_of(network).eval()
    settings = kind.settings(_layers(network))

    def calibrate() -> None:
        with evaluating(network), accelerated(network) as device, torch.no_grad():
            for batch in images.split(_BATCH):
                network(batch.to(device))

    if not kind.trains:
        made = kind.kind(network, settings, Loop(lambda loop: None, calibrate))
        made.compress(max_steps=1, max_epochs=None)
        return Simulated(network.eval(), made, kind)
    home = next(network.parameters()).device
    made = kind.kind(network, settings, Loop(lambda loop: _train(network, train, loop)))
    end = kind.start(made) if kind.start else lambda: None
    for wrapper in made._module_wrappers.values():
        # The quantizer tracks ranges only in training mode, in which BatchNorm must not be.
        wrapper.training = True
    with accelerated(network):
        made.track_forward(images[:_BATCH])
    end()
    network.eval()
    if kind.replaces is not None:
        batches = images.split(_BATCH)
        recalibrate(network, [(batch, None) for batch in batches], len(batches))
    made.compress(max_steps=None, max_epochs=1)  # as long as `train` says
    network.eval()
    if hasattr(made, "fix_ranges"):
        with accelerated(network):
            made.fix_ranges(images[:_BATCH])
    return Simulated(network.to(home), made, kind)


def _layers(network: nn.Module) -> list[str]:
    """Name the layers to quantize, which become NNI's classes.

    Raises:
        ValueError: if there are none.
    """
    layers = []
    for name, module in network.named_modules():
        if (base := class_of(module)) is not None:
            module.__class__ = base  # NNI knows no subclass, though it computes the same
            layers.append(name)
    if not layers:
        raise ValueError(
            f"nothing to quantize in {type(network).__name__}: no convolution or linear layer"
        )
    return layers


def _train(network: nn.Module, train: Training, loop: Loop) -> None:
    """Train a wrapped network. What NNI does after a step is done before the next pass."""

    def after_step(network: nn.Module, _: Any) -> None:
        if network.training:
            loop.after_step()

    hook = network.register_forward_pre_hook(after_step)
    try:
        train(network)
    finally:
        hook.remove()
    loop.after_step()


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value.detach().flatten().tolist() if isinstance(value, Tensor) else value
        for key, value in row.items()
    }
