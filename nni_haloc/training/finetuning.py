"""Train and measure a network: BatchNorm statistics, weights, accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nni_haloc.inputs.labels import IGNORED, LabelCheck, check_labels, images_and_labels
from nni_haloc.inputs.weights import is_finite
from nni_haloc.space.frozen import let_train
from nni_haloc.space.modules import arguments_of, copy_of, evaluating
from nni_haloc.space.outputs import cross_entropy, divergence, hits, logits_of
from nni_haloc.training.compiled import Compiled, Replayed
from nni_haloc.training.divergence import DivergenceWatch
from nni_haloc.training.recipe import Recipe
from nni_haloc.utils.errors import DataError, Diverged
from nni_haloc.utils.log import logger
from nni_haloc.utils.placement import accelerated, moved
from nni_haloc.utils.processes import check_startable
from nni_haloc.utils.progress import TimeLeft
from nni_haloc.utils.quiet import quiet
from nni_haloc.utils.reentrant import no_reentrant_checkpoints
from nni_haloc.utils.wrapped import unwrapped

TEMPERATURE = 4.0
"""Distillation divides both networks' logits by this."""


def recalibrate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Any]],
    batches: int = 50,
    *,
    compile: bool = False,
) -> None:
    """Compute the BatchNorm statistics of a network anew; nothing else of it changes.

    Args:
        model: the network, changed in place.
        loader: augmented training batches ``(images, anything)``. Augmented, because those are what
            the network was trained on: plain images cost the original network points.
        batches: how many are used, equally weighted; 0 leaves the network as it is.
        compile: replay a captured graph of the pass, on a CUDA device; other devices ignore it.
    """
    model = unwrapped(model)
    norms = [
        m
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    ]
    if not batches or not norms:
        return
    momenta = [m.momentum for m in norms]
    with evaluating(model), accelerated(model) as device, torch.no_grad():
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = 1.0  # a pass leaves its own statistics, which are added up
            norm.train()
        sums: dict[nn.Module, list[Tensor]] = {
            norm: [torch.zeros_like(x) for x in _statistics(norm)] for norm in norms
        }
        flat = [total for totals in sums.values() for total in totals]
        with _observed(norms, lambda norm, _: _add(sums[norm], _statistics(norm))):
            replayed = Replayed(model, [*model.buffers(), *flat]) if compile else model
            for images, _ in islice(loader, batches):
                args, named = arguments_of(model, moved(images, device))
                (replayed if isinstance(images, Tensor) else model)(*args, **named)
        for norm in norms:
            calls, totals = cast(Tensor, norm.num_batches_tracked), sums[norm]
            for value, total in zip(_statistics(norm), totals, strict=True):
                value.copy_(torch.where(calls > 0, total / calls, value))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _statistics(norm: nn.Module) -> list[Tensor]:
    """Return BatchNorm's running mean and variance."""
    return [cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)]


def _add(totals: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for total, value in zip(totals, values, strict=True):
        total += value


def _logits(model: nn.Module, x: Any, compiled: Compiled | None = None) -> Tensor:
    """Return a network's logits, ``(N, classes, ...)``, run as it is or compiled."""
    args, named = arguments_of(model, x)
    return logits_of((compiled or model)(*args, **named))


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

    Raises:
        DataError: if the labels are not classes of the network's outputs.
    """
    logits, labels = predict(model, loader)
    return tuple(top_accuracy(logits, labels, k) for k in topk)


def predict(model: nn.Module, loader: DataLoader) -> tuple[Tensor, Tensor]:
    """Return a network's outputs in evaluation mode, and the labels; see `accuracy`.

    Returns:
        Logits ``(N, classes)`` and labels ``(N,)``, on the network's `device_of`.
    """
    batches: list[tuple[Tensor, Tensor]] = []
    # Not inference mode: NNI's wrappers keep tensors of a pass as buffers, which several processes
    # synchronise in training.
    model = unwrapped(model)
    with evaluating(model), accelerated(model) as device, torch.no_grad():
        for batch in loader:
            x, labels = images_and_labels(batch)
            logits = _logits(model, moved(x, device))
            if not batches or not labels.is_cuda:  # of those on a device, the first are waited for
                labels = check_labels(labels, logits.shape)
            batches.append((logits, labels.to(device)))
    if not batches:
        raise DataError("loader: expected batches (images, labels), found none")
    logits, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return logits, labels


def top_accuracy(logits: Tensor, labels: Tensor, k: int = 1) -> float:
    """Return the top-k accuracy, 0 to 1, over the labels that count; see `hits`.

    Raises:
        DataError: if no label counts.
    """
    right, counted = (int(number) for number in hits(logits, labels, k))
    if not counted:
        raise DataError(f"labels: expected classes, found {IGNORED} (to be ignored) alone")
    return right / counted


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
    compile: bool = False,
    **trainer: Any,
) -> nn.Module:
    """Train a network in place, with a progress bar, and return it in evaluation mode.

    Frozen parameters stay as they are, unless all are frozen: then all are trained.

    Args:
        model: the network.
        train: training batches ``(images, labels)``; labels are class indices, of which -100 is
            ignored where they have positions, or class probabilities of the logits' shape.
        recipe: how many epochs, and how they are trained.
        val: validation batches, run after each epoch.
        on_epoch: called after each epoch with its number, from 0, and a dict of ``train_loss`` and,
            where ``val`` is given, ``val_top1`` (0 to 1).
        ckpt_path: a Lightning checkpoint to go on from.
        teacher: the original network, to learn from.
        distill: share of the loss that is the Kullback-Leibler divergence from the teacher at
            temperature 4 (Hinton et al., 2015), the mean over images and positions, 0 to 1; the
            rest is the cross-entropy.
        layers: names of layers whose outputs are compared with the teacher's.
        feature_weight: lambda of Eq. (9): the weight of the sum over ``layers`` of the mean squared
            distance between their outputs and the teacher's, Eq. (8).
        compile: run the passes compiled (see `nni_haloc.training.compiled.Compiled`): faster where
            small operations are many, as on CUDA devices. Not with ``feature_weight``.
        **trainer: options of Lightning's Trainer (devices, precision, loggers, ...).

    Returns:
        ``model`` itself.

    Raises:
        DataError: if the labels are not classes of the network's outputs.
        Diverged: if the loss or a weight is no longer finite.
        HalocError: if the network can't be compiled.
        ValueError: for several devices where no script is run that they could start, too; for
            ``compile`` with ``feature_weight`` or ``accumulate_grad_batches``.
    """
    if compile and feature_weight:
        raise ValueError("compile: not together with feature_weight, which looks into the network")
    if compile and trainer.get("accumulate_grad_batches", 1) != 1:
        raise ValueError(
            "compile: not together with accumulate_grad_batches, because a pass that is replayed"
            " writes its gradients over the last one's"
        )
    if not recipe.epochs:
        return model.eval()
    callbacks = [*trainer.pop("callbacks", []), *([EpochEnd(on_epoch)] if on_epoch else [])]
    defaults: dict[str, Any] = {
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "inference_mode": False,  # see `accuracy`
    }
    compared = layers if feature_weight else ()
    network = unwrapped(model)
    with quiet():
        defaults["max_epochs"] = recipe.rounds
        fit = pl.Trainer(callbacks=callbacks, **{**defaults, **trainer})
        check_startable(fit)
        recipe.shorten(fit, len(train))
        task = _Training(network, recipe, len(train), teacher, distill, compared, feature_weight)
        if compile:
            task.compiled = Compiled(network)
        let_train(network)
        home = next((p.device for p in network.parameters()), torch.device("cpu"))
        fit.fit(task, train, val, ckpt_path=ckpt_path, weights_only=True)
        network.to(home)  # Lightning leaves it on the processor
    for name, value in network.state_dict().items():
        if not is_finite(value):
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
        self.compiled: Compiled | None = None
        self.watch = DivergenceWatch("the training")
        self.checked = LabelCheck(soft=True)
        self.hits = torch.zeros(2, dtype=torch.int64)
        """Hits, and labels that count, of a round over the validation batches."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.checked.look(batch)
        return batch

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        if self.teacher:
            loss = self._taught(x, y, self.teacher[0].to(self.device))
        else:
            logits = self._run(x)
            loss = cross_entropy(logits, self.checked(y, logits))
        self.watch.add(loss, self.current_epoch, batch_idx)
        if self.trainer.is_last_batch:
            self.watch.finish()
        self.log(
            "train_loss",
            loss,
            on_step=False,
            on_epoch=True,
            prog_bar=True,
            sync_dist=True,
            batch_size=len(y),
        )
        return loss

    def _run(self, x: Any) -> Tensor:
        return _logits(self.model, x, self.compiled)

    def _taught(self, x: Tensor, y: Tensor, teacher: nn.Module) -> Tensor:
        """Return the loss with the distances from the teacher in it."""
        theirs, ours = (
            {module: name for name, module in network.named_modules() if name in self.layers}
            for network in (teacher, self.model)
        )
        features: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        terms: list[Tensor] = []

        def compare(module: nn.Module, output: Tensor) -> None:
            # Of copies: an activation may write into the output.
            terms.append(F.mse_loss(output.clone(), features[ours[module]].pop(0)))

        def keep(module: nn.Module, output: Tensor) -> None:
            features[theirs[module]].append(output.clone())

        with torch.no_grad(), _observed(theirs, keep):
            target = _logits(teacher, x)
        with _observed(ours, compare), self._seen_through():
            logits = self._run(x)
        loss = cross_entropy(logits, self.checked(y, logits))
        if self.distill:
            distance = divergence(logits / TEMPERATURE, target / TEMPERATURE).mean()
            loss = (1 - self.distill) * loss + self.distill * TEMPERATURE**2 * distance
        return loss + self.feature_weight * torch.stack(terms).sum() if terms else loss

    def _seen_through(self) -> AbstractContextManager[None]:
        """Return a context in which the network must let its layers be seen, if any are."""
        what = "a comparison of feature maps (feature_weight)"
        return no_reentrant_checkpoints(what) if self.layers else nullcontext()

    def on_train_end(self) -> None:
        self.watch.finish()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        logits = _logits(self.model, x)
        self.hits += torch.stack(hits(logits, self.checked(y, logits)))

    def on_validation_epoch_start(self) -> None:
        self.hits = torch.zeros(2, dtype=torch.int64, device=self.device)

    def on_validation_epoch_end(self) -> None:
        right, counted = self.trainer.strategy.reduce(self.hits, reduce_op="sum")
        self.log("val_top1", right / counted, prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> Any:
        steps = math.ceil(self.steps_per_epoch / self.trainer.world_size)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return self.recipe.optimizers(trained, steps)


@contextmanager
def _observed(
    modules: Iterable[nn.Module], see: Callable[[nn.Module, Tensor], None]
) -> Iterator[None]:
    """Call ``see(module, output)`` at each call of each module while the block runs."""
    hooks = [
        module.register_forward_hook(lambda module, _, output: see(module, output))
        for module in modules
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
