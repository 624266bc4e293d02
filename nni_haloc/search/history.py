"""Record a search: each iteration in ``history.csv``, its state in ``search.json``."""

from __future__ import annotations

from collections.abc import Mapping
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
from nni_haloc.utils.files import write_json
from nni_haloc.utils.log import logger

SEARCH_VERSION = 1


class History(pl.Callback):
    """Record a search: its files are written at the end of each epoch.

    A search that is resumed keeps what is there of the epochs before.

    Args:
        path: the file of iterations, ``history.csv``.
        state: the file of the state, ``search.json``; it is written at the start, too.
        strategy: the search.
        params: table of the candidates' parameters.
    """

    def __init__(self, path: Path, state: Path, strategy: Haloc, params: CostTable) -> None:
        self.path, self.state = path, state
        self.strategy, self.params = strategy, Limit(params, params.original)
        self.rows: list[list[Any]] = []
        self.losses: list[Tensor] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the first state; take up the rows of an earlier start."""
        self._write_state(trainer)
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
        """Write the files."""
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        figures = epoch_figures(metrics, self.strategy.costs.original)
        self.strategy.state.curve.append({"epoch": trainer.current_epoch + 1, **figures})
        self._write_state(trainer)
        if self.losses:  # all of them at once: each copy waits for the device
            losses = torch.stack(self.losses).tolist()
            new = zip(self.rows[-len(losses) :], losses, strict=True)
            self.rows[-len(losses) :] = [[row[0], *pair, *row[1:]] for row, pair in new]
            self.losses = []
        write_rows(self.path, COLUMNS, self.rows)

    def _write_state(self, trainer: pl.Trainer) -> None:
        write_json(self.state, describe_search(self.strategy, trainer.max_epochs))


def epoch_figures(metrics: Mapping[str, float], original: float) -> dict[str, float]:
    """Return the figures of an epoch of a search.

    Args:
        metrics: what the search has logged in the epoch.
        original: the original network's cost.

    Returns:
        ``top1``, that of the sampled networks, 0 to 1, on validation images unless the epoch was
        one of warm-up; ``train_loss``; and ``expected_cost``, the mean over the epoch as a share of
        the original's, which epochs of warm-up have none of.
    """
    top1 = metrics.get("search/val_top1", metrics["search/train_top1"])
    figures = {"top1": top1, "train_loss": metrics["search/train_loss"]}
    if "search/expected_cost_epoch" in metrics:
        figures["expected_cost"] = metrics["search/expected_cost_epoch"] / original
    return figures


def describe_search(strategy: Haloc, epochs: int | None = None) -> dict[str, Any]:
    """Return a search's state in plain numbers, not rounded: the content of ``search.json``.

    Args:
        strategy: a search that has begun.
        epochs: how many epochs it will have in all, of a search that has not finished.

    Returns:
        A dict that JSON can hold:

        - ``version``, 1, and ``objective``, ``settle`` or ``paper``.
        - ``finished``, whether the search is; if it is not, ``epochs``, how many it will have.
        - ``curve``, a list with the figures of each epoch that is done; see `epoch_figures`.
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
    return {
        "version": SEARCH_VERSION,
        "objective": objective,
        "finished": epochs is None,
        **({} if epochs is None else {"epochs": epochs}),
        "curve": list(strategy.state.curve),
        "limits": limits,
        "layers": layers,
    }
