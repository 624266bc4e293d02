"""Read and write ``history.csv``, from which figures are drawn.

It has a row for each iteration of a search, or for each epoch of a fine-tuning.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from nni_haloc.utils.errors import HalocError, SettingsError
from nni_haloc.utils.files import make_folder, whole
from nni_haloc.utils.log import logger
from nni_haloc.utils.processes import is_first

HISTORY_FILE = "history.csv"
COLUMNS = ("iteration", "train_loss", "approach_loss", "expected_cost", "expected_params")
"""A search's columns.

Cross-entropy of the sampled network; Eq. (8)'s distance of feature maps; Eq. (6) by the first
limit's table; the same of parameters. The first two are means over the processes.
"""

EPOCH_COLUMNS = ("epoch", "train_loss", "val_top1")
"""A fine-tuning's columns; epoch 0 is before it, without a loss (NaN)."""


def add_epoch(path: Path, epoch: int, train_loss: float, val_top1: float) -> None:
    """Add a row to a fine-tuning's history; of several processes the first one writes.

    Args:
        path: the file. Its rows of earlier epochs stay, those of this and later ones go.
        epoch: number of finished epochs.
        train_loss: mean loss in the epoch; NaN before the first.
        val_top1: top-1 on validation images, 0 to 1.
    """
    if not is_first():
        return
    rows: list[list[float]] = []
    if epoch and path.exists():
        try:
            rows = [
                list(row)
                for row in zip(*read(path, EPOCH_COLUMNS).values(), strict=True)
                if row[0] < epoch
            ]
        except HalocError as error:
            logger.warning("%s; it begins anew", error)
    write_rows(path, EPOCH_COLUMNS, [*rows, [epoch, train_loss, val_top1]])


def write_rows(path: Path, columns: Sequence[str], rows: Sequence[Sequence[float]]) -> None:
    """Write a history.

    Args:
        path: the file; its folder is made.
        columns: their names.
        rows: numbers, the first of each a whole one.
    """
    make_folder(path.parent)
    with whole(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(
            [columns, *([int(row[0]), *(f"{value:.6g}" for value in row[1:])] for row in rows)]
        )


def read(path: Path, columns: Sequence[str] = COLUMNS) -> dict[str, list[float]]:
    """Read a history.

    Args:
        path: the file.
        columns: names of those that are wanted.

    Returns:
        Column name to its numbers.

    Raises:
        SettingsError: if there is no such file, or it is damaged; the message names it.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if not rows:
            raise ValueError("no rows")
        return {name: [float(row[name]) for row in rows] for name in columns}
    except FileNotFoundError:
        raise SettingsError(
            f"{path}: no such file; expected the folder of a search (haloc search, haloc run)"
        ) from None
    except (KeyError, TypeError, ValueError, csv.Error, UnicodeDecodeError) as error:
        raise SettingsError(
            f"{path}: expected the columns {', '.join(columns)}, all of them numbers ({error})"
        ) from None
