"""Train and measure a network: BatchNorm statistics, weights, accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import multiclass_accuracy

from nni_haloc.space.modules import accelerated, copy_of, evaluating
from nni_haloc.training.recipe import Recipe
from nni_haloc.utils.errors import Diverged
from nni_haloc.utils.log import logger
from nni_haloc.utils.processes import check_startable
from nni_haloc.utils.progress import TimeLeft
from nni_haloc.utils.quiet import quiet

TEMPERATURE = 4.0
"""Distillation divides both networks' logits by this."""


def recalibrate(model: nn.Module, loader: Iterable[tuple[Tensor, Any]], batches: int = 50) -> None:
    """Compute the BatchNorm statistics of a network anew; nothing else of it changes.

    Args:
        model: the network, changed in place.
        loader: augmented training batches ``(images, anything)``. Augmented, because those are what
            the network was trained on: plain images cost the original network points.
        batches: how many are used, equally weighted; 0 leaves the network as it is.
    """
    if not batches:
        return
    norms = [
        m
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    ]
    momenta = [m.momentum for m in norms]
    with evaluating(model), accelerated(model) as device, torch.no_grad():
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative mean
            norm.train()
        for images, _ in islice(loader, batches if norms else 0):
            model(images.to(device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def accuracy(
    model: nn.Module, loader: DataLoader, topk: tuple[int, ...] = (1,)
) -> tuple[float, ...]:
    """Return the top-k accuracies of a network in evaluation mode.

    Args:
        model: the network; it is left as it was.
        loader: batches ``(images, labels)``.
        topk: the numbers k.

    Returns:
        One accuracy for each k, 0 to 1.
    """
    # Not inference mode: NNI's wrappers keep tensors of a pass as buffers, which several processes
    # synchronise in training.
    with evaluating(model), accelerated(model) as device, torch.no_grad():
        batches = [(model(images.to(device)).cpu(), labels) for images, labels in loader]
    logits, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    classes = logits.shape[1]
    return tuple(
        float(multiclass_accuracy(logits, labels, num_classes=classes, top_k=k, average="micro"))
        for k in topk
    )


def finetune(
    model: nn.Module,
    train: DataLoader,
    recipe: Recipe,
    val: DataLoader | None = None,
    on_epoch: Callable[[int, dict[str, float]], None] | None = None,
    ckpt_path: str | Path | None = None,
    teacher: nn.Module | None = None,
    distill: float = 0.5,
    layers: Sequence[str] = (),
    feature_weight: float = 0.0,
    **trainer: Any,
) -> nn.Module:
    """Train a network in place, with a progress bar, and return it in evaluation mode.

    Args:
        model: the network.
        train: training batches ``(images, labels)``.
        recipe: how many epochs, and how they are trained.
        val: validation batches, run after each epoch.
        on_epoch: called after each epoch with its number, from 0, and a dict of ``train_loss`` and,
            where ``val`` is given, ``val_top1`` (0 to 1).
        ckpt_path: a Lightning checkpoint to go on from.
        teacher: the original network, to learn from.
        distill: share of the loss that is the Kullback-Leibler divergence from the teacher at
            temperature 4 (Hinton et al., 2015), 0 to 1; the rest is the cross-entropy.
        layers: names of layers whose outputs are compared with the teacher's.
        feature_weight: lambda of Eq. (9): the weight of the sum over ``layers`` of the mean squared
            distance between their outputs and the teacher's, Eq. (8).
        **trainer: options of Lightning's Trainer (devices, precision, loggers, ...).

    Returns:
        ``model`` itself.

    Raises:
        Diverged: if the loss or a weight is no longer finite.
        ValueError: for several devices where no script is run that they could start, too.
    """
    if not recipe.epochs:
        return model.eval()
    callbacks = [*trainer.pop("callbacks", []), *([EpochEnd(on_epoch)] if on_epoch else [])]
    defaults = {
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "inference_mode": False,  # see `accuracy`
    }
    compared = layers if feature_weight else ()
    with quiet():
        fit = pl.Trainer(max_epochs=recipe.epochs, callbacks=callbacks, **{**defaults, **trainer})
        check_startable(fit)
        task = _Training(model, recipe, len(train), teacher, distill, compared, feature_weight)
        fit.fit(task, train, val, ckpt_path=ckpt_path, weights_only=True)
    for name, value in model.state_dict().items():
        if not torch.isfinite(value).all():
            raise Diverged(
                f"the training diverged: {name} is no longer finite; lower its learning rate"
            )
    return model.eval()


class _Training(pl.LightningModule):
    """Cross-entropy, and what the teacher adds to it."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        steps_per_epoch: int,
        teacher: nn.Module | None,
        distill: float,
        layers: Sequence[str],
        feature_weight: float,
    ) -> None:
        super().__init__()
        self.model, self.recipe, self.steps_per_epoch = model.train(), recipe, steps_per_epoch
        # In a list: the teacher is no part of what is trained and kept.
        self.teacher = [] if teacher is None else [copy_of(teacher).eval()]
        self.distill, self.layers, self.feature_weight = distill, layers, feature_weight

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        if self.teacher:
            loss = self._taught(x, y, self.teacher[0].to(x.device))
        else:
            loss = F.cross_entropy(self.model(x), y)
        if not torch.isfinite(loss):
            raise Diverged(
                f"the training diverged: loss {float(loss.detach())} in epoch"
                f" {self.current_epoch + 1}, iteration {batch_idx + 1}; lower its learning rate"
            )
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, sync_dist=True)
        return loss

    def _taught(self, x: Tensor, y: Tensor, teacher: nn.Module) -> Tensor:
        """Return the loss with the distances from the teacher in it."""
        features: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        terms: list[Tensor] = []

        def compare(name: str, output: Tensor) -> None:
            # Of copies: an activation may write into the output.
            terms.append(F.mse_loss(output.clone(), features[name].pop(0)))

        def keep(name: str, output: Tensor) -> None:
            features[name].append(output.clone())

        with torch.no_grad(), _observed(teacher, self.layers, keep):
            target = teacher(x)
        with _observed(self.model, self.layers, compare):
            logits = self.model(x)
        loss = F.cross_entropy(logits, y)
        if self.distill:
            log_q, log_p = (F.log_softmax(z / TEMPERATURE, 1) for z in (logits, target))
            distance = TEMPERATURE**2 * F.kl_div(
                log_q, log_p, reduction="batchmean", log_target=True
            )
            loss = (1 - self.distill) * loss + self.distill * distance
        return loss + self.feature_weight * torch.stack(terms).sum() if terms else loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        top1 = (self.model(x).argmax(1) == y).float().mean()
        self.log("val_top1", top1, batch_size=len(y), prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> Any:
        steps = math.ceil(self.steps_per_epoch / self.trainer.world_size)
        return self.recipe.optimizers(self.model.parameters(), steps)


@contextmanager
def _observed(
    model: nn.Module, layers: Sequence[str], see: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call ``see(name, output)`` at each call of each layer while the block runs."""
    modules = dict(model.named_modules())
    hooks = [
        modules[name].register_forward_hook(lambda _, __, output, name=name: see(name, output))
        for name in layers
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Forecast(pl.Callback):
    """Log how many iterations a training has, and soon about how long they will take.

    Args:
        what: what the lines call the training: ``fine-tuning``.
    """

    def __init__(self, what: str) -> None:
        self.what, self.left, self.done, self.of = what, TimeLeft(what), 0, 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epochs = (trainer.max_epochs or 0) - trainer.current_epoch
        size = int(trainer.num_training_batches)
        self.done, self.of = 0, epochs * size
        parts = f"{_many(epochs, 'epoch')} of {_many(size, 'iteration')}"
        logger.info("%s: %s, %d in all", self.what, parts, self.of)
        self.left(0, self.of)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        self.done += 1
        self.left(self.done, self.of)


def _many(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


class EpochEnd(pl.Callback):
    """Call a function after each training epoch.

    Args:
        on_epoch: takes the epoch's number, from 0, and all that was logged in it.
    """

    def __init__(self, on_epoch: Callable[[int, dict[str, float]], None]) -> None:
        self.on_epoch = on_epoch

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.on_epoch(trainer.current_epoch, metrics)
