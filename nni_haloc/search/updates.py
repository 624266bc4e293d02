"""Step 2: the alternating updates of probabilities and weights, as NNI's Lightning module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from nni.nas.evaluator.pytorch import LightningModule
from nni.nas.oneshot.pytorch.differentiable import DartsLightningModule
from torch import Tensor, nn

from nni_haloc.search.approach import FeatureMaps, Kernels
from nni_haloc.search.objective import schedule, weight_loss
from nni_haloc.search.probabilities import SearchState
from nni_haloc.utils.errors import Diverged

_ROUNDING = 3e-4
"""Gradients of alpha below this share of the largest layer's say nothing.

Float32 decompositions of a kernel differ by about 1e-4.
"""

_EXPLOSION = 1e4
"""A step of a logit after which the candidates' probabilities say nothing.

e to that power is beyond float64, and 1 is enough to learn.
"""

_EPOCH: dict[str, Any] = {"on_step": False, "on_epoch": True, "sync_dist": True, "batch_size": 1}
"""Log the mean over an epoch's iterations, all of one weight, and over the processes."""


class HalocModule(DartsLightningModule):
    """The Lightning module of the search: step 2 around the evaluator's ``training_step``.

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
        self._generator = torch.Generator().manual_seed(seed)
        self._approach: FeatureMaps | Kernels | None = None
        self.latest: Tensor | None = None
        """Cross-entropy and Eq. (8)'s distance in the last weight step, ``(2,)``: means over the
        processes."""

    def on_fit_start(self) -> None:
        """Begin: prepare Eq. (8), and put a search from sensitivities at its budget."""
        if self.options.lam:
            supernet = self.state.supernet
            original = supernet.original.to(self.device)
            if self.options.approach == "features":
                share = self.options.approach_share
                self._approach = FeatureMaps(supernet, self._mixed, original, share)
            else:
                self._approach = Kernels(self._mixed, original)
        resumed = bool(self.state.prices.any())  # it has settled before
        if self.state.starts_at_budget and not resumed:
            self.state.settle()
        super().on_fit_start()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Update alpha on a validation batch, when it is due, and the weights on a training batch.

        Args:
            batch: one batch each under ``train`` and ``val``.
            batch_idx: number of the iteration in its epoch, from 0.
        """
        warm = self.trainer.current_epoch >= self.warmup_epochs
        if warm and batch_idx % self.options.alpha_every == 0:
            self._probability_step(batch["val"], batch_idx)
        self._weight_step(batch["train"], batch_idx)
        self.advance_lr_schedulers(batch_idx)

    def _probability_step(self, batch: Any, batch_idx: int) -> None:
        """Update alpha alone.

        The task's gate gradients come from one sampled path; the cost's gradient is exact.
        """
        alphas = [layer.alpha for layer in self._mixed]
        self._draw(searching=True)
        ce = self._task_loss(batch, 2 * batch_idx, "val")
        task: Sequence[Tensor | None] = torch.autograd.grad(ce, alphas, allow_unused=True)
        ce, task = self._averaged(ce, task)
        self._check_finite(ce, *(t for t in task if t is not None))
        loss = self._set_gradients(ce, task)
        optimizer = self.architecture_optimizers()
        before = [alpha.detach().clone() for alpha in alphas]
        optimizer.step()
        optimizer.zero_grad()
        self._check_step(before)
        self.state.settle(self._progress(batch_idx + 1, after=self.warmup_epochs))
        cost = self.state.expected_cost().detach()
        self.log("search/expected_cost", cost, **{**_EPOCH, "on_step": True})
        self.log("search/probability_loss", loss.detach(), **_EPOCH)

    def _set_gradients(self, ce: Tensor, task: Sequence[Tensor | None]) -> Tensor:
        """Give alpha the gradient of `SearchState.probability_loss`, and return that loss."""
        alphas = [layer.alpha for layer in self._mixed]
        loss_of_ce = ce.detach().clone().requires_grad_()
        loss = self.state.probability_loss(loss_of_ce)
        by_ce, *by_cost = torch.autograd.grad(loss, [loss_of_ce, *alphas], materialize_grads=True)
        # Adam divides by the gradients' size: where a layer's candidates are equally good, it would
        # make a preference of rounding.
        largest = max((float(t.abs().max()) for t in task if t is not None), default=0.0)
        for layer, from_task, from_cost in zip(self._mixed, task, by_cost, strict=True):
            layer.record()
            if from_task is None:
                layer.alpha.grad = from_cost
                continue
            if float(from_task.abs().max()) < _ROUNDING * largest:
                from_task = torch.zeros_like(from_task)
            layer.alpha.grad = by_ce * from_task + from_cost
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
        for layer, share, pending in zip(self._mixed, called, means[1::2], strict=True):
            layer.pending = pending if share > 0 else None
        return ce.squeeze(0), [
            t if share > 0 else None for share, t in zip(called, means[::2], strict=True)
        ]

    def _weight_step(self, batch: Any, batch_idx: int) -> None:
        """Update the sampled candidates and the shared rest, on Eq. (9).

        A parameter without a gradient is not touched by the optimizer.
        """
        self._draw(searching=False)
        if self._approach is None:
            loss = ce = self._task_loss(batch, 2 * batch_idx + 1, "train")
            approach = torch.zeros(())
        else:
            with self._approach.compared() as terms:
                ce = self._task_loss(batch, 2 * batch_idx + 1, "train")
            # No terms: no mixed layer was called, or none can be compared.
            approach = torch.stack(terms).sum() if terms else torch.zeros_like(ce)
            progress = self._progress(batch_idx, endless=0.0)
            lam = self.options.lam * schedule(self.options.lam_schedule, progress)
            loss = weight_loss(ce, approach, lam)
            self.log("search/approach_loss", approach.detach(), **_EPOCH)
        self._check_finite(loss)
        self.latest = self.trainer.strategy.reduce(
            torch.stack([ce.detach(), approach.detach().to(ce)]), reduce_op="mean"
        )
        self.log("search/weight_loss", loss.detach(), **_EPOCH)
        self.advance_optimization(loss, batch_idx, self.options.clip, "norm")

    def _progress(self, batch_idx: int, after: int = 0, endless: float = 1.0) -> float:
        """Return the share of the epochs beyond the first ``after`` that is over.

        ``endless`` is the answer for a trainer without a number of epochs.
        """
        epochs = (self.trainer.max_epochs or 0) - after
        if epochs <= 0:
            return endless
        done = self.trainer.current_epoch - after + batch_idx / self.trainer.num_training_batches
        return done / epochs

    def _check_finite(self, loss: Tensor, *gradients: Tensor) -> None:
        """Raise `Diverged` unless all numbers are finite."""
        if not all(torch.isfinite(t).all() for t in (loss, *gradients)):
            value, epoch = float(loss.detach()), self.trainer.current_epoch + 1
            raise Diverged(
                f"the search diverged: loss {value} in epoch {epoch}; lower its learning rate"
            )

    def _check_step(self, before: Sequence[Tensor]) -> None:
        """Raise `Diverged` if alpha has jumped away from where it was."""
        for layer, alpha in zip(self._mixed, before, strict=True):
            step = float((layer.alpha.detach() - alpha).abs().max())
            if not step <= _EXPLOSION:
                raise Diverged(
                    f"the search diverged: alpha of layer {layer.label!r} moved by {step:.3g}"
                    " in one step; lower alpha_lr"
                )

    def _draw(self, searching: bool) -> None:
        """Sample a path, the same in all processes."""
        for layer in self._mixed:
            layer.searching = searching
            layer.draw(self._generator)

    def _task_loss(self, batch: Any, batch_idx: int, side: str) -> Tensor:
        """Run the evaluator's training step, log what it returns, and return its loss."""
        result = self.training_module.training_step(batch, batch_idx)
        entries = result if isinstance(result, dict) else {"loss": result}
        for key, value in entries.items():
            figure = value.detach() if isinstance(value, Tensor) else value
            self.log(f"search/{side}_{key}", figure, **_EPOCH)
        return entries["loss"]

    def on_train_epoch_end(self) -> None:
        """Log the probabilities to the trainer's loggers, if it has any."""
        if self.loggers:
            self.log_probs(self.state.probabilities)
        super().on_train_epoch_end()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what Lightning does not know of.

        That is the random state of the path sampling, and the running means that score candidates.
        """
        scores = {
            name: dict(vars(layer.task_gradient)) for name, layer in self.state.mixed_layers.items()
        }
        checkpoint["haloc_search"] = {"sampling": self._generator.get_state(), "scores": scores}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up what `on_save_checkpoint` has kept."""
        saved = checkpoint["haloc_search"]
        self._generator.set_state(saved["sampling"])
        for name, layer in self.state.mixed_layers.items():
            vars(layer.task_gradient).update(saved["scores"][name])

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
