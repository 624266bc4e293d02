"""NNI's own multi-trial strategies, to compare with, as rules that choose ranks.

A trial scores one compressed network of a rank space, without training it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any, Literal

from nni.nas.evaluator import FunctionalEvaluator
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.execution.event import FinalMetricEvent, ModelEventType, TrainingEndEvent
from nni.nas.experiment import NasExperiment, NasExperimentConfig
from nni.nas.space import ExecutableModelSpace, ModelStatus
from nni.nas.strategy import Random, RegularizedEvolution
from nni.nas.strategy.middleware import Chain, Deduplication, StrategyMiddleware
from torch import nn

from nni_haloc.inputs.options import Kind
from nni_haloc.plan.budget import Choice, Limit, check_feasible, choose
from nni_haloc.plan.rules.problem import Problem
from nni_haloc.search.space import RankSpace
from nni_haloc.space.layers import LayerSpec
from nni_haloc.space.names import Rank
from nni_haloc.space.ranks import AllowedRanks
from nni_haloc.utils.quiet import errors_alone

MultiTrial = Literal["regularized-evolution", "random"]

_STRATEGIES: dict[MultiTrial, type[RegularizedEvolution] | type[Random]] = {
    "regularized-evolution": RegularizedEvolution,
    "random": Random,
}

TRIALS = 400
"""Networks that the rules try.

In time about the sensitivities of all candidates (some 150 passes) and one epoch of the search, for
ResNet-20.
"""


def evolution(problem: Problem) -> Choice:
    """Choose ranks by NNI's regularized evolution: rule ``nni-evolution``.

    Returns:
        The choice whose network has the lowest cross-entropy on the problem's images, of `TRIALS`.
    """
    return _try_networks(problem, "regularized-evolution")


def random_search(problem: Problem) -> Choice:
    """Choose ranks by NNI's random strategy: rule ``nni-random``; otherwise as `evolution`."""
    return _try_networks(problem, "random")


def _try_networks(problem: Problem, strategy: MultiTrial) -> Choice:
    """Return the choice of a strategy of NNI's from the problem's own candidates."""
    home = next(p.device for p in problem.model.parameters())
    space = RankSpace(
        problem.model,
        problem.images[:1].to(home),
        [limit.costs for limit in problem.limits],
        _Exactly(candidates_of=problem.candidates),
        problem.images,
        problem.decomposition,
        nested=False,
    )
    vars(problem)["modules"] = space.modules_by_layer  # its own, decomposed once
    return run_multitrial(
        space,
        problem.limits,
        lambda network: -problem.loss(network),
        strategy,
        TRIALS,
        problem.seed,
    )


@dataclass(frozen=True)
class _Exactly(AllowedRanks):
    """Allow the candidates of a rank space that is made already."""

    kinds: tuple[Kind, ...] = ("conv", "pointwise", "linear")
    candidates_of: Mapping[str, Mapping[str, Rank]] = field(default_factory=dict)

    def pins(self, layer: str) -> list[int | tuple[int, ...] | str]:
        return list(self.candidates_of.get(layer, ()))

    def candidates(self, spec: LayerSpec) -> list[Rank]:
        return list(self.candidates_of.get(spec.name, {}).values())


def run_multitrial(
    space: RankSpace,
    limits: Sequence[Limit],
    score: Callable[[nn.Module], float],
    strategy: MultiTrial,
    trials: int,
    seed: int = 0,
) -> Choice:
    """Try networks by a strategy of NNI's, in this process, through `NasExperiment`.

    The strategies have NNI's defaults: a population of 100, the first ones random. See `_Repair`
    for samples over a limit. No experiment is registered with NNI, nothing is left on disk, and a
    trial in which this runs may go on reporting.

    Args:
        space: what is chosen from.
        limits: what a network may cost; every one holds.
        score: of a network as `RankSpace.freeze` gives it, to be maximised; called once for each
            network tried.
        strategy: which of NNI's.
        trials: the most networks that are tried.
        seed: of the strategy's draws.

    Returns:
        The choice within the limits that scored best.

    Raises:
        InfeasibleBudget: if no network is within the limits.
    """
    check_feasible(space.candidates, limits, space.left_alone)
    chain = Chain(_STRATEGIES[strategy](seed=seed), _Repair(space, limits), Deduplication("replay"))
    with TemporaryDirectory() as folder, errors_alone("nni"):
        config = NasExperimentConfig(
            "sequential",
            "raw",
            "local",
            max_trial_number=trials,
            experiment_working_directory=folder,
        )
        experiment = _Unregistered(space, FunctionalEvaluator(score), chain, config)
        try:
            if not experiment.run():
                raise KeyboardInterrupt  # NNI has swallowed it
        finally:
            experiment.stop()
        (best,) = experiment.export_top_models(formatter="dict")
    return {str(layer): str(candidate) for layer, candidate in best.items()}


class _Repair(StrategyMiddleware):
    """Replace a sample over a limit by the nearest choice within all limits.

    The strategy goes on from that choice.

    Nearest: by the sum of squared steps from candidate to candidate, in the order of their cost. Of
    ResNet-20's samples one in 380 is within 28 % of the MACs: drawn anew instead, as by NNI's
    `Filter`, they gave evolution about the same from a hundred times the samples, and a penalty a
    worse one (docs/explanation/how-it-works.md).
    """

    def __init__(self, space: RankSpace, limits: Sequence[Limit]) -> None:
        super().__init__()
        self.limits = limits
        self.steps: dict[str, dict[str, int]] = {}
        for layer, row in space.candidates.items():
            prices = {
                name: max(limit.costs.costs[layer][name] / limit.budget for limit in limits)
                for name in row
            }
            by_price = sorted(row, key=prices.__getitem__)
            self.steps[layer] = {name: step for step, name in enumerate(by_price)}

    def nearest(self, sample: Mapping[str, str]) -> Choice:
        """Return the nearest choice within the limits; of equally near ones a dearer."""
        scores = {
            layer: {
                name: 1e-6 * step - float((step - row[sample[layer]]) ** 2)
                for name, step in row.items()
            }
            for layer, row in self.steps.items()
        }
        return choose(scores, self.limits)

    def submit_models(self, *models: ExecutableModelSpace) -> None:
        for model in models:
            if not all(limit.holds(model.sample) for limit in self.limits):
                model.sample = self.nearest(model.sample)
            self.engine.submit_models(model)

    def list_models(self, status: ModelStatus | None = None) -> Iterable[ExecutableModelSpace]:
        return self.engine.list_models(status)

    def register_model_event_callback(
        self, event_type: ModelEventType, callback: Callable[..., None]
    ) -> None:
        self.engine.register_model_event_callback(event_type, callback)

    def unregister_model_event_callback(
        self, event_type: ModelEventType, callback: Callable[..., None]
    ) -> None:
        self.engine.unregister_model_event_callback(event_type, callback)

    def state_dict(self) -> dict[str, Any]:
        return {}


class _ByReturnValue(SequentialExecutionEngine):
    """NNI's sequential engine, which takes what an evaluator returns for the model's metric.

    NNI's own takes what is reported, and for that puts itself in the place of the trial in which it
    may be running. Here nothing is reported, and a trial's parameters and reports are left alone.
    """

    def _run_single_model(self, model: ExecutableModelSpace) -> None:
        model.status = ModelStatus.Training
        self.dispatch_model_event(FinalMetricEvent(model, model.execute()))
        self.dispatch_model_event(TrainingEndEvent(model, ModelStatus.Trained))


class _Unregistered(NasExperiment):
    """Run an experiment without registering it in the user's home.

    Nothing of it is left to be seen or resumed.
    """

    def execution_engine_factory(self, config: Any) -> SequentialExecutionEngine:
        return _ByReturnValue(config.max_model_count, config.max_duration)

    def _start_without_nni_manager(self) -> None:
        pass

    def _stop_without_nni_manager(self) -> None:
        pass
