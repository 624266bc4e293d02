"""Step 2: the alternating updates of probabilities and weights, as NNI's Lightning module."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nni.nas.evaluator.pytorch import LightningModule
from nni.nas.oneshot.pytorch.differentiable import DartsLightningModule
from scipy.special import softmax
from torch import Tensor, nn

from nni_haloc.search.approach import FeatureMaps, Kernels
from nni_haloc.search.dense_path import DensePath
from nni_haloc.search.objective import schedule, weight_loss
from nni_haloc.search.probabilities import SearchState
from nni_haloc.search.supernet import MixedRankLayer
from nni_haloc.training.averaging import MovingAverage
from nni_haloc.training.divergence import DivergenceWatch, diverged
from nni_haloc.utils.errors import Diverged, SettingsError, UnusableCheckpoint
from nni_haloc.utils.memory import give_back_freed
from nni_haloc.utils.placement import HostCopy, to_device
from nni_haloc.utils.reentrant import no_reentrant_checkpoints

_ROUNDING = 3e-4
"""Gradients of alpha below this share of the largest layer's say nothing.

Float32 decompositions of a kernel differ by about 1e-4.
"""

_EXPLOSION = 1e4
"""A step of a logit after which the candidates' probabilities say nothing.

e to that power is beyond float64, and 1 is enough to learn.
"""

_GIVES_BACK = 4
"""Every so many iterations, freed memory goes back to the system.

Each path has buffers of its own sizes, and glibc keeps what each of them has freed.
"""

_EPOCH: dict[str, Any] = {"on_step": False, "on_epoch": True, "sync_dist": True, "batch_size": 1}
"""Log the mean over an epoch's iterations, all of one weight, and over the processes."""


@dataclass
class _Moved:
    """Hold what a step of alpha has left on its device, on its way to the processor.

    Attributes:
        numbers: the cross-entropy, every alpha after the step, the gate gradients of ``called``.
        before: every layer's alpha before the step.
        called: the layers that the network has called.
    """

    numbers: HostCopy
    before: list[np.ndarray]
    called: list[MixedRankLayer]


class HalocModule(DartsLightningModule):
    """The Lightning module of the search: step 2 around the evaluator's ``training_step``.

    An iteration does not wait for its device: both paths are sampled by the probabilities before
    alpha's step, whose outcome is copied to the processor while the weights' step is under way.

    Args:
        training_module: the evaluator's module; its ``training_step`` returns the cross-entropy, or
            a dict with it under ``loss``.
        state: probabilities and prices; it also says how they are updated (`SearchOptions`).
        seed: of the path sampling.
    """

    def __init__(self, training_module: LightningModule, state: SearchState, seed: int) -> None:
        options = state.options
        super().__init__(
            training_module, arc_learning_rate=options.alpha_lr, warmup_epochs=options.warmup_epochs
        )
        self.state, self.options = state, options
        self._mixed = list(state.mixed_layers.values())
        self._generator = np.random.default_rng(seed)
        self._watch = DivergenceWatch("the search")
        self._approach: FeatureMaps | Kernels | DensePath | None = None
        self._dense: DensePath | None = None
        self._average: MovingAverage | None = None
        self._saved_average: Any = None
        self.latest: Tensor | None = None
        """Cross-entropy and Eq. (8)'s distance in the last weight step, ``(2,)``: means over the
        processes."""

    def on_fit_start(self) -> None:
        """Begin: prepare Eq. (8), and put a search from sensitivities at its budget."""
        features = self.options.lam and self.options.approach == "features"
        supernet, share = self.state.supernet, self.options.approach_share
        if self.options.lam or self.options.compile:
            supernet.original.to(self.device)
        if self.options.compile:
            self._dense = self._compiled(share if features else None)
        if features:
            maps = FeatureMaps(supernet, self._mixed, supernet.original, share)
            self._approach = self._dense or maps
        elif self.options.lam:
            self._approach = Kernels(self._mixed, supernet.original)
        if self.options.average:
            alphas = {id(layer.alpha) for layer in self._mixed}
            weights = (p for p in supernet.parameters() if p.requires_grad and id(p) not in alphas)
            self._average = MovingAverage(weights, self.options.average)
            if self._saved_average is not None:
                self._average.load(self._saved_average)
        self.state.refresh()
        resumed = bool(self.state.prices.any())  # it has settled before
        if self.state.starts_at_budget and not resumed:
            self.state.settle()
        super().on_fit_start()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Hand the batches of either side to the evaluator's module, as they leave the loaders."""
        hook = self.training_module.on_before_batch_transfer
        return {side: hook(part, dataloader_idx) for side, part in batch.items()}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Update alpha on a validation batch, when it is due, and the weights on a training batch.

        Args:
            batch: one batch each under ``train`` and ``val``.
            batch_idx: number of the iteration in its epoch, from 0.
        """
        warm = self.trainer.current_epoch >= self.warmup_epochs
        due = warm and batch_idx % self.options.alpha_every == 0
        path, *next_path = [self._draw() for _ in range(1 + due)]
        moved = self._probability_step(batch["val"], batch_idx, path) if due else None
        self._weight_step(batch["train"], batch_idx, *(next_path or [path]))
        if self._average is not None:
            self._average.update()
        if moved is not None:
            self._settle(moved, batch_idx)
        if self.device.type == "cpu" and batch_idx % _GIVES_BACK == 0:
            give_back_freed()
        if self.trainer.is_last_batch:
            self._watch.finish()
        self.advance_lr_schedulers(batch_idx)

    def _probability_step(self, batch: Any, batch_idx: int, path: Sequence[int]) -> _Moved:
        """Update alpha alone.

        The task's gate gradients come from one sampled path; the cost's gradient is exact.
        """
        alphas = [layer.alpha for layer in self._mixed]
        self._take(path, searching=True)
        with self._running():
            ce = self._task_loss(batch, 2 * batch_idx, "val")
        task: Sequence[Tensor | None]
        if self._dense is not None:
            task = self._dense.alpha_gradients(ce)
        else:
            task = torch.autograd.grad(ce, alphas, allow_unused=True)
        ce, task = self._averaged(ce, task)
        loss = self._set_gradients(ce, task)
        before = [layer.logits * layer.temperature for layer in self._mixed]
        optimizer = self.architecture_optimizers()
        optimizer.step()
        optimizer.zero_grad()
        self.log("search/probability_loss", loss.detach(), **_EPOCH)
        gates = {layer: layer.pending for layer in self._mixed if layer.pending is not None}
        called = list(gates)
        numbers = [ce.reshape(1), *alphas, *gates.values()]
        copy = HostCopy(torch.cat([part.detach().double() for part in numbers]))
        for layer in called:
            layer.pending = None
        return _Moved(copy, before, called)

    def _settle(self, moved: _Moved, batch_idx: int) -> None:
        """Look at alpha's step, and put the expected cost where it should be.

        Raises:
            Diverged: if the cross-entropy or a gate gradient is not finite, or alpha has jumped.
        """
        numbers = moved.numbers.get()
        sizes = [1, *(len(layer.names) for layer in (*self._mixed, *moved.called))]
        ce, *rest = np.split(numbers, np.cumsum(sizes)[:-1])
        alphas, gates = rest[: len(self._mixed)], rest[len(self._mixed) :]
        if not all(np.isfinite(values).all() for values in (ce, *gates)):
            raise diverged("the search", float(ce[0]), self.trainer.current_epoch, batch_idx)
        probs = {}
        for layer, before, alpha in zip(self._mixed, moved.before, alphas, strict=True):
            probs[layer] = softmax(before / layer.temperature)
            step = np.abs(alpha - before).max()
            if not step <= _EXPLOSION:
                raise Diverged(
                    f"the search diverged: alpha of layer {layer.label!r} moved by {step:.3g}"
                    " in one step; lower alpha_lr"
                )
            layer.know_alpha(alpha)
        for layer, gradients in zip(moved.called, gates, strict=True):
            layer.task_gradient.add(gradients, probs[layer])
        progress = self._progress(batch_idx + 1, after=self.warmup_epochs)
        self.state.settle(progress, self._drawn_budget())
        cost = to_device(torch.tensor(self.state.known_cost()), self.device)
        self.log("search/expected_cost", cost, **{**_EPOCH, "on_step": True})

    def _set_gradients(self, ce: Tensor, task: Sequence[Tensor | None]) -> Tensor:
        """Give alpha the gradient of `SearchState.probability_loss`, and return that loss."""
        alphas = [layer.alpha for layer in self._mixed]
        loss_of_ce = ce.detach().clone().requires_grad_()
        loss = self.state.probability_loss(loss_of_ce)
        by_ce, *by_cost = torch.autograd.grad(loss, [loss_of_ce, *alphas], materialize_grads=True)
        # Adam divides by the gradients' size: where a layer's candidates are equally good, it would
        # make a preference of rounding.
        sizes = [0 * ce.detach() if t is None else t.abs().max() for t in task]
        is_paper = self.state.options.objective == "paper"  # which has no such exception
        least = 0.0 if is_paper else _ROUNDING * torch.stack(sizes).max()
        for alpha, size, from_task, from_cost in zip(alphas, sizes, task, by_cost, strict=True):
            alpha.grad = from_cost
            if from_task is not None:
                alpha.grad = from_cost + by_ce * from_task * (size >= least)
        return loss

    def _averaged(
        self, ce: Tensor, task: Sequence[Tensor | None]
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        """Average the cross-entropy, its gradients and the gate gradients over the processes.

        All processes sample the same path. A layer that a process has not called counts as nothing
        there; one that none has called has no gradient.
        """
        if self.trainer.world_size == 1:
            return ce, task
        called = ce.new_tensor([t is not None for t in task])
        parts = [ce.detach().reshape(1), called]
        for layer, t in zip(self._mixed, task, strict=True):
            parts += [
                torch.zeros_like(layer.alpha) if part is None else part
                for part in (t, layer.pending)
            ]
        flat = self.trainer.strategy.reduce(
            torch.cat([part.detach().to(ce) for part in parts]), reduce_op="mean"
        )
        ce, called, *means = flat.split([len(part) for part in parts])
        averaged: list[Tensor | None] = []
        for i, (layer, mine) in enumerate(zip(self._mixed, task, strict=True)):
            by_any = mine is not None or bool(called[i] > 0)  # the device is asked only if need be
            averaged.append(means[2 * i] if by_any else None)
            layer.pending = means[2 * i + 1] if by_any else None
        return ce.squeeze(0), averaged

    def _weight_step(self, batch: Any, batch_idx: int, path: Sequence[int]) -> None:
        """Update the sampled candidates and the shared rest, on Eq. (9).

        A parameter without a gradient is not touched by the optimizer.
        """
        self._take(path, searching=False)
        if self._approach is None:
            with self._running():
                loss = ce = self._task_loss(batch, 2 * batch_idx + 1, "train")
            approach = torch.zeros_like(ce)
        else:
            with self._running(), self._approach.compared() as terms:
                ce = self._task_loss(batch, 2 * batch_idx + 1, "train")
            # No terms: no mixed layer was called, or none can be compared.
            approach = torch.stack(terms).sum() if terms else torch.zeros_like(ce)
            progress = self._progress(batch_idx, endless=0.0)
            lam = self.options.lam * schedule(self.options.lam_schedule, progress)
            loss = weight_loss(ce, approach, lam)
            self.log("search/approach_loss", approach.detach(), **_EPOCH)
        self._watch.add(loss, self.trainer.current_epoch, batch_idx)
        self.latest = self.trainer.strategy.reduce(
            torch.stack([ce.detach(), approach.detach().to(ce)]), reduce_op="mean"
        )
        self.log("search/weight_loss", loss.detach(), **_EPOCH)
        self.advance_optimization(loss, batch_idx, self.options.clip, "norm")

    def _compiled(self, share: float | None) -> DensePath:
        """Return what runs the sampled paths compiled.

        Raises:
            SettingsError: for several processes.
        """
        if self.trainer.world_size > 1:
            why = "because each kernel's gradients are handed on by the process itself"
            found = self.trainer.world_size
            raise SettingsError(f"compile: expected one process, {why}; found {found}")
        return DensePath(self.state.supernet, self._mixed, share)

    def _running(self) -> AbstractContextManager[None]:
        """Have the supernet run the sampled path compiled, if the options say so."""
        return nullcontext() if self._dense is None else self._dense.running()

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Run the backward pass, down to the sampled candidates' parameters."""
        super().manual_backward(loss, *args, **kwargs)
        if self._dense is not None:
            self._dense.give_gradients()

    def _progress(self, batch_idx: int, after: int = 0, endless: float = 1.0) -> float:
        """Return the share of the epochs beyond the first ``after`` that is over.

        ``endless`` is the answer for a trainer without a number of epochs.
        """
        epochs = (self.trainer.max_epochs or 0) - after
        if epochs <= 0:
            return endless
        done = self.trainer.current_epoch - after + batch_idx / self.trainer.num_training_batches
        return done / epochs

    def _draw(self) -> list[int]:
        """Sample a path, the same in all processes: a candidate's place for each layer."""
        return [layer.draw(self._generator) for layer in self._mixed]

    def _drawn_budget(self) -> float | None:
        """Draw the budget of the next steps, if the options have a range for it.

        Half of the draws are in the lowest quarter of the range: small ranks have most to learn.
        """
        if self.options.budget_range is None:
            return None
        low, high = self.options.budget_range
        return float(low + (high - low) * self._generator.random() ** 2)

    def _take(self, path: Sequence[int], *, searching: bool) -> None:
        """Have the next passes run a path."""
        for layer, sampled in zip(self._mixed, path, strict=True):
            layer.searching, layer.sampled = searching, sampled

    def _task_loss(self, batch: Any, batch_idx: int, side: str) -> Tensor:
        """Run the evaluator's training step, log what it returns, and return its loss."""
        with no_reentrant_checkpoints("the search"):
            result = self.training_module.training_step(batch, batch_idx)
        entries = result if isinstance(result, dict) else {"loss": result}
        for key, value in entries.items():
            figure = value.detach() if isinstance(value, Tensor) else value
            self.log(f"search/{side}_{key}", figure, **_EPOCH)
        return entries["loss"]

    def on_train_epoch_end(self) -> None:
        """Log probabilities and expected costs to the trainer's loggers, if it has any."""
        if self.loggers:
            self.log_probs(self.state.probabilities)
            self.log_dict(self.state.figures(), sync_dist=True)
        super().on_train_epoch_end()

    def on_train_end(self) -> None:
        """Look at the last losses of a search that ends within an epoch."""
        self._watch.finish()
        super().on_train_end()

    def on_fit_end(self) -> None:
        """End at the budget, with the averages for weights if they were kept."""
        if self.options.budget_range is not None:
            self.state.settle()
        if self._average is not None:
            self._average.put()
        super().on_fit_end()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what Lightning does not know of.

        That is the random state of the path sampling, and the running means that score candidates.
        """
        means = {name: layer.task_gradient for name, layer in self.state.mixed_layers.items()}
        scores = {name: (mean.total.tolist(), mean.count) for name, mean in means.items()}
        sampling = self._generator.bit_generator.state
        state: dict[str, Any] = {"sampling": sampling, "scores": scores}
        state["curve"] = self.state.curve
        if self._average is not None:
            state["average"] = self._average.state()
        checkpoint["haloc_search"] = state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up what `on_save_checkpoint` has kept.

        Raises:
            UnusableCheckpoint: for an unfinished search of version 0.1, which sampled by torch.
        """
        saved = checkpoint["haloc_search"]
        old = isinstance(saved["sampling"], Tensor)
        if not old:
            self._generator.bit_generator.state = saved["sampling"]
        elif checkpoint["epoch"] + 1 < (self.trainer.max_epochs or 0):
            why = "its paths were sampled by other random numbers"
            raise UnusableCheckpoint(f"a search of version 0.1: {why}; start without --resume")
        self._saved_average = saved.get("average")
        self.state.curve = saved.get("curve", [])  # earlier versions kept none
        for name, layer in self.state.mixed_layers.items():
            score = saved["scores"][name]
            total, count = score.values() if old else score
            layer.task_gradient.total, layer.task_gradient.count = np.array(total), count

    def arch_parameters(self) -> list[nn.Parameter]:
        """Return alpha of every mixed layer, ``(candidates,)`` each."""
        return [layer.alpha for layer in self._mixed]

    def configure_architecture_optimizers(self) -> torch.optim.Optimizer:
        """Return alpha's optimizer.

        It has no weight decay, which would pull the probabilities towards uniform, and so the cost
        away from the budget.
        """
        if self.options.alpha_optimizer == "sgd":
            return torch.optim.SGD(self.arch_parameters(), self.arc_learning_rate)
        return torch.optim.Adam(self.arch_parameters(), self.arc_learning_rate, betas=(0.5, 0.999))
