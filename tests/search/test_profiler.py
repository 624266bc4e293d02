"""A cost table in NNI's own terms, with one of its one-shot strategies and one of its multi-trial
ones.
"""

import random
from statistics import mean

import pytest
from helpers.searches import QUIET
from nni.nas.evaluator import FunctionalEvaluator
from nni.nas.experiment import NasExperimentConfig
from nni.nas.oneshot.pytorch.profiler import ExpectationProfilerPenalty, RangeProfilerFilter
from nni.nas.strategy import DARTS, Random
from nni.nas.strategy.middleware import Chain, Filter

from nni_haloc.costs.analytic import mac_table, param_table
from nni_haloc.costs.table import CostTable
from nni_haloc.search.evaluator import Classification
from nni_haloc.search.multitrial import _Unregistered
from nni_haloc.search.space import RankSpace, TableProfiler
from nni_haloc.search.strategy import run_search
from nni_haloc.space.ranks import AllowedRanks
from nni_haloc.training.recipe import Recipe
from nni_haloc.utils.quiet import errors_alone


@pytest.fixture
def space(net, images):
    return RankSpace(net, images[:1], allowed=AllowedRanks(step=1))


def test_a_profiler_says_what_the_table_says(net, images, space):
    costs = param_table(net, images[:1], AllowedRanks(step=1))
    profiler, draw = TableProfiler(space, costs), random.Random(0)
    for _ in range(20):
        sample = {layer: draw.choice(list(row)) for layer, row in space.candidates.items()}
        assert profiler.profile(sample) == pytest.approx(costs.total(sample))
    with pytest.raises(ValueError, match="no entry for layer"):
        TableProfiler(space, CostTable("macs", {"other": {"dense": 1.0}}, 0))


def test_nnis_multi_trial_strategies_filter_by_it(net, images, space, tmp_path):
    costs = mac_table(net, images[:1], AllowedRanks(step=1))
    limit = 0.8 * costs.original
    tried = []

    def trial(network):
        tried.append(network)
        return 0.0

    strategy = Chain(Random(seed=0), Filter(RangeProfilerFilter(TableProfiler(space), max=limit)))
    config = NasExperimentConfig(
        "sequential",
        "raw",
        "local",
        max_trial_number=10,
        experiment_working_directory=str(tmp_path),
    )
    with errors_alone("nni"):
        experiment = _Unregistered(space, FunctionalEvaluator(trial), strategy, config)
        experiment.run()
        samples = experiment.export_top_models(10, formatter="dict")
        experiment.stop()
    assert len(samples) == len(tried) == 10
    assert all(
        costs.total({str(k): str(v) for k, v in sample.items()}) <= limit for sample in samples
    )


@pytest.mark.filterwarnings("ignore:.*wrap PyTorch DataLoader.*:RuntimeWarning")
def test_nnis_one_shot_strategies_are_penalised_by_it(net, images, loaders, space):
    found = []

    class Heard(ExpectationProfilerPenalty):
        def profile(self, sample):
            found.append(float(super().profile(sample)))
            return found[-1]

    costs = space.costs
    strategy = DARTS(penalty=Heard(TableProfiler(space), baseline=costs.original))
    run_search(
        space, Classification(*loaders, Recipe(1, 0.01, schedule="constant"), **QUIET), strategy
    )
    rows, rest = costs.restrict(space.candidates)
    uniform = rest + sum(mean(row.values()) for row in rows.values())
    assert found[0] == pytest.approx(uniform, rel=0.01)  # where alpha starts
    assert set(next(iter(strategy.list_models())).sample) == set(space.candidates)
