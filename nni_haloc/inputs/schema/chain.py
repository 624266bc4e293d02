"""The sections ``prune`` and ``quantize``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from nni_haloc.inputs.options import Pruner, Quantizer, Schedule
from nni_haloc.inputs.schema.training import Distilled
from nni_haloc.inputs.schema.values import Count, CountOrNone, Positive


class Prune(Distilled):
    """Pruning by NNI (see `nni_haloc.prune`), and the fine-tuning after it."""

    epochs: CountOrNone = 10
    """Rounds of the fine-tuning after pruning."""
    lr: Positive = 0.02
    """Learning rate of SGD, the highest one of the schedule."""
    pruner: Pruner = "l1"
    """NNI's pruner."""
    sparsity: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Share of the channels to remove."""
    batches: Count = 20
    """Training batches that `taylor` takes its gradients from."""


class Quantize(Distilled):
    """Quantizing by NNI (see `nni_haloc.quantize`), and its training, which ``ptq`` has none of."""

    epochs: CountOrNone = 2
    """Rounds over the training images in `qat` and `lsq`."""
    lr: Positive = 0.001
    """Learning rate of SGD."""
    schedule: Schedule = "constant"
    """How the learning rate changes, as in `finetune.schedule`."""
    quantizer: Quantizer = "ptq"
    """NNI's quantizer."""
    calibration_images: Count = 512
    """Training images that the ranges are measured on."""
    int8: bool = True
    """Whether the network is quantized for ONNX Runtime, too."""

    @model_validator(mode="after")
    def _watched_by_nni(self) -> Quantize:
        if self.compile:
            raise ValueError("compile: expected false, because NNI's quantizers run eagerly")
        return self
