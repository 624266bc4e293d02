"""The search: `Haloc`, an NNI one-shot strategy with single-path sampling, a cost-aware loss and feature-map regularisation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from nni.nas.evaluator.pytorch import Lightning, LightningModule
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.nn.pytorch import LayerChoice
from nni.nas.oneshot.pytorch.strategy import DARTS, no_default_hook
from nni.nas.oneshot.pytorch.supermodule.proxyless import suppress_already_mutated
from nni.nas.space import ExecutableModelSpace, RawFormatModelSpace
from torch import Tensor, nn

from nni_haloc.costs.table import CostTable
from nni_haloc.plan.budget import Limit, Scores, check_feasible, choose
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.search.evaluator import plain_loaders
from nni_haloc.search.objective import Schedule, expected_cost, probability_loss_paper, settle
from nni_haloc.search.space import RankSpace
from nni_haloc.search.supernet import MixedRankLayer
from nni_haloc.search.updates import HalocModule
from nni_haloc.space.modules import copy_of

Objective = Literal["settle", "paper"]
Selection = Literal["knapsack", "argmax"]
AlphaOptimizer = Literal["adam", "sgd"]
Approach = Literal["features", "weights"]

ARRIVAL = 0.4
"""Share of the search, after the warm-up, in which the expected cost goes to the budget. Until then dearer candidates learn, too."""


class Haloc(DARTS):
    """HALOC's search (AAAI 2023, step 2) on a `RankSpace`, for `NasExperiment` or `run_search`.

    Each iteration updates the path probabilities on a validation batch, then the sampled candidates' weights on a training batch.

    Args:
        costs: table of what each candidate costs; or several limits, ``[Limit(table, budget), ...]``, all of which hold.
        budget: epsilon, the limit on the whole network's cost, in the table's unit; where ``costs`` is one table.
        lam: Eq. (9)'s lambda, weight of the feature-map term; 0 leaves it and the original's forward pass out.
        lam_schedule: ``constant``, or ``linear`` or ``cosine`` to fall to 0 over the search.
        approach: what lambda weighs, ``features`` (Eq. 8) or ``weights`` (the paper's rejected alternative).
        approach_share: the part of each batch that Eq. (8) is taken over, above 0 to 1; a quarter does as well as all.
        clip: the norm that the weights' gradients are cut to (None: not); small ranks that are rarely sampled would diverge now and then.
        objective: ``settle`` (after each step on the cross-entropy the expected cost is put where it should be: see `settle`) or
            ``paper`` (Eq. (7): multiplies by ``eta * (E / budget)^theta``, of several limits the one that E exceeds most).
        eta, theta: see `objective.probability_loss_paper`.
        alpha_lr, alpha_optimizer: learning rate of alpha, and its optimizer, ``adam`` or ``sgd``. ``eta`` matters under SGD alone.
        alpha_every: iterations from one of alpha's updates to the next; the weights are updated in each.
        start: `nni_haloc.sensitivities`, layer to candidate to the loss that it adds: alpha starts from them, at the budget at once
            (None: all candidates alike, and the expected cost goes to the budget by and by).
        start_scale: the loss that makes a candidate 1/e as probable.
        warmup_epochs: epochs in which the weights alone are trained.
        temperature: of the softmax over alpha.
        select: ``knapsack`` (best score within the budget) or ``argmax`` (the paper's; may exceed the budget).
        min_use: fraction of a budget that the knapsack's plan uses, where any does: scores are noisy, and rank left unused is lost.
        seed: of the path sampling.

    The evaluator must be NNI's `Lightning` with a training and a validation loader; its ``training_step`` returns the cross-entropy, or a
    dict with it under ``loss`` whose other entries are logged. The space is copied: neither it nor the user's model is changed.
    """

    def __init__(
        self,
        costs: CostTable | Sequence[Limit],
        budget: float | None = None,
        *,
        lam: float = 1.0,
        lam_schedule: Schedule = "constant",
        approach: Approach = "features",
        approach_share: float = 0.25,
        clip: float | None = 10.0,
        objective: Objective = "settle",
        eta: float = 1.0,
        theta: float = 1.0,
        alpha_lr: float = 0.03,
        alpha_optimizer: AlphaOptimizer = "adam",
        alpha_every: int = 4,
        start: Scores | None = None,
        start_scale: float = 0.005,
        warmup_epochs: int = 0,
        temperature: float = 1.0,
        select: Selection = "knapsack",
        min_use: float = 0.95,
        seed: int = 0,
    ) -> None:
        for name, value, kind in (
            ("objective", objective, Objective),
            ("select", select, Selection),
            ("alpha_optimizer", alpha_optimizer, AlphaOptimizer),
            ("lam_schedule", lam_schedule, Schedule),
            ("approach", approach, Approach),
        ):
            if value not in get_args(kind):
                raise ValueError(
                    f"{name}: expected one of {', '.join(get_args(kind))}, found {value!r}"
                )
        if isinstance(costs, CostTable) == (budget is None) or not costs:
            raise ValueError("expected a cost table and a budget, or a list of limits")
        super().__init__(arc_learning_rate=alpha_lr, warmup_epochs=warmup_epochs)
        self.limits = (
            [Limit(costs, cast(float, budget))] if isinstance(costs, CostTable) else list(costs)
        )
        if not 0 < approach_share <= 1:
            raise ValueError(
                f"approach_share: expected a number above 0 to 1, found {approach_share}"
            )
        self.lam, self.lam_schedule, self.approach, self.approach_share, self.clip = (
            lam,
            lam_schedule,
            approach,
            approach_share,
            clip,
        )
        self.objective, self.eta, self.theta = objective, eta, theta
        self.alpha_every, self.start, self.start_scale = alpha_every, start, start_scale
        self.alpha_optimizer, self.temperature, self.select, self.min_use, self.seed = (
            alpha_optimizer,
            temperature,
            select,
            min_use,
            seed,
        )

    @property
    def costs(self) -> CostTable:
        """The table of the first limit."""
        return self.limits[0].costs

    @property
    def budget(self) -> float:
        """The budget of the first limit."""
        return self.limits[0].budget

    def mutate_model(self, model: Any) -> Any:
        """The supernet, made on a copy of the space. Raises TypeError for other spaces, `InfeasibleBudget` where no network fits."""
        if not isinstance(model, RankSpace):
            raise TypeError(f"Haloc searches a RankSpace, found {type(model).__name__}")
        check_feasible(model.candidates, self.limits)
        supernet = super().mutate_model(copy_of(model, {id(model.original): model.original}))
        # NNI replaces a module under the first of its names; the others must lead to the same mixed layer.
        mixed = {layer.label: layer for layer in self._layers(supernet)}
        for parent in list(supernet.modules()):
            for name, child in parent._modules.items():
                if type(child) is LayerChoice:
                    parent._modules[name] = mixed[child.label]
        supernet.register_buffer(
            "prices", torch.zeros(len(self.limits), dtype=torch.float64)
        )  # a checkpoint must have them
        for layer in self._layers(supernet):
            added = [
                self.start[str(layer.label)][name] if self.start else 0.0 for name in layer.names
            ]
            layer.alpha.data.copy_(torch.tensor(added) * (-self.temperature / self.start_scale))
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
        return {
            str(layer.label): layer for layer in self._layers(self.supernet)
        }  # NNI's labels are of a class of their own

    @property
    def probabilities(self) -> dict[str, dict[str, float]]:
        """Layer to candidate to probability."""
        return {name: layer.export_probs({})[name] for name, layer in self.mixed_layers.items()}

    def expected_cost(self, limit: Limit | None = None) -> Tensor:
        """Eq. (6): expected cost of the whole network under the present probabilities, by the table of a limit (None: the first)."""
        rows, fixed = (limit or self.limits[0]).costs.restrict(self.supernet.candidates)
        layers = self.mixed_layers.values()
        costs = [
            torch.tensor([rows[x.label][c] for c in x.names], device=x.alpha.device) for x in layers
        ]
        return expected_cost([x.probs for x in layers], costs, fixed)

    def probability_loss(self, ce: Tensor) -> Tensor:
        """What alpha's step descends: the cross-entropy or, with ``objective="paper"``, Eq. (7) at the limit that binds most."""
        if self.objective == "settle":
            return ce
        expected = [self.expected_cost(limit) for limit in self.limits]
        binding = max(
            range(len(expected)), key=lambda k: float(expected[k].detach()) / self.limits[k].budget
        )
        return probability_loss_paper(
            ce, expected[binding], self.limits[binding].budget, self.eta, self.theta
        )

    def settle(self, progress: float = 1.0) -> None:
        """With ``objective="settle"``, put the expected cost of the limit that binds to its budget: see `objective.settle`.

        ``progress``: the share of the search that is over. Up to `ARRIVAL` the way from the cost of uniform probabilities is gone evenly.
        """
        if self.objective != "settle":
            return
        layers, costs, fixed = self._in_budgets()
        sizes = [len(x.names) for x in layers]
        start = fixed + costs @ np.repeat(1 / np.array(sizes), sizes)
        arrived = min(1.0, progress / ARRIVAL) if self.start is None else 1.0
        target = start + arrived * (1 - start)
        with torch.no_grad():
            settled, prices = settle(
                np.concatenate(self._price_free(layers, costs)),
                sizes,
                costs / target[:, None],
                fixed / target,
            )
            self.supernet.prices.copy_(torch.from_numpy(prices / target))
            for layer, alpha in zip(
                layers, torch.from_numpy(settled * self.temperature).split(sizes), strict=True
            ):
                layer.alpha.copy_(alpha)

    def _in_budgets(self) -> tuple[list[MixedRankLayer], np.ndarray, np.ndarray]:
        """The mixed layers, the costs of all their candidates ``(limits, n)``, and the fixed costs: in units of each limit's budget."""
        layers = list(self.mixed_layers.values())
        restricted = [
            (limit.budget, *limit.costs.restrict(self.supernet.candidates)) for limit in self.limits
        ]
        costs = np.array(
            [
                [rows[x.label][c] / budget for x in layers for c in x.names]
                for budget, rows, _ in restricted
            ]
        )
        return layers, costs, np.array([fixed / budget for budget, _, fixed in restricted])

    def scores(self) -> dict[str, dict[str, float]]:
        """Layer to candidate to what the task alone says of it, free of cost: the higher the better, on one scale for all layers.

        The logits that the cross-entropy has led to, with every price taken back that `settle` put on them; with ``objective="paper"``,
        where price and task are one in alpha, the mean of the centred gate gradients.
        """
        layers, costs, _ = self._in_budgets()
        free = (
            self._price_free(layers, costs)
            if self.objective == "settle"
            else [-x.task_gradient.mean.numpy() for x in layers]
        )
        return {
            str(x.label): dict(zip(x.names, z.tolist(), strict=True))
            for x, z in zip(layers, free, strict=True)
        }

    def _price_free(self, layers: list[MixedRankLayer], costs: np.ndarray) -> list[np.ndarray]:
        """Each layer's logits with the prices taken back, centred."""
        paid = np.split(
            self.supernet.prices.cpu().numpy() @ costs,
            np.cumsum([len(x.names) for x in layers])[:-1],
        )
        free = [
            x.alpha.detach().double().cpu().numpy() / self.temperature + price
            for x, price in zip(layers, paid, strict=True)
        ]
        return [z - z.mean() for z in free]

    def plan(self, budget: float | None = None) -> RankPlan:
        """The chosen ranks, within every limit with ``knapsack``; ``budget``: another budget in the place of the first limit's."""
        limits = [Limit(self.costs, self.budget if budget is None else budget), *self.limits[1:]]
        if self.select == "argmax":
            choice = {name: layer.export({})[name] for name, layer in self.mixed_layers.items()}
        else:
            choice = choose(self.scores(), limits, self.min_use)
        first, *others = (
            {**limit.facts(choice), "expected_cost": float(self.expected_cost(limit).detach())}
            for limit in limits
        )
        facts = {
            "rule": "haloc",
            "select": self.select,
            "objective": self.objective,
            **first,
            "also": others,
            "seed": self.seed,
        }
        return RankPlan(
            {name: self.supernet.candidates[name][c] for name, c in choice.items()}, facts
        )

    def network(self, plan: RankPlan | None = None) -> nn.Module:
        """The compressed network of a plan, plain `torch.nn`, with copies of the searched weights."""
        return self.supernet.freeze((plan or self.plan()).names)

    def list_models(
        self, sort: bool = True, limit: int | None = 1
    ) -> Iterator[RawFormatModelSpace]:
        """NNI's export: the planned network with the searched weights."""
        yield RawFormatModelSpace(self.supernet, None).freeze(self.plan().names)

    @staticmethod
    def _layers(supernet: nn.Module) -> list[MixedRankLayer]:
        return [module for module in supernet.modules() if isinstance(module, MixedRankLayer)]


def _suppress_mixed_rank_layers(
    module: nn.Module, name: str, memo: dict[str, Any], mutate_kwargs: dict[str, Any]
) -> bool | None:
    return (
        True
        if isinstance(module, MixedRankLayer)
        else suppress_already_mutated(module, name, memo, mutate_kwargs)
    )


class InProcess(SequentialExecutionEngine):
    """NNI's sequential engine, less its habit of swallowing what a trial reports: results go on to the experiment manager."""

    def _run_single_model(self, model: ExecutableModelSpace) -> None:
        model.execute()


def run_search(space: RankSpace, evaluator: Lightning, strategy: Haloc) -> Haloc:
    """Run a search in this process, registering no experiment of its own, so that a trial of an NNI experiment can report while it runs."""
    strategy(RawFormatModelSpace.from_model(space, evaluator), InProcess())
    return strategy
