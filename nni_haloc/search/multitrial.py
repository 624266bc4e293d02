"""NNI's own multi-trial strategies on a rank space, to compare with: a trial scores one compressed network, without training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any, Literal

import nni
from nni.nas.evaluator import FunctionalEvaluator
from nni.nas.execution.event import ModelEventType
from nni.nas.experiment import NasExperiment, NasExperimentConfig
from nni.nas.space import ExecutableModelSpace, ModelStatus
from nni.nas.strategy import Random, RegularizedEvolution
from nni.nas.strategy.middleware import Chain, Deduplication, StrategyMiddleware
from torch import nn

from nni_haloc.plan.budget import Choice, Limit, check_feasible, choose
from nni_haloc.search.space import RankSpace

MultiTrial = Literal["regularized-evolution", "random"]

_STRATEGIES: dict[MultiTrial, type[RegularizedEvolution] | type[Random]] = {
    "regularized-evolution": RegularizedEvolution,
    "random": Random,
}


def run_multitrial(
    space: RankSpace,
    limits: Sequence[Limit],
    score: Callable[[nn.Module], float],
    strategy: MultiTrial,
    trials: int,
    seed: int = 0,
) -> Choice:
    """The choice within the limits that scores best among those that NNI's strategy tries, in this process, through `NasExperiment`.

    ``score``: of a network as `RankSpace.freeze` gives it, to be maximised; it is called once for each network tried, at most ``trials``
    times. The strategies have NNI's defaults: a population of 100, the first ones random. See `_Repair` for samples over a limit. Raises
    `InfeasibleBudget`. No experiment is registered with NNI, nothing is left on disk, and a trial in which this runs may go on reporting.
    """
    check_feasible(space.candidates, limits)
    chain = Chain(_STRATEGIES[strategy](seed=seed), _Repair(space, limits), Deduplication("replay"))
    with TemporaryDirectory() as folder, _apart_from_a_trial():
        config = NasExperimentConfig(
            "sequential",
            "raw",
            "local",
            max_trial_number=trials,
            experiment_working_directory=folder,
        )
        evaluator = FunctionalEvaluator(lambda network: nni.report_final_result(score(network)))
        experiment = _Unregistered(space, evaluator, chain, config)
        try:
            if not experiment.run():
                raise KeyboardInterrupt  # NNI has swallowed it
        finally:
            experiment.stop()
        (best,) = experiment.export_top_models(formatter="dict")
    return {str(layer): str(candidate) for layer, candidate in best.items()}


class _Repair(StrategyMiddleware):
    """Puts the nearest choice within the limits in the place of a sample over one; the strategy goes on from that.

    Nearest: by the sum of squared steps from candidate to candidate, in the order of their cost. Of ResNet-20's samples one in 380 is
    within 28 % of the MACs: drawn anew instead, as by NNI's `Filter`, they gave evolution about the same from a hundred times the samples,
    and a penalty a worse one (docs/design.md).
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
            self.steps[layer] = {
                name: step for step, name in enumerate(sorted(row, key=prices.__getitem__))
            }

    def nearest(self, sample: Mapping[str, str]) -> Choice:
        return choose(
            {
                layer: {
                    name: -float((step - row[sample[layer]]) ** 2) for name, step in row.items()
                }
                for layer, row in self.steps.items()
            },
            self.limits,
        )

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


class _Unregistered(NasExperiment):
    """An experiment that enters itself in no list in the user's home: nothing of it is left to be seen or resumed."""

    def _start_without_nni_manager(self) -> None:
        pass

    def _stop_without_nni_manager(self) -> None:
        pass


@contextmanager
def _apart_from_a_trial() -> Iterator[None]:
    """Gives a trial its parameters back, in whose place NNI's engine leaves its last model; and has NNI say nothing of each sample."""
    parameters, log = nni.trial._params, logging.getLogger("nni")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        nni.trial._params = parameters
        log.setLevel(level)
