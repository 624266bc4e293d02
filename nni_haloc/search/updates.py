"""Step 2: the alternating updates of probabilities and weights, as NNI's Lightning module of a one-shot search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from nni.nas.evaluator.pytorch import LightningModule
from nni.nas.oneshot.pytorch.differentiable import DartsLightningModule
from torch import Tensor, nn

from nni_haloc.search.approach import FeatureMaps, Kernels
from nni_haloc.search.objective import schedule, weight_loss
from nni_haloc.utils.errors import Diverged

if TYPE_CHECKING:
    from nni_haloc.search.strategy import Haloc


_ROUNDING = 3e-4
"""Gradients of alpha below this share of the largest layer's say nothing: float32 decompositions of a kernel differ by about 1e-4."""


_EXPLOSION = 1e4
"""A step of a logit after which the candidates' probabilities say nothing: e to that power is beyond float64, and 1 is enough to learn."""


_EPOCH: dict[str, Any] = {"on_step": False, "on_epoch": True, "sync_dist": True, "batch_size": 1}
"""Of a figure that is logged: the mean over an epoch's iterations, each of the same weight, and over the processes."""


class HalocModule(DartsLightningModule):
    """The Lightning module of the search: the alternating updates of step 2 around the evaluator's ``training_step``."""

    def __init__(self, training_module: LightningModule, strategy: Haloc) -> None:
        super().__init__(
            training_module,
            arc_learning_rate=strategy.arc_learning_rate,
            warmup_epochs=strategy.warmup_epochs,
        )
        self._strategy = strategy
        self._generator = torch.Generator().manual_seed(strategy.seed)
        self._approach: FeatureMaps | Kernels | None = None
        self.latest: Tensor | None = None
        """Cross-entropy and distance of feature maps of the last weight step ``(2,)``: means over the processes."""

    def on_fit_start(self) -> None:
        supernet = self._strategy.supernet
        self._mixed = list(self._strategy.mixed_layers.values())
        if self._strategy.lam:
            original = supernet.original.to(self.device)
            if self._strategy.approach == "features":
                self._approach = FeatureMaps(
                    supernet, self._mixed, original, self._strategy.approach_share
                )
            else:
                self._approach = Kernels(self._mixed, original)
        if (
            self._strategy.start is not None and not supernet.prices.any()
        ):  # a search that is resumed has settled
            self._strategy.settle()
        super().on_fit_start()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        if (
            self.trainer.current_epoch >= self.warmup_epochs
            and batch_idx % self._strategy.alpha_every == 0
        ):
            self._probability_step(batch["val"], batch_idx)
        self._weight_step(batch["train"], batch_idx)
        self.advance_lr_schedulers(batch_idx)

    def _probability_step(self, batch: Any, batch_idx: int) -> None:
        """Update alpha alone: the task's gate gradients come from one sampled path, the cost's gradient is exact."""
        s, alphas = self._strategy, [layer.alpha for layer in self._mixed]
        self._draw(searching=True)
        ce = self._task_loss(batch, 2 * batch_idx, "val")
        task: Sequence[Tensor | None] = torch.autograd.grad(ce, alphas, allow_unused=True)
        ce, task = self._averaged(ce, task)
        self._check_finite(ce, *(t for t in task if t is not None))
        loss_of_ce = ce.detach().clone().requires_grad_()
        loss = s.probability_loss(loss_of_ce)
        by_ce, *by_cost = torch.autograd.grad(loss, [loss_of_ce, *alphas], materialize_grads=True)
        # Adam divides by the gradients' size: where a layer's candidates are equally good, it would make a preference of rounding.
        rounding = _ROUNDING * max(
            (float(t.abs().max()) for t in task if t is not None), default=0.0
        )
        for layer, from_task, from_cost in zip(self._mixed, task, by_cost, strict=True):
            layer.record()
            if from_task is not None and float(from_task.abs().max()) < rounding:
                from_task = torch.zeros_like(from_task)
            layer.alpha.grad = from_cost if from_task is None else by_ce * from_task + from_cost
        optimizer = self.architecture_optimizers()
        before = [alpha.detach().clone() for alpha in alphas]
        optimizer.step()
        optimizer.zero_grad()
        self._check_step(before)
        s.settle(self._progress(batch_idx + 1, after=self.warmup_epochs))
        self.log("search/expected_cost", s.expected_cost().detach(), **{**_EPOCH, "on_step": True})
        self.log("search/probability_loss", loss.detach(), **_EPOCH)

    def _averaged(
        self, ce: Tensor, task: Sequence[Tensor | None]
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        """The cross-entropy, its gradients and the layers' gate gradients, averaged over the processes, which sample the same path.

        A layer that a process has not called counts as nothing there; one that none has called has no gradient.
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
        """Update the sampled candidates and the shared rest; a parameter without gradient is not touched by the optimizer."""
        self._draw(searching=False)
        lam = self._strategy.lam * schedule(
            self._strategy.lam_schedule, self._progress(batch_idx, endless=0.0)
        )
        if self._approach is None:
            loss = ce = self._task_loss(batch, 2 * batch_idx + 1, "train")
            approach = torch.zeros(())
        else:
            with self._approach.compared() as terms:
                ce = self._task_loss(batch, 2 * batch_idx + 1, "train")
            approach = (
                torch.stack(terms).sum() if terms else torch.zeros_like(ce)
            )  # no mixed layer is called, or none can be compared
            loss = weight_loss(ce, approach, lam)
            self.log("search/approach_loss", approach.detach(), **_EPOCH)
        self._check_finite(loss)
        self.latest = self.trainer.strategy.reduce(
            torch.stack([ce.detach(), approach.detach().to(ce)]), reduce_op="mean"
        )
        self.log("search/weight_loss", loss.detach(), **_EPOCH)
        self.advance_optimization(loss, batch_idx, self._strategy.clip, "norm")

    def _progress(self, batch_idx: int, after: int = 0, endless: float = 1.0) -> float:
        """The share of the epochs after the first ``after`` ones that is over; ``endless`` for a trainer without a number of epochs."""
        epochs = (self.trainer.max_epochs or 0) - after
        return (
            (self.trainer.current_epoch - after + batch_idx / self.trainer.num_training_batches)
            / epochs
            if epochs > 0
            else endless
        )

    def _check_finite(self, loss: Tensor, *gradients: Tensor) -> None:
        if not all(torch.isfinite(t).all() for t in (loss, *gradients)):
            found, epoch = float(loss.detach()), self.trainer.current_epoch + 1
            raise Diverged(
                f"the search diverged: loss {found} in epoch {epoch}; lower its learning rate"
            )

    def _check_step(self, before: Sequence[Tensor]) -> None:
        for layer, alpha in zip(self._mixed, before, strict=True):
            step = float((layer.alpha.detach() - alpha).abs().max())
            if not step <= _EXPLOSION:
                raise Diverged(
                    f"the search diverged: alpha of layer {layer.label!r} moved by {step:.3g} in one step; lower alpha_lr"
                )

    def _draw(self, searching: bool) -> None:
        for layer in self._mixed:
            layer.searching = searching
            layer.draw(self._generator)

    def _task_loss(self, batch: Any, batch_idx: int, side: str) -> Tensor:
        result = self.training_module.training_step(batch, batch_idx)
        entries = result if isinstance(result, dict) else {"loss": result}
        for key, value in entries.items():
            self.log(
                f"search/{side}_{key}",
                value.detach() if isinstance(value, Tensor) else value,
                on_step=False,
                on_epoch=True,
                sync_dist=True,
            )
        return entries["loss"]

    def on_train_epoch_end(self) -> None:
        if self.loggers:
            self.log_probs(self._strategy.probabilities)
        super().on_train_epoch_end()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What Lightning does not know of: the random state of the path sampling, and the running means that score the candidates."""
        scores = {
            name: dict(vars(layer.task_gradient))
            for name, layer in self._strategy.mixed_layers.items()
        }
        checkpoint["haloc_search"] = {"sampling": self._generator.get_state(), "scores": scores}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["haloc_search"]
        self._generator.set_state(state["sampling"])
        for name, layer in self._strategy.mixed_layers.items():
            vars(layer.task_gradient).update(state["scores"][name])

    def arch_parameters(self) -> list[nn.Parameter]:
        return [layer.alpha for layer in self._strategy.mixed_layers.values()]

    def configure_architecture_optimizers(self) -> torch.optim.Optimizer:
        """Without weight decay: decay would pull the probabilities towards uniform, and so the cost away from the budget."""
        if self._strategy.alpha_optimizer == "sgd":
            return torch.optim.SGD(self.arch_parameters(), self.arc_learning_rate)
        return torch.optim.Adam(self.arch_parameters(), self.arc_learning_rate, betas=(0.5, 0.999))
