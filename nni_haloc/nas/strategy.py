"""The search: `Haloc`, an NNI one-shot strategy with single-path sampling, a cost-aware loss and feature-map regularisation."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from nni.nas.evaluator.pytorch import Lightning, LightningModule
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.nn.pytorch import LayerChoice
from nni.nas.oneshot.pytorch.strategy import DARTS, no_default_hook
from nni.nas.oneshot.pytorch.supermodule.proxyless import suppress_already_mutated
from nni.nas.space import ExecutableModelSpace, RawFormatModelSpace
from torch import Tensor, nn

from .. import budget as hard_budget
from ..objective import expected_cost
from ..predictors import CostTable
from ..ranks import RankPlan
from .evaluator import plain_loaders
from .space import RankSpace
from .supernet import MixedRankLayer
from .updates import HalocModule

Objective = Literal["settle", "paper"]
Selection = Literal["knapsack", "argmax"]


class Haloc(DARTS):
    """HALOC's search (AAAI 2023, step 2) on a `RankSpace`, for `NasExperiment` or `run_search`.

    Each iteration updates the path probabilities on a validation batch, then the sampled candidates' weights on a training batch.

    Args:
        costs: table of what each candidate costs.
        budget: epsilon, the limit on the whole network's cost, in the table's unit.
        lam: Eq. (9)'s lambda, weight of the feature-map term; 0 leaves it and the original's forward pass out.
        objective: ``settle`` (adds ``beta * |E / budget - 1|``) or ``paper`` (Eq. (7): multiplies by ``eta * (E / budget)^theta``).
        beta, eta, theta: see `nni_haloc.objective`.
        alpha_lr: learning rate of alpha's Adam.
        warmup_epochs: epochs in which the weights alone are trained.
        temperature: of the softmax over alpha.
        select: ``knapsack`` (best score within the budget) or ``argmax`` (the paper's; may exceed the budget).
        seed: of the path sampling, and of alpha's start, which is uniform.

    The evaluator must be NNI's `Lightning` with a training and a validation loader; its ``training_step`` returns the cross-entropy, or a
    dict with it under ``loss`` whose other entries are logged. The space is copied: neither it nor the user's model is changed.
    """

    def __init__(
        self,
        costs: CostTable,
        budget: float,
        *,
        lam: float = 1.0,
        objective: Objective = "settle",
        beta: float = 2.0,
        eta: float = 1.0,
        theta: float = 1.0,
        alpha_lr: float = 0.03,
        warmup_epochs: int = 0,
        temperature: float = 1.0,
        select: Selection = "knapsack",
        seed: int = 0,
    ) -> None:
        for name, value, allowed in (("objective", objective, get_args(Objective)), ("select", select, get_args(Selection))):
            if value not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, found {value!r}")
        super().__init__(arc_learning_rate=alpha_lr, warmup_epochs=warmup_epochs)
        self.costs, self.budget = costs, budget
        self.lam, self.objective, self.beta, self.eta, self.theta = lam, objective, beta, eta, theta
        self.temperature, self.select, self.seed = temperature, select, seed

    def mutate_model(self, model: Any) -> Any:
        """The supernet, made on a copy of the space. Raises TypeError for other spaces, `InfeasibleBudget` where no network fits."""
        if not isinstance(model, RankSpace):
            raise TypeError(f"Haloc searches a RankSpace, found {type(model).__name__}")
        self._row_costs, self._fixed = self.costs.restrict(model.candidates)
        hard_budget.check_feasible(self._row_costs, self._fixed, self.budget, self.costs.metric)
        supernet = super().mutate_model(copy.deepcopy(model, {id(model.original): model.original}))
        # NNI replaces a module under the first of its names; the others must lead to the same mixed layer.
        mixed = {layer.label: layer for layer in self._layers(supernet)}
        for parent in list(supernet.modules()):
            for name, child in parent._modules.items():
                if type(child) is LayerChoice:
                    parent._modules[name] = mixed[child.label]
        for layer in self._layers(supernet):
            with torch.no_grad():
                layer.alpha.zero_()
            layer.temperature = self.temperature
        return supernet

    def mutate_evaluator(self, evaluator: Lightning) -> Lightning:
        with plain_loaders():
            return super().mutate_evaluator(evaluator)

    def default_mutation_hooks(self) -> list[Any]:
        return [_suppress_mixed_rank_layers, MixedRankLayer.mutate, no_default_hook]

    def run_hook(self, hook: Any, name: str, module: nn.Module, memo: dict[str, Any]) -> Any:
        memo.update(self._arch_parameters)
        specs = self.model_space.model_space.specs
        return hook(module, name, memo, {"specs": specs})

    def configure_oneshot_module(self, training_module: LightningModule) -> HalocModule:
        return HalocModule(training_module, self)

    @property
    def mixed_layers(self) -> dict[str, MixedRankLayer]:
        """The supernet's mixed layers by layer name."""
        return {layer.label: layer for layer in self._layers(self.supernet)}

    @property
    def probabilities(self) -> dict[str, dict[str, float]]:
        """Layer to candidate to probability."""
        return {name: layer.export_probs({})[name] for name, layer in self.mixed_layers.items()}

    def expected_cost(self) -> Tensor:
        """Eq. (6): expected cost of the whole network under the present probabilities, differentiable in alpha."""
        layers = self.mixed_layers.values()
        rows = [torch.tensor([self._row_costs[x.label][c] for c in x.names], device=x.alpha.device) for x in layers]
        return expected_cost([x.probs for x in layers], rows, self._fixed)

    def plan(self, budget: float | None = None) -> RankPlan:
        """The chosen ranks, for the search's budget or another one; with ``knapsack`` the cost never exceeds it."""
        budget = self.budget if budget is None else budget
        layers = self.mixed_layers
        if self.select == "argmax":
            choice = {name: layer.export({})[name] for name, layer in layers.items()}
        else:
            scores = {n: dict(zip(x.names, (-x.task_gradient.mean).tolist(), strict=True)) for n, x in layers.items()}
            choice = hard_budget.choose(scores, self._row_costs, self._fixed, budget, self.costs.metric)
        facts = {
            "rule": "haloc",
            "select": self.select,
            "objective": self.objective,
            "metric": self.costs.metric,
            "budget": budget,
            "cost": hard_budget.total(choice, self._row_costs, self._fixed),
            "expected_cost": float(self.expected_cost().detach()),
            "original_cost": self.costs.original,
            "seed": self.seed,
        }
        return RankPlan({name: self.supernet.candidates[name][c] for name, c in choice.items()}, facts)

    def network(self, plan: RankPlan | None = None) -> nn.Module:
        """The compressed network of a plan, plain `torch.nn`, with copies of the searched weights."""
        return self.supernet.freeze((plan or self.plan()).names)

    def list_models(self, sort: bool = True, limit: int | None = 1) -> Iterator[RawFormatModelSpace]:
        """NNI's export: the planned network with the searched weights."""
        yield RawFormatModelSpace(self.supernet, None).freeze(self.plan().names)

    @staticmethod
    def _layers(supernet: nn.Module) -> list[MixedRankLayer]:
        return [module for module in supernet.modules() if isinstance(module, MixedRankLayer)]


class _InProcess(SequentialExecutionEngine):
    """NNI's sequential engine, less its habit of swallowing what a trial reports: results go on to the experiment manager."""

    def _run_single_model(self, model: ExecutableModelSpace) -> None:
        model.execute()


def run_search(space: RankSpace, evaluator: Lightning, strategy: Haloc) -> Haloc:
    """Run a search in this process, registering no experiment of its own, so that a trial of an NNI experiment can report while it runs."""
    strategy(RawFormatModelSpace.from_model(space, evaluator), _InProcess())
    return strategy


def _suppress_mixed_rank_layers(module: nn.Module, name: str, memo: dict[str, Any], mutate_kwargs: dict[str, Any]) -> bool | None:
    return True if isinstance(module, MixedRankLayer) else suppress_already_mutated(module, name, memo, mutate_kwargs)
