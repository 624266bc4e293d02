"""Record every iteration of a search in ``history.csv``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from nni_haloc.costs.table import CostTable
from nni_haloc.plan.budget import Limit
from nni_haloc.search.strategy import Haloc
from nni_haloc.training.curves import COLUMNS, read, write_rows
from nni_haloc.utils.errors import HalocError
from nni_haloc.utils.log import logger


class History(pl.Callback):
    """Writes the file at the end of each epoch; a search that is resumed keeps the rows up to where it goes on."""

    def __init__(self, path: Path, strategy: Haloc, params: CostTable) -> None:
        self.path, self.strategy, self.params = path, strategy, Limit(params, params.original)
        self.rows: list[list[Any]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        done = trainer.current_epoch * int(trainer.num_training_batches)
        if done and self.path.exists():
            try:
                columns = read(self.path)
                self.rows = [
                    list(row) for row in zip(*columns.values(), strict=True) if row[0] < done
                ]
            except HalocError as error:  # figures are not worth a search
                logger.warning("%s; its figures begin anew", error)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        iteration = trainer.current_epoch * int(trainer.num_training_batches) + batch_idx
        costs = (self.strategy.expected_cost(), self.strategy.expected_cost(self.params))
        self.rows.append([iteration, *pl_module.latest, *(cost.detach() for cost in costs)])

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.rows = [[int(row[0]), *map(float, row[1:])] for row in self.rows]
        write_rows(self.path, COLUMNS, self.rows)
