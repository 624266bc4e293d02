"""A training of a section of the settings: resumable, and reported after each epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pytorch_lightning import seed_everything
from torch import nn

from nni_haloc.inputs.config import Config
from nni_haloc.inputs.schema import Distilled, Training
from nni_haloc.runs.job import Job, trainer_options
from nni_haloc.training import checkpoint
from nni_haloc.training.checkpoint import EpochCheckpoint
from nni_haloc.training.curves import HISTORY_FILE, add_epoch
from nni_haloc.training.finetuning import Forecast, accuracy, finetune, recalibrate
from nni_haloc.training.recipe import Recipe
from nni_haloc.utils.errors import Diverged, SettingsError
from nni_haloc.utils.log import logger

Report = Callable[[dict[str, float], int], None]
"""Takes an epoch's metrics and their place in the run's curve, from 0 on; a run that goes on may come by its last place once more."""

STAGES = ("finetune", "prune", "quantize")
"""Sections of trainings, in their order in a run."""


def recipe_of(training: Training) -> Recipe:
    """A section of the settings as the recipe that it names."""
    return Recipe(
        training.epochs, training.lr, training.momentum, training.weight_decay, training.schedule
    )


def place_of(config: Config, stage: str) -> int:
    """Where a training's first report, the one before its first epoch, stands in the run's curve; ``stage``: of `STAGES`."""
    before = [getattr(config, name) for name in STAGES[: STAGES.index(stage)]]
    return (config.search.epochs if config.rule == "search" else 0) + sum(
        1 + section.epochs for section in before if section
    )


def trained(
    job: Job,
    network: nn.Module,
    section: Distilled,
    path: Path,
    identity: Mapping[str, Any],
    report: Report = lambda metrics, place: None,
    place: int = 0,
    *,
    what: str = "fine-tuning",
    recalibrated: bool = True,
    resume: bool = False,
    **options: Any,
) -> nn.Module:
    """``network``, trained in place as ``section`` says, its BatchNorm statistics first ``recalibrated``.

    The state after each epoch is in ``path``, its history beside it; ``resume`` goes on from there, if it is that of the same ``identity``.
    ``report`` is called before the first epoch, at ``place``, and after each with ``default``, the top-1 on validation images. ``options``:
    further ones of `finetune`. `SettingsError` where the training diverges.
    """
    config = job.config
    seed_everything(config.seed, verbose=False)  # the same whatever came before
    train, val = job.loader("train", shuffle=True), job.loader("val")
    keep = partial(add_epoch, path.with_name(HISTORY_FILE))
    state = EpochCheckpoint(path, {"identity": dict(identity)}, train, val)
    if resume := resume and path.exists():
        try:
            saved = checkpoint.read(path)
            checkpoint.check_same(path, saved["identity"], identity)
            logger.info(
                "%s: %d of %d epochs are done: %s", what, saved["epochs"], section.epochs, path
            )
        except checkpoint.UnusableCheckpoint as error:
            logger.info("%s; %s anew", error, what)
            resume = False
    if not resume:
        recalibrate(network, train, config.recalibration_batches if recalibrated else 0)
        (top1,) = accuracy(network, val)
        logger.info("before %s: top-1 %.2f %% (validation)", what, 100 * top1)
        keep(0, math.nan, top1)
        report({"default": top1}, place)

    def on_epoch(epoch: int, metrics: dict[str, float]) -> None:
        logger.info(
            "%s epoch %d: top-1 %.2f %% (validation)", what, epoch + 1, 100 * metrics["val_top1"]
        )
        keep(epoch + 1, metrics["train_loss"], metrics["val_top1"])
        report(
            {"default": metrics["val_top1"], "train_loss": metrics["train_loss"]}, place + 1 + epoch
        )

    options = {
        **state.options,
        **trainer_options(config),
        "callbacks": [Forecast(what), state],
        "precision": section.precision,
        **options,
    }
    if section.distill:
        options |= {"teacher": job.model, "distill": section.distill}
    try:
        return finetune(
            network, train, recipe_of(section), val, on_epoch, path if resume else None, **options
        )
    except Diverged as error:
        raise SettingsError(f"{type(section).__name__.lower()}: {error}") from None
