"""The recipe by which weights are trained, in the search and after it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nni_haloc.inputs.options import Schedule


@dataclass(frozen=True)
class Recipe:
    """SGD with Nesterov momentum. The defaults are the paper's, for any number of epochs.

    Attributes:
        epochs: how many; a search may take a fraction, such as 0.5.
        lr: learning rate.
        momentum: 0 is plain SGD.
        weight_decay: of all weights.
        schedule: ``step`` multiplies the rate by 0.2 at each quarter of the epochs (the paper:
            every 55 epochs), ``onecycle`` rises to ``lr`` and falls to nothing, ``constant`` stays.
    """

    epochs: float
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: Schedule = "step"

    @property
    def rounds(self) -> int:
        """The number of rounds, all of one length, that the epochs are divided into."""
        return math.ceil(self.epochs)

    def shorten(self, trainer: Any, steps_per_epoch: int) -> None:
        """Let a trainer end its rounds early, where the epochs are no whole number.

        Args:
            trainer: Lightning's, of `rounds` epochs; a limit on its batches that it has stays.
            steps_per_epoch: batches in an epoch, of all processes together.
        """
        if 0 < self.epochs < self.rounds and trainer.limit_train_batches == 1.0:
            own = math.ceil(steps_per_epoch / trainer.world_size)
            trainer.limit_train_batches = max(1, int(self.epochs / self.rounds * own))

    def optimizers(
        self, parameters: Iterable[nn.Parameter], steps_per_epoch: int
    ) -> dict[str, Any]:
        """Return what Lightning's ``configure_optimizers`` returns.

        Args:
            parameters: what is trained.
            steps_per_epoch: batches in an epoch, of each process.
        """
        optimizer = torch.optim.SGD(
            parameters,
            self.lr,
            self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.momentum > 0,
        )
        steps = max(1, round(self.epochs * steps_per_epoch))
        scheduler: torch.optim.lr_scheduler.LRScheduler
        if self.schedule == "step":
            scheduler = torch.optim.lr_scheduler.StepLR(
                optimizer, max(1, round(steps / 4)), gamma=0.2
            )
        elif self.schedule == "onecycle":
            scheduler = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, self.lr, total_steps=steps + 1, cycle_momentum=False
            )
        else:
            return {"optimizer": optimizer}
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }
