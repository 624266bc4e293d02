"""Train a network as a section of the settings says: resumable, and reported after each epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from pytorch_lightning import seed_everything
from torch import nn

from nni_haloc.inputs.schema.training import Distilled
from nni_haloc.inputs.schema.training import Training as Section
from nni_haloc.runs.folder import Figures, Training
from nni_haloc.runs.identity import check_training
from nni_haloc.runs.job import Job, trainer_options
from nni_haloc.runs.stages.stage import Report, ignore
from nni_haloc.training import checkpoint
from nni_haloc.training.checkpoint import EpochCheckpoint
from nni_haloc.training.curves import add_epoch
from nni_haloc.training.finetuning import Forecast, accuracy, finetune, recalibrate
from nni_haloc.training.recipe import Recipe
from nni_haloc.utils.errors import Diverged, UnusableCheckpoint
from nni_haloc.utils.log import logger

_LOSS = 0.01
"""Points of top-1, 0 to 1, that a training may cost before it is warned of."""


def recipe_of(section: Section) -> Recipe:
    """Return the recipe that a section of the settings describes."""
    return Recipe(
        section.epochs, section.lr, section.momentum, section.weight_decay, section.schedule
    )


def train(
    job: Job,
    network: nn.Module,
    section: Distilled,
    files: Training,
    identity: Mapping[str, Any],
    report: Report = ignore,
    *,
    title: str,
    recalibrated: bool = True,
    resume: bool = False,
    **options: Any,
) -> nn.Module:
    """Train ``network`` in place.

    Args:
        job: the run's settings, data and original network, which is the teacher of distillation.
        network: the network; its BatchNorm statistics are recalibrated first if ``recalibrated``.
        section: epochs, learning rate and so on.
        files: where the state after each epoch and the history are kept.
        identity: what the state depends on. A state of another identity is not used.
        report: takes ``default``, the top-1 on validation images, before the first epoch (place 0)
            and after each.
        title: what the log calls this training.
        recalibrated: whether BatchNorm is recalibrated before the training.
        resume: whether to go on from the state in ``files``.
        options: further options of `finetune`.

    Returns:
        The same network.

    Raises:
        Diverged: if the training diverges; the message names the section.
    """
    config = job.config
    seed_everything(config.seed, verbose=False)  # the same whatever came before
    training_loader, val = job.loader("train", shuffle=True), job.loader("val")
    keep = partial(add_epoch, files.history)
    facts = {"identity": dict(identity), "longer": section.schedule == "constant"}
    state = EpochCheckpoint(files.checkpoint, facts, training_loader, val)
    done = _epochs_done(files, identity, section, title) if resume else None
    curve: list[float] = []
    if done is None:
        batches = config.recalibration_batches if recalibrated else 0
        recalibrate(network, training_loader, batches, compile=section.compile)
        (top1,) = accuracy(network, val)
        logger.info("before %s: %s", title, job.top1_line(top1))
        keep(0, math.nan, top1)
        curve.append(top1)
        report({"default": top1}, 0)

    def on_epoch(epoch: int, metrics: Figures) -> None:
        top1 = metrics["val_top1"]
        logger.info("%s epoch %d: %s", title, epoch + 1, job.top1_line(top1))
        keep(epoch + 1, metrics["train_loss"], top1)
        curve.append(top1)
        report({"default": top1, "train_loss": metrics["train_loss"]}, 1 + epoch)

    options = {**trainer_of(job, section.precision, state, title), **options}
    if (done or 0) < section.epochs:
        options["logger"] = job.logger(files.path, title)
    options["compile"] = section.compile
    if section.distill:
        options |= {"teacher": job.model, "distill": section.distill}
    path = None if done is None else files.checkpoint
    key = type(section).__name__.lower()
    try:
        network = finetune(
            network, training_loader, recipe_of(section), val, on_epoch, path, **options
        )
    except Diverged as error:
        raise Diverged(f"{key}: {error}") from None
    if done is None:
        _warn_of_loss(title, key, curve, len(job.splits.labels["val"]))
    return network


def _warn_of_loss(title: str, key: str, curve: Sequence[float], images: int) -> None:
    """Warn of a training that has cost top-1, by more than chance.

    Args:
        title: what the log calls the training.
        key: its section in the settings.
        curve: top-1 before the training and after each epoch.
        images: how many it was measured on.
    """
    before, after = curve[0], curve[-1]
    error = math.sqrt((before * (1 - before) + after * (1 - after)) / images)
    if before - after > max(_LOSS, error):
        logger.warning(
            "%s: top-1 fell from %.2f to %.2f %% (%d validation images, standard error of the "
            "difference %.1f points); set %s lower or %s higher",
            title,
            100 * before,
            100 * after,
            images,
            100 * error,
            f"{key}.lr",
            f"{key}.epochs",
        )


def trainer_of(job: Job, precision: str, state: EpochCheckpoint, title: str) -> dict[str, Any]:
    """Return the options of Lightning's Trainer for a training that keeps its state."""
    callbacks = [Forecast(title), state]
    options = {**state.options, **trainer_options(job.config)}
    return {**options, "callbacks": callbacks, "precision": precision}


def _epochs_done(
    files: Training, identity: Mapping[str, Any], section: Section, title: str
) -> int | None:
    """Return how many epochs of this training are done, None without a state; log what is there."""
    if not files.checkpoint.exists():
        return None
    try:
        saved = checkpoint.read(files.checkpoint)
        check_training(files.checkpoint, saved, identity)
    except UnusableCheckpoint as error:
        logger.info("%s; %s starts anew", str(error).removesuffix(checkpoint.REMEDY), title)
        return None
    epochs, path = section.epochs, files.checkpoint
    logger.info("%s: %d of %d epochs are done: %s", title, saved["epochs"], epochs, path)
    return saved["epochs"]
