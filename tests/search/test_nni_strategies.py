"""NNI's own strategies on our rank space: those that run, and what the others need.

The table of docs/explanation/nni.md says the same.
"""

import re
from importlib.util import find_spec

import nni
import pytest
from helpers.paths import ROOT
from nni.mutable.exception import SampleMissingError
from nni.nas import strategy as strategies
from nni.nas.evaluator import FunctionalEvaluator
from nni.nas.experiment import NasExperiment
from nni.nas.experiment.config import NasExperimentConfig

from nni_haloc.costs.analytic import mac_table
from nni_haloc.search.evaluator import Classification
from nni_haloc.search.space import RankSpace
from nni_haloc.space.ranks import AllowedRanks
from nni_haloc.training.recipe import Recipe

ONE_SHOT = {"DARTS": {}, "GumbelDARTS": {}, "RandomOneShot": {}, "Proxyless": {}}
MULTI_TRIAL = {
    "Random": {},
    "RegularizedEvolution": {"population_size": 2, "sample_size": 2},
    "TPE": {},
}
PAGE = (ROOT / "docs" / "explanation" / "nni.md").read_text()


@pytest.fixture
def best(net, images, loaders, tmp_path, monkeypatch):
    """Call with a strategy: the choice of candidates that its experiment exports."""
    monkeypatch.setenv("HOME", str(tmp_path))

    def search(strategy, multi_trial):
        space = RankSpace(net, images[:1], [mac_table(net, images[:1])], AllowedRanks(), images)
        evaluator = FunctionalEvaluator(lambda model: nni.report_final_result(0.5))
        if not multi_trial:
            train, val = loaders
            evaluator = Classification(train, val, Recipe(1, 0.01), enable_progress_bar=False)
        config = NasExperimentConfig("sequential", "raw", "local", max_trial_number=3)
        config.experiment_working_directory = str(tmp_path)
        experiment = NasExperiment(space, evaluator, strategy, config)
        try:
            experiment.run()
            (choice,) = experiment.export_top_models(formatter="dict")
        finally:
            experiment.stop()
        return space.candidates, choice

    return search


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*ONE_SHOT, *MULTI_TRIAL])
def test_a_strategy_that_runs_chooses_candidates_of_ours(best, name):
    options = {**ONE_SHOT, **MULTI_TRIAL}[name]
    candidates, choice = best(getattr(strategies, name)(**options), name in MULTI_TRIAL)
    assert choice.keys() == candidates.keys()
    assert all(choice[layer] in candidates[layer] for layer in candidates)


@pytest.mark.skipif(find_spec("tianshou") is not None, reason="tianshou is installed")
@pytest.mark.parametrize("name", ["ENAS", "PolicyBasedRL"])
def test_a_strategy_that_needs_tianshou_says_so(best, name):
    with pytest.raises(ImportError, match="tianshou"):
        best(getattr(strategies, name)(), name == "PolicyBasedRL")


@pytest.mark.filterwarnings("ignore")
def test_nnis_grid_search_ends_at_its_first_network(best):
    """So that a changed NNI shows itself."""
    with pytest.raises(SampleMissingError, match="missing from sample"):
        best(strategies.GridSearch(), True)


def test_the_table_has_every_strategy_of_nnis():
    section = PAGE.partition("## Tuners, advisors and assessors")[2].partition("\n## ")[0]
    told = set(re.findall(r"`strategy\.(\w+)`", section))
    other = {"Strategy", "TPEStrategy"}  # the base, and another name of TPE
    assert told == {name for name in dir(strategies) if name[0].isupper()} - other
