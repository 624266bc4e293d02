"""Quantize ONNX models to 8 bits by ONNX Runtime's static quantization. It needs no PyTorch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nni_haloc.costs.device.onnx_session import clear_errors
from nni_haloc.utils.errors import first_line, needs
from nni_haloc.utils.quiet import quietly

Feeds = Mapping[str, Any]
"""Arrays of a model's inputs, by their names."""


def quantize_model(
    source: str | Path, batches: Iterable[Feeds], file: str | Path, **options: Any
) -> None:
    """Write an ONNX model in 8 bits: weights, with a scale for each channel, and activations.

    Args:
        source: the ONNX file in float32.
        batches: inputs, which give the activations their ranges.
        file: the new ONNX file.
        options: others of `onnxruntime.quantization.quantize_static`.

    Raises:
        RuntimeError: if the model can't be quantized.
        MissingPackage: if the package onnx is not installed.
    """
    with check_onnx(), quietly(), TemporaryDirectory() as folder:
        from onnxruntime.quantization import (
            CalibrationMethod,
            QuantFormat,
            QuantType,
            quantize_static,
        )
        from onnxruntime.quantization.shape_inference import quant_pre_process

        defaults = {
            "quant_format": QuantFormat.QDQ,
            "per_channel": True,
            # A processor without VNNI adds pairs of products in 16 bits, which overflow unless
            # weights have 7 bits. Other types are slower.
            "activation_type": QuantType.QUInt8,
            "weight_type": QuantType.QInt8,
            "reduce_range": True,
            "calibrate_method": CalibrationMethod.MinMax,
        }
        prepared = Path(folder) / "prepared.onnx"
        try:
            with clear_errors():
                quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
                quantize_static(prepared, file, _Reader(batches), **{**defaults, **options})
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
            raise RuntimeError(f"can't be quantized: {first_line(error)}") from None


def check_onnx() -> Any:
    """Return a context in which the packages of ONNX Runtime's quantization are installed.

    Raises:
        MissingPackage: if one of them is not.
    """
    what = "ONNX Runtime in int8"
    return needs("onnx", "onnxruntime", what=what, install="nni-haloc[onnx]")


class _Reader:
    """Hands ONNX Runtime the calibration inputs, batch by batch."""

    def __init__(self, batches: Iterable[Feeds]) -> None:
        self.batches: Iterator[Feeds] = iter(batches)

    def get_next(self) -> Feeds | None:
        return next(self.batches, None)
