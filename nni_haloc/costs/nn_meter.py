"""Latency by nn-Meter's predictors, or by anything that predicts an ONNX model's latency.

nn-Meter keeps its predictors as pickles, which run code when they are loaded. Nothing is loaded
here: the caller loads a predictor, and so decides to trust it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

from torch import nn

from nni_haloc.costs.device.onnx_models import with_initializers, with_onnx
from nni_haloc.costs.specify import specify
from nni_haloc.costs.table import CostTable
from nni_haloc.space.modules import Example
from nni_haloc.space.names import DENSE
from nni_haloc.space.ranks import AllowedRanks
from nni_haloc.utils.errors import first_line

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
        ValueError: if the predictor can't read a model, or says anything but a number above zero:
            nn-Meter says zero of a graph that has no kernel that it knows.
        MissingPackage: if ONNX is not installed.
    """
    spec = with_onnx(specify(model, example_input, allowed, program=False), model)

    name = type(predictor).__name__

    def predict(onnx_model: bytes | None, what: str) -> float:
        given = _connected(with_initializers(onnx_model or b""))
        try:
            latency = float(predictor.predict(given, model_type="onnx"))
        except Exception as error:  # of many kinds: nn-Meter does not check what it reads
            raise ValueError(
                f"{what}: {name} can't predict its ONNX model "
                f"({type(error).__name__}: {first_line(error)})"
            ) from None
        if not 0 < latency < math.inf:
            raise ValueError(f"{what}: expected a latency above 0 from {name}, found {latency:g}")
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
    identity = {"input": list(spec.input), "device": device, "predictor": name}
    return CostTable("latency_ms", costs, fixed, identity)


def _connected(model: onnx.ModelProto) -> onnx.ModelProto:
    """Put an Identity between each input of a model and its nodes.

    nn-Meter leaves out nodes that have no neighbour, so a layer alone would be nothing.
    """
    from onnx import helper

    for value in model.graph.input:
        name = f"{value.name}/connected"
        for node in model.graph.node:
            node.input[:] = [name if each == value.name else each for each in node.input]
        model.graph.node.insert(0, helper.make_node("Identity", [value.name], [name], name))
    return model
