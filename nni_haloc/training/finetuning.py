"""After compression: BatchNorm recalibration, fine-tuning, and accuracy."""

from __future__ import annotations

import math
import warnings
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

TEMPERATURE = 4.0
"""Of distillation: divides both networks' logits."""


def recalibrate(model: nn.Module, loader: Iterable[tuple[Tensor, Any]], batches: int = 50) -> None:
    """Set the BatchNorm statistics of ``model`` anew from ``batches`` augmented training batches, equally weighted; nothing else changes.

    Augmented ones, because those are what the network was trained on: plain images cost the original network points.
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
    """Top-k accuracies, 0 to 1, over a loader of ``(images, labels)``."""
    # Not inference mode: NNI's wrappers keep tensors of a pass as buffers, which several processes synchronise in training.
    with evaluating(model), accelerated(model) as device, torch.no_grad():
        batches = [(model(images.to(device)).cpu(), labels) for images, labels in loader]
    logits, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return tuple(
        float(
            multiclass_accuracy(
                logits, labels, num_classes=logits.shape[1], top_k=k, average="micro"
            )
        )
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
    """Train ``model`` in place by the recipe, with a progress bar, and return it in evaluation mode.

    ``on_epoch(epoch, metrics)`` is called after each epoch with ``train_loss`` and, where ``val`` is given, ``val_top1``. ``ckpt_path``:
    a Lightning checkpoint to go on from. ``teacher``: the original network; ``distill``, 0 to 1, is then the share of the loss that is the
    Kullback-Leibler divergence from it at temperature 4 (Hinton et al., 2015), the rest being the cross-entropy. ``feature_weight`` times
    the sum over ``layers`` of the mean squared distance between their outputs and the teacher's is added to it: Eq. (8) and (9), the weight
    being lambda. ``trainer`` goes to Lightning's Trainer (devices, precision, loggers, ...). Raises `Diverged`;
    ValueError for several devices where no script is run.
    """
    if recipe.epochs:
        callbacks = [*trainer.pop("callbacks", []), *([EpochEnd(on_epoch)] if on_epoch else [])]
        defaults = {
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
        }
        defaults |= {"inference_mode": False}  # see `accuracy`
        fit = pl.Trainer(max_epochs=recipe.epochs, callbacks=callbacks, **{**defaults, **trainer})
        check_startable(fit)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*no `val_dataloader`.*")
            task = _Training(
                model,
                recipe,
                len(train),
                teacher,
                distill,
                layers if feature_weight else (),
                feature_weight,
            )
            fit.fit(task, train, val, ckpt_path=ckpt_path, weights_only=True)
        for name, value in model.state_dict().items():
            if not torch.isfinite(value).all():
                raise Diverged(
                    f"the training diverged: {name} is no longer finite; lower its learning rate"
                )
    return model.eval()


class _Training(pl.LightningModule):
    def __init__(
        self, model: nn.Module, recipe: Recipe, steps_per_epoch: int, teacher: nn.Module | None, distill: float, layers: Sequence[str],
        feature_weight: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model, self.recipe, self.steps_per_epoch = model.train(), recipe, steps_per_epoch
        self.teacher = (
            [] if teacher is None else [copy_of(teacher).eval()]
        )  # in a list: no part of what is trained and kept
        self.distill, self.layers, self.feature_weight = distill, layers, feature_weight

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = (
            self._taught(x, y, self.teacher[0].to(x.device))
            if self.teacher
            else F.cross_entropy(self.model(x), y)
        )
        if not torch.isfinite(loss):
            place = f"epoch {self.current_epoch + 1}, iteration {batch_idx + 1}"
            raise Diverged(
                f"the training diverged: loss {float(loss.detach())} in {place}; lower its learning rate"
            )
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, sync_dist=True)
        return loss

    def _taught(self, x: Tensor, y: Tensor, teacher: nn.Module) -> Tensor:
        features: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        terms: list[Tensor] = []

        def compare(name: str, output: Tensor) -> None:
            terms.append(
                F.mse_loss(output.clone(), features[name].pop(0))
            )  # of copies: an activation may write into the output

        with (
            torch.no_grad(),
            _observed(
                teacher, self.layers, lambda name, output: features[name].append(output.clone())
            ),
        ):
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
        self.log(
            "val_top1",
            (self.model(x).argmax(1) == y).float().mean(),
            batch_size=len(y),
            prog_bar=True,
            sync_dist=True,
        )

    def configure_optimizers(self) -> Any:
        return self.recipe.optimizers(
            self.model.parameters(), math.ceil(self.steps_per_epoch / self.trainer.world_size)
        )


@contextmanager
def _observed(
    model: nn.Module, layers: Sequence[str], see: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """For the time of a block, ``see(name, output)`` at each call of each layer."""
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
    """Logs how many iterations there will be before the first, and about how long they will take from the first one on."""

    def __init__(self, what: str) -> None:
        self.what, self.left, self.done, self.of = what, TimeLeft(what), 0, 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epochs, size = (
            (trainer.max_epochs or 0) - trainer.current_epoch,
            int(trainer.num_training_batches),
        )
        self.done, self.of = 0, epochs * size
        logger.info("%s: %d iterations, %d epochs of %d", self.what, self.of, epochs, size)
        self.left(0, self.of)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        self.done += 1
        self.left(self.done, self.of)


class EpochEnd(pl.Callback):
    """Hands each finished training epoch's metrics on."""

    def __init__(self, on_epoch: Callable[[int, dict[str, float]], None]) -> None:
        self.on_epoch = on_epoch

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.on_epoch(
            trainer.current_epoch, {k: float(v) for k, v in trainer.callback_metrics.items()}
        )
