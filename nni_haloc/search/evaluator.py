"""An NNI evaluator for image classification, ready for the search."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import nni
from nni.nas.evaluator.pytorch import Lightning, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from nni_haloc.inputs.labels import LabelCheck
from nni_haloc.search.space import RankSpace
from nni_haloc.space.modules import arguments_of
from nni_haloc.space.outputs import cross_entropy, hits, logits_of
from nni_haloc.training.recipe import Recipe
from nni_haloc.utils.processes import check_startable
from nni_haloc.utils.quiet import quiet


class _Module(LightningModule):
    """Train by the cross-entropy of batches ``(images, labels)``, and log top-1."""

    def __init__(self, recipe: Recipe, steps_per_epoch: int) -> None:
        super().__init__()
        self.recipe, self.steps_per_epoch = recipe, steps_per_epoch
        self.checked = LabelCheck()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.checked.look(batch)
        return batch

    def forward(self, x: Any) -> Tensor:
        network = self.model.model if isinstance(self.model, RankSpace) else self.model
        args, named = arguments_of(network, x)
        return logits_of(self.model(*args, **named))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        x, y = batch
        logits = self(x)
        y = self.checked(y, logits)
        right, counted = hits(logits, y)
        return {"loss": cross_entropy(logits, y), "top1": right / counted.clamp(min=1)}

    def configure_optimizers(self) -> Any:
        steps = math.ceil(self.steps_per_epoch / self.trainer.world_size)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return self.recipe.optimizers(trained, steps)


@nni.trace
class Classification(Lightning):
    """NNI's Lightning evaluator for a search: alpha learns on one loader, the weights on the other.

    For one-shot strategies, as `Haloc` is. It differs from ``nni.nas.evaluator.pytorch``'s of the
    same name in that a `Recipe` says how the weights are trained.

    Args:
        train_dataloaders: batches ``(images, labels)`` for the weights.
        val_dataloaders: batches for alpha.
        recipe: how many epochs, and how the weights are trained in them. 1.5 epochs are two rounds
            over three quarters of the data, drawn anew.
        ckpt_path: a Lightning checkpoint of this search to go on from.
        **trainer_kwargs: options of Lightning's Trainer (devices, precision, callbacks, ...).

    Raises:
        ValueError: for several devices where no script is run that they could start, too.
    """

    def __init__(
        self,
        train_dataloaders: DataLoader,
        val_dataloaders: DataLoader,
        recipe: Recipe,
        ckpt_path: str | Path | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        defaults: dict[str, Any] = {
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_model_summary": False,
        }
        steps = max(len(train_dataloaders), len(val_dataloaders))
        with quiet():
            trainer = Trainer(**{**defaults, "max_epochs": recipe.rounds, **trainer_kwargs})
            check_startable(trainer)
            recipe.shorten(trainer, steps)
            super().__init__(
                _Module(recipe, steps),
                trainer,
                train_dataloaders=train_dataloaders,
                val_dataloaders=val_dataloaders,
                fit_kwargs={"ckpt_path": ckpt_path, "weights_only": True},
            )


def classification(
    train: DataLoader,
    val: DataLoader,
    recipe: Recipe,
    ckpt_path: str | Path | None = None,
    **trainer: Any,
) -> Lightning:
    """Make a `Classification`; this former name is deprecated.

    Args:
        train: see ``train_dataloaders`` there.
        val: see ``val_dataloaders`` there.
        recipe: see there.
        ckpt_path: see there.
        **trainer: options of Lightning's Trainer.

    Returns:
        The evaluator.
    """
    warnings.warn(
        "nni_haloc.classification is now the class nni_haloc.Classification",
        DeprecationWarning,
        stacklevel=2,
    )
    return Classification(train, val, recipe, ckpt_path, **trainer)
