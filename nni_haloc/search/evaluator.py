"""An NNI evaluator for image classification, ready for the search."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from nni.nas.evaluator.pytorch import Lightning, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from nni_haloc.training.recipe import Recipe
from nni_haloc.utils.processes import check_startable


class _Classification(LightningModule):
    """Cross-entropy and top-1 of a batch ``(images, labels)``."""

    def __init__(self, recipe: Recipe, steps_per_epoch: int) -> None:
        super().__init__()
        self.recipe, self.steps_per_epoch = recipe, steps_per_epoch

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        x, y = batch
        logits = self(x)
        return {"loss": F.cross_entropy(logits, y), "top1": (logits.argmax(1) == y).float().mean()}

    def configure_optimizers(self) -> Any:
        return self.recipe.optimizers(
            self.model.parameters(), math.ceil(self.steps_per_epoch / self.trainer.world_size)
        )


def classification(
    train: DataLoader,
    val: DataLoader,
    recipe: Recipe,
    ckpt_path: str | Path | None = None,
    **trainer: Any,
) -> Lightning:
    """NNI's Lightning evaluator for the search: alpha learns on ``val``, the weights on ``train``.

    ``ckpt_path``: a Lightning checkpoint of this search to go on from; ``trainer``: options of Lightning's Trainer;
    ValueError for several devices where no script is run.
    """
    steps = max(len(train), len(val))
    defaults = {
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
    }
    module = _Classification(recipe, steps)
    runs = Trainer(max_epochs=recipe.epochs, **{**defaults, **trainer})
    check_startable(runs)
    with plain_loaders():
        return Lightning(
            module,
            runs,
            train_dataloaders=train,
            val_dataloaders=val,
            fit_kwargs={"ckpt_path": ckpt_path, "weights_only": True},
        )


@contextmanager
def plain_loaders() -> Iterator[None]:
    """NNI warns of loaders that it can't send to another process; a one-shot search stays in this one."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", ".*wrap PyTorch DataLoader with nni.trace.*", RuntimeWarning
        )
        yield
