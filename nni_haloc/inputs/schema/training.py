"""The sections of trainings: ``finetune``, ``train`` and ``trainer``, and what others build on."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from nni_haloc.inputs.options import Schedule
from nni_haloc.inputs.schema.section import Section
from nni_haloc.inputs.schema.values import (
    Count,
    CountOrNone,
    LoggerName,
    NonNegative,
    Positive,
    Processes,
)


class Training(Section):
    """How a network is trained; see `nni_haloc.Recipe`."""

    epochs: CountOrNone
    """Rounds over the training images."""
    lr: Positive = 0.1
    """Learning rate of SGD, the highest one of the schedule."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of SGD."""
    weight_decay: NonNegative = 1e-4
    """Weight decay of SGD."""
    schedule: Schedule = "step"
    """How the learning rate changes: `step` multiplies it by 0.2 at each quarter of the training,
    `onecycle` raises it and lets it fall to 0, `constant` keeps it."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Lightning's precision. `bf16-mixed` trains ResNet-20 1.8 times as fast as float32 on a
    processor that has bf16 instructions."""
    compile: bool = False
    """Whether passes run as captured graphs (CUDA) or compiled programs (processor):
    [compiled passes](how-to/train-faster.md#compiled-passes)."""


class Distilled(Training):
    """A training that the original network may teach."""

    distill: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the loss that is distillation from the original (temperature 4). The rest is
    cross-entropy."""


class Finetune(Distilled):
    """The fine-tuning of the compressed network."""

    epochs: CountOrNone = 10
    """Rounds over the training images. 0: no fine-tuning."""
    distill_features: NonNegative = 0.0
    """λ of Eq. 9 in fine-tuning: weight of the mean squared distance between the searched layers'
    outputs and the original's, summed over layers."""

    @model_validator(mode="after")
    def _seen_from_outside(self) -> Finetune:
        if self.compile and self.distill_features:
            why = "which compares outputs inside of the network"
            raise ValueError(f"compile: expected false with distill_features, {why}")
        return self


class Train(Training):
    """The training of the original network, `haloc train`, where there are no weights yet."""

    epochs: Count = 200
    """Rounds over the training images."""
    weight_decay: NonNegative = 5e-4
    """Weight decay of SGD."""
    schedule: Schedule = "onecycle"
    """How the learning rate changes, as in `finetune.schedule`."""


class Trainer(Section):
    """Where the search and all trainings run, and what logs them: Lightning's flags."""

    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto"
    """The kind of device to train on."""
    devices: Processes = 1
    """Devices of each machine."""
    num_nodes: Processes = 1
    """Machines."""
    strategy: Literal["auto", "ddp", "ddp_find_unused_parameters_true"] = "auto"
    """How the processes work together."""
    logger: LoggerName = "none"
    """What [logs the curves](how-to/watch-a-run.md#loggers) of the search and of every training,
    one of Lightning's loggers: `tensorboard`, `csv`, `mlflow` or `wandb` (Weights & Biases, offline
    unless `WANDB_MODE` says otherwise); all but `csv` need the extra of the same name. Without one,
    too, `haloc report --watch` shows a run."""
