"""Latency by nn-Meter's predictors, or by anything that predicts an ONNX model's latency."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import nn

from nni_haloc.costs.device.onnx_models import with_initializers, with_onnx
from nni_haloc.costs.specify import specify
from nni_haloc.costs.table import CostTable
from nni_haloc.space.modules import Example
from nni_haloc.space.names import DENSE
from nni_haloc.space.ranks import AllowedRanks

if TYPE_CHECKING:
    import onnx


class LatencyPredictor(Protocol):
    """nn-Meter's interface: ``nn_meter.load_latency_predictor("cortexA76cpu_tflite21")``."""

    def predict(self, model: onnx.ModelProto, model_type: str = "onnx") -> float:
        """Return the milliseconds of an ONNX model."""


def predicted_table(
    model: nn.Module,
    example_input: Example,
    predictor: LatencyPredictor,
    allowed: AllowedRanks = AllowedRanks(),
    device: str = "",
) -> CostTable:
    """Predict the milliseconds of every candidate, each given as a whole ONNX model of its layers.

    Args:
        model: the original network.
        example_input: the batch, ``(N, ...)``.
        predictor: predicts the latency of an ONNX model.
        allowed: the rank space.
        device: its name, for the table's identity.

    Raises:
        ValueError: if the predictor says zero or less, as nn-Meter does of a graph that it can't
            take apart into kernels that it knows.
        MissingPackage: if ONNX is not installed.
    """
    spec = with_onnx(specify(model, example_input, allowed, program=False), model)

    def predict(onnx_model: bytes | None, what: str) -> float:
        latency = float(predictor.predict(with_initializers(onnx_model or b""), model_type="onnx"))
        if not latency > 0:
            raise ValueError(
                f"{what}: expected a latency above 0 from {type(predictor).__name__}, "
                f"found {latency}"
            )
        return latency

    latencies = {
        i: predict(spec.entries[i].onnx, f"layer {home[0]!r}, candidate {home[1]!r}")
        for i, home in spec.first_users().items()
    }
    costs = {
        layer: {candidate: latencies[index] for candidate, index in row.items()}
        for layer, row in spec.layers.items()
    }
    fixed = max(0.0, predict(spec.onnx, "the network") - sum(row[DENSE] for row in costs.values()))
    identity = {"input": list(spec.input), "device": device, "predictor": type(predictor).__name__}
    return CostTable("latency_ms", costs, fixed, identity)
