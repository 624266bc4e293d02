"""Record a search: each iteration in ``history.csv``, its final state in ``search.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from nni_haloc.costs.table import CostTable
from nni_haloc.plan.budget import Limit
from nni_haloc.search.strategy import Haloc
from nni_haloc.training.curves import COLUMNS, read, write_rows
from nni_haloc.utils.errors import HalocError
from nni_haloc.utils.log import logger

SEARCH_VERSION = 1


class History(pl.Callback):
    """Record every iteration of a search; the file is written at the end of each epoch.

    A search that is resumed keeps the rows up to where it goes on.

    Args:
        path: the file, ``history.csv``.
        strategy: the search.
        params: table of the candidates' parameters.
    """

    def __init__(self, path: Path, strategy: Haloc, params: CostTable) -> None:
        self.path, self.strategy, self.params = path, strategy, Limit(params, params.original)
        self.rows: list[list[Any]] = []
        self.losses: list[Tensor] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take up the rows of an earlier start."""
        done = trainer.current_epoch * int(trainer.num_training_batches)
        if done and self.path.exists():
            try:
                columns = read(self.path)
            except HalocError as error:  # figures are not worth a search
                logger.warning("%s; its figures begin anew", error)
                return
            rows = zip(*columns.values(), strict=True)
            self.rows = [list(row) for row in rows if row[0] < done]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add a row."""
        iteration = trainer.current_epoch * int(trainer.num_training_batches) + batch_idx
        state = self.strategy.state
        costs = state.known_cost(), state.known_cost(self.params)
        self.rows.append([iteration, *costs])
        self.losses.append(pl_module.latest)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file."""
        if self.losses:  # all of them at once: each copy waits for the device
            losses = torch.stack(self.losses).tolist()
            new = zip(self.rows[-len(losses) :], losses, strict=True)
            self.rows[-len(losses) :] = [[row[0], *pair, *row[1:]] for row, pair in new]
            self.losses = []
        write_rows(self.path, COLUMNS, self.rows)


def describe_search(strategy: Haloc) -> dict[str, Any]:
    """Return a search's state in plain numbers, not rounded: the content of ``search.json``.

    Args:
        strategy: a search that has begun; usually one that has finished.

    Returns:
        A dict that JSON can hold:

        - ``version``, 1, and ``objective``, ``settle`` or ``paper``.
        - ``limits``, a list: the ``metric``, ``budget`` and ``original_cost`` of each limit, its
          ``expected_cost`` (Eq. 6), all in the table's unit, and its ``price`` for a budget's worth
          of cost (0 with ``objective="paper"``).
        - ``layers``, layer to candidate: ``logit`` (alpha over the temperature), ``probability``,
          ``score`` (see `SearchState.scores`), and ``cost``, a list with a number for each limit.
    """
    scores, probabilities = strategy.scores(), strategy.probabilities
    limits = [
        {
            "metric": limit.costs.metric,
            "budget": float(limit.budget),
            "original_cost": float(limit.costs.original),
            "expected_cost": strategy.state.known_cost(limit),
            "price": price,
        }
        for limit, price in zip(strategy.limits, strategy.state.prices.tolist(), strict=True)
    ]
    layers = {
        name: {
            candidate: {
                "logit": logit,
                "probability": probabilities[name][candidate],
                "score": scores[name][candidate],
                "cost": [float(limit.costs.costs[name][candidate]) for limit in strategy.limits],
            }
            for candidate, logit in zip(layer.names, layer.logits.tolist(), strict=True)
        }
        for name, layer in strategy.mixed_layers.items()
    }
    objective = strategy.options.objective
    return {"version": SEARCH_VERSION, "objective": objective, "limits": limits, "layers": layers}
