"""NNI's multi-trial strategies on a rank space: within the budget, the best of what was tried, and
no trace left behind.
"""

import copy
import itertools
import logging
import random
import tempfile

import nni
import numpy as np
import pytest
import torch
from helpers.paths import DIGITS
from nni.nas.experiment import NasExperiment
from nni.runtime.trial_command_channel import get_default_trial_command_channel

from nni_haloc.costs.analytic import mac_table, param_table
from nni_haloc.costs.counts import count_macs
from nni_haloc.inputs.config import load_config
from nni_haloc.plan.budget import Limit
from nni_haloc.plan.compression import compress
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.plan.sensitivity import loss
from nni_haloc.runs.job import Job
from nni_haloc.runs.saved import load
from nni_haloc.runs.stages.by_rule import by_rule
from nni_haloc.search import multitrial
from nni_haloc.search.multitrial import _STRATEGIES, _Repair, run_multitrial
from nni_haloc.search.space import RankSpace
from nni_haloc.space.ranks import AllowedRanks
from nni_haloc.utils.errors import InfeasibleBudget

BOTH = sorted(_STRATEGIES)


def problem(net, images, allowed):
    """A space, and limits in two metrics of which either may bind."""
    tables = [table(net, images[:1], allowed) for table in (mac_table, param_table)]
    limits = [
        Limit(costs, fraction * costs.original)
        for costs, fraction in zip(tables, (0.45, 0.5), strict=True)
    ]
    return RankSpace(net, images[:1], tables, allowed, images, nested=False), limits


@pytest.fixture
def space(net, images):
    return problem(net, images, AllowedRanks(step=1))[0]


@pytest.fixture
def limits(net, images):
    return problem(net, images, AllowedRanks(step=1))[1]


@pytest.fixture
def score(images, loaders):
    """Minus the loss, with the networks it was asked for."""
    labels = loaders[0].dataset.tensors[1]

    def scored(network):
        value = -loss(network, images, labels)
        scored.networks.append(network)
        scored.values.append(value)
        return value

    scored.networks, scored.values = [], []
    return scored


def every(space):
    for names in itertools.product(*space.candidates.values()):
        yield dict(zip(space.candidates, names, strict=True))


def holds(limits, choice):
    return all(limit.costs.total(choice) <= limit.budget for limit in limits)


def test_random_trials_that_cover_the_space_find_what_brute_force_finds(net, images, score):
    space, limits = problem(net, images, AllowedRanks())
    within = [choice for choice in every(space) if holds(limits, choice)]
    assert 5 < len(within) < space.size() / 2
    best = max(within, key=lambda choice: score(space.freeze(choice)))
    oracle = sorted(score.values)
    score.values.clear()
    assert run_multitrial(space, limits, score, "random", 10 * space.size()) == best
    assert sorted(score.values) == oracle, (
        "each network within the limits is scored once, and no other"
    )


@pytest.mark.parametrize("strategy", BOTH)
def test_the_choice_is_the_best_of_the_trials_and_all_of_them_keep_every_limit(
    space, limits, score, strategy, images
):
    choice = run_multitrial(space, limits, score, strategy, 30, seed=1)
    assert len(score.values) == 30
    assert holds(limits, choice)
    for network in score.networks:
        assert count_macs(network, images[:1]) <= limits[0].budget
        assert sum(p.numel() for p in network.parameters()) <= limits[1].budget
    best = max(score.values)
    assert score(space.freeze(choice)) == best


@pytest.mark.parametrize("strategy", BOTH)
def test_the_seed_alone_decides_and_no_global_random_state_is_touched(
    space, limits, score, strategy
):
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    runs = []
    for seed in (0, 0, 1):
        before = states()
        choice = run_multitrial(space, limits, score, strategy, 12, seed=seed)
        assert states() == before
        random.random(), np.random.rand(), torch.rand(1)
        runs.append((choice, list(score.values)))
        score.values.clear()
    assert runs[0] == runs[1]
    assert runs[0][1] != runs[2][1]


@pytest.mark.parametrize("sign", [1, -1])
def test_evolution_goes_on_from_the_best_of_its_first_hundred(net, images, sign):
    space, limits = problem(
        net, images, AllowedRanks(step=1, kinds=("conv", "pointwise", "linear"))
    )
    target, values = net.eval()(images).detach(), []

    def likeness(network):
        values.append(-float((network.eval()(images).detach() - target).square().mean()))
        return sign * values[-1]

    run_multitrial(space, limits, likeness, "regularized-evolution", 200)
    gain, error = np.mean(values[100:]) - np.mean(values[:100]), np.std(values) / 50**0.5
    assert sign * gain > error


def test_a_sample_over_a_limit_becomes_the_nearest_within_all_of_them(space, limits):
    repair = _Repair(space, limits)
    within = [choice for choice in every(space) if holds(limits, choice)]
    steps = {}
    for layer, row in space.candidates.items():
        by_cost = sorted(row, key=limits[0].costs.costs[layer].__getitem__)
        steps[layer] = {name: i for i, name in enumerate(by_cost)}

    def distance(a, b):
        return sum((steps[layer][a[layer]] - steps[layer][b[layer]]) ** 2 for layer in a)

    samples = [choice for choice in every(space) if not holds(limits, choice)]
    for sample in samples[::5]:
        found = repair.nearest(sample)
        assert holds(limits, found)
        assert distance(found, sample) == min(distance(choice, sample) for choice in within)


@pytest.mark.parametrize("strategy", BOTH)
def test_it_is_an_experiment_of_nnis_that_leaves_nothing_behind(
    net, space, limits, score, strategy, monkeypatch, tmp_path
):
    started = []
    start = NasExperiment.start
    monkeypatch.setattr(
        NasExperiment, "start", lambda self, *a, **k: started.append(self) or start(self, *a, **k)
    )
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    models = [copy.deepcopy(model.state_dict()) for model in (net, space)]
    log = logging.getLogger("nni")
    before = (
        get_default_trial_command_channel(),
        nni.trial._params,
        log.level,
        list(log.handlers),
        net.training,
        space.training,
    )
    run_multitrial(space, limits, score, strategy, 5)
    (experiment,) = started
    assert type(experiment.strategy[0]).__name__.lower() == strategy.replace("-", "")
    assert all(
        holds(limits, parent.x) for parent in getattr(experiment.strategy[0], "_population", ())
    ), "it goes on from repaired ones"
    assert before == (
        get_default_trial_command_channel(),
        nni.trial._params,
        log.level,
        list(log.handlers),
        net.training,
        space.training,
    )
    assert list(tmp_path.iterdir()) == []
    for model, state in zip((net, space), models, strict=True):
        assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


def test_a_budget_below_the_cheapest_network_is_refused_before_any_trial(space, limits, score):
    with pytest.raises(InfeasibleBudget, match="below the cheapest network"):
        run_multitrial(space, [Limit(limits[0].costs, 1.0)], score, "random", 5)
    assert score.values == []


def test_an_error_in_a_trial_comes_through(space, limits):
    handlers = list(logging.getLogger("nni").handlers)
    with pytest.raises(ZeroDivisionError):
        run_multitrial(space, limits, lambda network: 1 / 0, "random", 5)
    assert logging.getLogger("nni").handlers == handlers


@pytest.mark.parametrize("rule", ["nni-evolution", "nni-random"])
def test_as_rules_they_leave_a_plan_of_the_searchs_candidates_and_its_network(
    rule, tmp_path, monkeypatch
):
    monkeypatch.setattr(multitrial, "TRIALS", 8)
    config = load_config(
        DIGITS,
        {"rule": rule, "budget.fraction": 0.4, "rank_space": {"calibration_images": 64}, "seed": 3},
    )
    job = Job(config, tmp_path)
    plan, network = by_rule(job)
    facts = plan.chosen_by
    assert (facts["rule"], facts["seed"]) == (rule, 3)
    assert facts["cost"] <= facts["budget"] == 0.4 * facts["original_cost"]
    assert facts["cost"] == count_macs(network, job.example)
    assert RankPlan.load(tmp_path / "ranks.json").ranks == plan.ranks
    images, labels = job.splits.labelled("plain", 64, config.seed)
    again = compress(job.model, plan, calibration=images)
    assert loss(network, images, labels) == pytest.approx(loss(again, images, labels), rel=1e-5)
    assert loss(load(tmp_path), images, labels) == loss(network, images, labels)
