"""NNI's quantizers, each described by what it rounds; a new one is one more, and registered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nni.compression.quantization import (
    BNNQuantizer,
    LsqPlusQuantizer,
    LsqQuantizer,
    PtqQuantizer,
    QATQuantizer,
)

from nni_haloc.chain.workarounds import DoReFaQuantizer, start_lsq, start_lsq_plus

Values = Mapping[str, Any]
_SYMMETRIC: Values = {"quant_dtype": "int8", "quant_scheme": "symmetric"}
_AFFINE: Values = {"quant_dtype": "int8", "quant_scheme": "affine"}
_NO_STEPS: Values = {"quant_dtype": None}
_BY_CHANNEL: Values = {**_SYMMETRIC, "granularity": "out_channel"}


@dataclass(frozen=True)
class Quantizer:
    """Describe one of NNI's quantizers.

    Attributes:
        kind: makes it of a network, NNI's settings and a `Loop`.
        weight: NNI's settings of the weights of convolutions and linear layers.
        inputs: NNI's settings of these layers' inputs; None: they are not rounded.
        trains: whether the network is trained with the rounding in place.
        start: called before the first pass, to set scales by it; it returns what to call after it.
        replaces: of quantizers that compute with other weights than rounded ones: the scale of
            these, and their bits. The weights of the result are those that it computes with, and
            BatchNorm's statistics are recalibrated.
    """

    kind: Callable[..., Any]
    weight: Values
    inputs: Values | None
    trains: bool = True
    start: Callable[[Any], Callable[[], None]] | None = None
    replaces: tuple[float, int] | None = None

    def settings(self, layers: list[str]) -> list[dict[str, Any]]:
        """Make NNI's list of settings.

        Args:
            layers: names of convolutions and linear layers.
        """
        targets = {"weight": dict(self.weight)}
        if self.inputs is not None:
            targets["_input_"] = dict(self.inputs)
        names = {"op_names": layers, "target_names": [*targets]}
        return [{**names, "target_settings": targets, "quant_dtype": None}]  # NNI wants that key


PTQ = Quantizer(PtqQuantizer, _BY_CHANNEL, _SYMMETRIC, trains=False)
QAT = Quantizer(QATQuantizer, _BY_CHANNEL, _SYMMETRIC)
LSQ = Quantizer(LsqQuantizer, _SYMMETRIC, _SYMMETRIC, start=start_lsq)
LSQ_PLUS = Quantizer(LsqPlusQuantizer, _AFFINE, _AFFINE, start=start_lsq_plus)
DOREFA = Quantizer(DoReFaQuantizer, _AFFINE, _SYMMETRIC, replaces=(1 / 127, 8))
BNN = Quantizer(BNNQuantizer, _NO_STEPS, None, replaces=(1.0, 1))
