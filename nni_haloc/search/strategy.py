"""The search: `Haloc`, an NNI one-shot strategy that samples a single path in each pass."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from nni.nas.evaluator.pytorch import Lightning, LightningModule
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.nn.pytorch import LayerChoice
from nni.nas.oneshot.pytorch.strategy import DARTS, no_default_hook
from nni.nas.oneshot.pytorch.supermodule.proxyless import suppress_already_mutated
from nni.nas.space import ExecutableModelSpace, RawFormatModelSpace
from pydantic import ValidationError
from torch import Tensor, nn

from nni_haloc.costs.table import CostTable
from nni_haloc.inputs.schema.search import SearchOptions
from nni_haloc.plan.budget import Limit, Scores, check_feasible, choose
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.search.probabilities import SearchState
from nni_haloc.search.space import RankSpace
from nni_haloc.search.supernet import MixedRankLayer
from nni_haloc.search.updates import HalocModule
from nni_haloc.space.modules import copy_of
from nni_haloc.utils.errors import explain
from nni_haloc.utils.quiet import CONFIGURED_TWICE, Dropped, quiet


class Haloc(DARTS):
    """HALOC's search (AAAI 2023, step 2) on a `RankSpace`, for `NasExperiment` or `run_search`.

    Each iteration updates the path probabilities on a validation batch, then the sampled
    candidates' weights on a training batch. The evaluator must be NNI's `Lightning` with a training
    and a validation loader; its ``training_step`` returns the cross-entropy, or a dict with it
    under ``loss`` whose other entries are logged. The space is copied: neither it nor the user's
    model is changed.

    Args:
        costs: table of what each candidate costs; or several limits, ``[Limit(table, budget),
            ...]``, all of which hold.
        budget: epsilon, the limit on the whole network's cost, as a fraction of the original's
            cost, above 0 to 1. For one table only.
        budget_absolute: the same limit as a number in the table's unit; instead of ``budget``.
        start: `RankSpace.sensitivities`, layer to candidate to the loss that it adds: alpha starts
            from them, at the budget at once. None: all candidates start alike, and the expected
            cost moves to the budget by and by. (In the settings, ``search.start`` is a word.)
        seed: of the path sampling.
        **options: keys of the settings' section ``search``, such as ``lam=0.5``: those of
            `nni_haloc.inputs.schema.search.SearchOptions`, which says what each means, as ``haloc
            settings search`` does.

    Raises:
        ValueError: for an option that does not exist or has a value out of its range, and unless
            there is exactly one way to know the budget.
    """

    state_type: type[SearchState] = SearchState
    """Class of the state; another class tries another way to settle at the budget."""

    def __init__(
        self,
        costs: CostTable | Sequence[Limit],
        budget: float | None = None,
        *,
        budget_absolute: float | None = None,
        start: Scores | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.limits = _limits(costs, budget, budget_absolute)
        try:
            self.options = SearchOptions(**options)
        except ValidationError as error:
            raise ValueError(explain(error)) from None
        super().__init__(
            arc_learning_rate=self.options.alpha_lr, warmup_epochs=self.options.warmup_epochs
        )
        self.start, self.seed = start, seed
        name, message = CONFIGURED_TWICE  # from an experiment's beginning to after its end
        logger, dropped = logging.getLogger(name), Dropped(message, logging.WARNING)
        logger.addFilter(dropped)
        weakref.finalize(self, logger.removeFilter, dropped)
        self._state: SearchState | None = None

    @property
    def costs(self) -> CostTable:
        """Cost table of the first limit."""
        return self.limits[0].costs

    @property
    def budget(self) -> float:
        """Budget of the first limit, in its table's unit."""
        return self.limits[0].budget

    @property
    def state(self) -> SearchState:
        """Probabilities and prices, which exist from the search's first step on."""
        if self._state is None:
            raise RuntimeError("the search has not begun: there are no probabilities yet")
        return self._state

    @property
    def mixed_layers(self) -> dict[str, MixedRankLayer]:
        """Mixed layers of the supernet, by layer."""
        return self.state.mixed_layers

    @property
    def probabilities(self) -> dict[str, dict[str, float]]:
        """Probability of each candidate, by layer."""
        return self.state.probabilities

    def expected_cost(self, limit: Limit | None = None) -> Tensor:
        """Compute the expected cost of the whole network, Eq. (6).

        Args:
            limit: the limit whose table counts; None is the first one.

        Returns:
            A scalar in the table's unit, differentiable in alpha.
        """
        return self.state.expected_cost(limit)

    def settle(self, progress: float = 1.0) -> None:
        """Move alpha so that the binding limit's expected cost is at its scheduled value.

        Args:
            progress: the share of the search that is over, 0 to 1; see `SearchState.settle`.
        """
        self.state.settle(progress)

    def scores(self) -> dict[str, dict[str, float]]:
        """Return what the task alone says of each candidate, free of cost.

        Returns:
            Layer to candidate to score: the higher the better, on one scale for all layers. See
            `SearchState.scores`.
        """
        return self.state.scores()

    def plan(
        self,
        budget: float | None = None,
        *,
        absolute: float | None = None,
        select: str | None = None,
        limits: Sequence[Limit] | None = None,
    ) -> RankPlan:
        """Choose the ranks; with ``knapsack`` within every limit.

        Args:
            budget: another budget in the place of the first limit's, as a fraction of the
                original's cost, above 0 to 1.
            absolute: the same as a number in the table's unit.
            select: ``knapsack`` or ``argmax`` in the place of the search's own option.
            limits: limits by the same tables, with other budgets, in the place of the search's.

        Returns:
            The plan, with the facts of its choice.

        Raises:
            InfeasibleBudget: if no network is within the limits.
            ValueError: for a budget out of its range, or two of them.
        """
        first, *others = limits or self.limits
        if budget is not None or absolute is not None:
            first = Limit.of(self.costs, budget, absolute, "absolute")
        limits, select = [first, *others], select or self.options.select
        if select == "argmax":
            choice = {name: layer.export({})[name] for name, layer in self.mixed_layers.items()}
        else:
            left_alone = self.supernet.left_alone
            choice = choose(self.scores(), limits, self.options.min_use, left_alone)
        main, *also = (
            {**limit.facts(choice), "expected_cost": self.state.known_cost(limit)}
            for limit in limits
        )
        facts = {
            "rule": "search",
            "select": select,
            "objective": self.options.objective,
            **main,
            "also": also,
            "seed": self.seed,
        }
        candidates = self.supernet.candidates
        return RankPlan({name: candidates[name][c] for name, c in choice.items()}, facts)

    def network(self, plan: RankPlan | None = None) -> nn.Module:
        """Return a plan's compressed network, plain `torch.nn`, with copies of searched weights.

        Args:
            plan: the ranks, each a candidate of the search; None is the search's own plan.

        Returns:
            A network that is independent of the search.
        """
        return self.supernet.freeze((plan or self.plan()).names)

    def list_models(
        self, sort: bool = True, limit: int | None = 1
    ) -> Iterator[RawFormatModelSpace]:
        """Yield the planned network with the searched weights: NNI's export.

        Args:
            sort: ignored, because there is one network.
            limit: likewise.
        """
        yield RawFormatModelSpace(self.supernet, None).freeze(self.plan().names)

    def mutate_model(self, model: Any) -> Any:
        """Make the supernet, on a copy of the space.

        Args:
            model: the `RankSpace`.

        Returns:
            The supernet, whose choices are mixed layers.

        Raises:
            TypeError: for a space that is not a `RankSpace`.
            InfeasibleBudget: if no network is within the limits.
        """
        if not isinstance(model, RankSpace):
            raise TypeError(f"Haloc searches a RankSpace, found {type(model).__name__}")
        check_feasible(model.candidates, self.limits, model.left_alone)
        if self.options.budget_range is not None:
            least = Limit.of(self.costs, min(self.options.budget_range))
            check_feasible(model.candidates, [least, *self.limits[1:]], model.left_alone)
        supernet = super().mutate_model(copy_of(model, {id(model.original): model.original}))
        # NNI replaces a module under the first of its names; the others must lead to the same one.
        mixed = {m.label: m for m in supernet.modules() if isinstance(m, MixedRankLayer)}
        for parent in list(supernet.modules()):
            for name, child in parent._modules.items():
                if type(child) is LayerChoice:
                    parent._modules[name] = mixed[child.label]
        self._state = self.state_type(supernet, self.limits, self.options, self.start)
        return supernet

    def initialize(self, model_space: ExecutableModelSpace, engine: Any) -> ExecutableModelSpace:
        """Make supernet and updates: NNI calls this first."""
        with quiet():
            return super().initialize(model_space, engine)

    def run(self) -> None:
        """Search: NNI calls this second."""
        with quiet():
            super().run()

    def state_dict(self) -> dict[str, Any]:
        """Return what an NNI experiment keeps of the strategy."""
        with quiet():
            return super().state_dict()

    def default_mutation_hooks(self) -> list[Any]:
        """Return the hooks that NNI calls for each module."""
        return [_suppress_mixed_rank_layers, MixedRankLayer.mutate, no_default_hook]

    def run_hook(self, hook: Any, name: str, module: nn.Module, memo: dict[str, Any]) -> Any:
        """Call a mutation hook, with the layers' specifications."""
        memo.update(self._arch_parameters)
        specs = self.model_space.model_space.specs
        return hook(module, name, memo, {"specs": specs})

    def configure_oneshot_module(self, training_module: LightningModule) -> HalocModule:
        """Return the Lightning module that makes the updates."""
        return HalocModule(training_module, self.state, self.seed)


def _limits(
    costs: CostTable | Sequence[Limit], budget: float | None, absolute: float | None
) -> list[Limit]:
    """Return the limits that the strategy's first arguments name."""
    if isinstance(costs, CostTable):
        return [Limit.of(costs, budget, absolute)]
    if budget is not None or absolute is not None or not costs:
        raise ValueError("expected a cost table and a budget, or a list of limits")
    return list(costs)


def _suppress_mixed_rank_layers(
    module: nn.Module, name: str, memo: dict[str, Any], mutate_kwargs: dict[str, Any]
) -> bool | None:
    """Keep NNI's hooks away from a layer that is mixed already."""
    if isinstance(module, MixedRankLayer):
        return True
    return suppress_already_mutated(module, name, memo, mutate_kwargs)


class InProcess(SequentialExecutionEngine):
    """NNI's sequential engine without its own reporting.

    NNI's keeps what a trial reports for itself; with this one it goes on to the experiment manager.
    """

    def _run_single_model(self, model: ExecutableModelSpace) -> None:
        model.execute()


def run_search(space: RankSpace, evaluator: Lightning, strategy: Haloc) -> Haloc:
    """Run a search in this process.

    No experiment is registered with NNI, so that a trial of an experiment can report while it runs.

    Args:
        space: what is searched; it is copied.
        evaluator: trains the weights, see `Classification`.
        strategy: a `Haloc` that has not run.

    Returns:
        The strategy, with its finished search.
    """
    with quiet():
        strategy(RawFormatModelSpace.from_model(space, evaluator), InProcess())
    return strategy
