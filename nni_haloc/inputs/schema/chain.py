"""The sections ``prune`` and ``quantize``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from nni_haloc.inputs.options import Ranks, Schedule, SparsitySchedule
from nni_haloc.inputs.schema.training import Distilled
from nni_haloc.inputs.schema.values import (
    Count,
    CountOrNone,
    Positive,
    PrunerName,
    QuantizerName,
)


class Prune(Distilled):
    """Pruning by NNI (see `nni_haloc.prune`), and the fine-tuning after it."""

    epochs: CountOrNone = 10
    """Rounds of the fine-tuning after pruning."""
    lr: Positive = 0.02
    """Learning rate of SGD, the highest one of the schedule. The one of the training in which
    `slim`, `movement` and the schedules of sparsity choose."""
    pruner: PrunerName = "l1"
    """NNI's [pruner](how-to/prune-and-quantize.md#pruners)."""
    sparsity: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Share of the output channels to remove of each layer that is pruned; with `level`, of the
    weights."""
    ranks: Ranks = "keep"
    """Whether ranks are kept, or pruned like channels. Kept ranks don't count in `sparsity`."""
    sparsity_schedule: SparsitySchedule = "none"
    """How sparsity rises while the network trains on `batches`: `linear`, or `agp`, which is fast
    at first; `none` prunes at once. `movement` has a schedule of its own."""
    batches: Count = 20
    """Training batches that `taylor` takes its gradients from, and that the network trains on while
    `slim`, `movement` or a schedule of sparsity choose. For these some hundred are better."""


class Quantize(Distilled):
    """Quantizing by NNI (see `nni_haloc.quantize`), and its training, which ``ptq`` has none of."""

    epochs: CountOrNone = 2
    """Rounds over the training images with all quantizers but `ptq`."""
    lr: Positive = 0.001
    """Learning rate of SGD."""
    schedule: Schedule = "constant"
    """How the learning rate changes, as in `finetune.schedule`."""
    quantizer: QuantizerName = "ptq"
    """NNI's [quantizer](how-to/prune-and-quantize.md#quantize)."""
    calibration_images: Count = 512
    """Training images that the ranges are measured on."""
    int8: bool = True
    """Whether the network is quantized for ONNX Runtime, too."""

    @model_validator(mode="after")
    def _watched_by_nni(self) -> Quantize:
        if self.compile:
            raise ValueError("compile: expected false, because NNI's quantizers run eagerly")
        return self
