"""What holds for every rank rule, and those by scores and by chance against trying every choice."""

import copy
import dataclasses
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.paths import ROOT
from helpers.problems import every, loader, problem, total
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from torch import nn

from nni_haloc.costs.table import CostTable
from nni_haloc.inputs.schema.values import Rule
from nni_haloc.plan.budget import Limit
from nni_haloc.plan.rules import RULES, plan, scored
from nni_haloc.plan.rules import learned as learning
from nni_haloc.plan.rules.problem import Problem
from nni_haloc.plan.rules.scored import USE
from nni_haloc.plan.sensitivity import loss
from nni_haloc.search import multitrial
from nni_haloc.space.layers import rank_of
from nni_haloc.space.ranks import AllowedRanks
from nni_haloc.utils.errors import InfeasibleBudget

EVERY_RANK = set(RULES) - {"random", "nni-evolution", "nni-random"}


@pytest.fixture
def brief(monkeypatch):
    """Rank learning in four steps, and six of NNI's trials."""
    monkeypatch.setattr(multitrial, "TRIALS", 6)
    monkeypatch.setattr(learning, "ROUNDS", 2)
    monkeypatch.setattr(learning, "STEPS", 2)


def using(problem):
    """Those that use at least `USE` of one of the budgets."""
    found = [
        c
        for c in every(problem)
        if any(limit.costs.total(c) >= USE * limit.budget for limit in problem.limits)
    ]
    assert len(found) > 1
    return found


def test_the_settings_name_the_rules_that_there_are():
    settings = TypeAdapter(Rule)
    assert [settings.validate_python(rule) for rule in RULES] == list(RULES)
    assert {rule for rule in RULES if getattr(RULES[rule], "every_rank", False)} == EVERY_RANK
    text = (ROOT / "docs" / "reference" / "rules.md").read_text()
    assert all(re.search(f"^\\|.* `{rule}`,? .*\\| (yes|no) \\|$", text, re.M) for rule in RULES)


def test_plans_are_compared_with_their_batch_norm_recalibrated(images, labels):
    """As the delivered networks are; a network whose statistics alone are off loses nothing by
    that.
    """
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    one = problem(net, images, labels, (0.9,), AllowedRanks(step=1, exclude=("0",)))
    off = copy.deepcopy(net)
    off[1].running_mean += 5
    assert one.loss(off) == pytest.approx(one.loss(copy.deepcopy(net)))
    momentum, stats = net[1].momentum, off[1].running_mean
    assert off[1].momentum == momentum
    torch.testing.assert_close(stats, net[0](images).mean((0, 2, 3)).detach())


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("fractions", [(0.3,), (0.45,), (0.9,), (0.5, 0.45)])
def test_every_rule_keeps_every_limit_and_says_so(rule, fractions, net, images, labels, device):
    before = {key: value.clone() for key, value in net.state_dict().items()}
    one = problem(net, images, labels, fractions, seed=5, train=loader(images, labels))
    found = plan(one, rule)
    for limit in one.limits:
        assert limit.costs.total(found.names) <= limit.budget
    assert {
        layer: one.candidates[layer][name] for layer, name in found.names.items()
    } == found.ranks
    facts = found.chosen_by
    assert (facts["rule"], facts["seed"], facts["metric"]) == (rule, 5, "macs")
    assert facts["cost"] == one.limits[0].costs.total(found.names)
    assert [also["metric"] for also in facts["also"]] == ["params"] * (len(fractions) - 1)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_takes_a_network_on_a_device(rule, net, images, labels, device):
    one = problem(net, images, labels, (0.45,), train=loader(images, labels))
    there = dataclasses.replace(one, model=copy.deepcopy(net).to(device))
    assert there.holds(RULES[rule](there))
    assert all(p.device.type == device.type for p in there.model.parameters())


COST = st.one_of(st.integers(1, 20).map(float), st.floats(0.01, 100))


@pytest.mark.usefixtures("brief")
def test_measured_costs_in_no_order_are_kept_too(net, images, labels, monkeypatch):
    """Tables in which a lower rank may cost more, and limits just at some choice's cost: every rule
    finds a plan within them.
    """
    monkeypatch.setattr(scored, "DRAWS", 2)
    whole = problem(net, images, labels, allowed=AllowedRanks(), train=loader(images, labels))
    shared = {"modules": whole.modules, "errors": whole.errors}

    @settings(max_examples=10, deadline=None)
    @given(st.data())
    def check(data):
        near = {
            layer: data.draw(st.sampled_from(list(row))) for layer, row in whole.candidates.items()
        }
        limits = []
        for _ in range(data.draw(st.integers(1, 2))):
            table = CostTable(
                "latency_ms",
                {n: {c: data.draw(COST) for c in row} for n, row in whole.candidates.items()},
                data.draw(COST),
            )
            limits.append(Limit(table, table.total(near)))
        one = dataclasses.replace(whole, limits=limits)
        vars(one).update(shared)  # they do not depend on the limits
        for rule in map(RULES.__getitem__, RULES):
            choice = rule(one)
            assert choice.keys() == one.candidates.keys()
            assert one.holds(choice)

    check()


def test_a_budget_below_the_cheapest_network_is_refused(net, images, labels):
    message = (
        r"budget: \S+ MACs is below the cheapest network, \S+ k MACs, 0\.\d+ of the original's"
    )
    with pytest.raises(InfeasibleBudget, match=message):
        problem(net, images, labels, (0.01,))
    with pytest.raises(InfeasibleBudget, match="parameters is below the cheapest network"):
        problem(net, images, labels, (0.5, 0.01))


def test_an_unknown_rule_is_refused(net, images, labels):
    with pytest.raises(
        ValueError, match="rule: expected one of uniform, .*, nni-random, found 'best'"
    ):
        plan(problem(net, images, labels), "best")


def test_errors_are_those_of_the_layers_outputs(net, device):
    """Each candidate is run on what the original layer is fed; the covariances' shrinkage is worth
    a per cent or two.
    """
    images = torch.randn(256, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    one, fed = problem(net, images, torch.zeros(256, dtype=torch.long)), {}
    hooks = [
        net.get_submodule(n).register_forward_pre_hook(
            lambda _, args, n=n: fed.update({n: args[0].clone()})
        )
        for n in one.candidates
    ]
    with torch.no_grad():
        net.eval()(images)
        for hook in hooks:
            hook.remove()
        for layer, row in one.modules.items():
            zero = torch.zeros_like(fed[layer])
            original = net.get_submodule(layer)
            y = original(fed[layer]) - original(zero)
            for name, module in row.items():
                lost = (y - module(fed[layer]) + module(zero)).norm() / y.norm()
                assert one.errors[layer][name] == pytest.approx(float(lost), rel=0.03, abs=1e-5), (
                    layer,
                    name,
                )


@pytest.mark.parametrize("fractions", [(0.3,), (0.45,), (0.7,), (0.5, 0.45)])
def test_the_error_knapsack_is_the_best_of_all_choices(fractions, net, images, labels):
    one = problem(net, images, labels, fractions)
    best = min(total(one.errors, c, 2) for c in using(one))
    assert total(one.errors, RULES["error-knapsack"](one), 2) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("fraction", [0.45, 0.7])
def test_the_sensitivity_knapsack_is_the_best_of_all_choices(fraction, net, images, labels):
    one = problem(net, images, labels, (fraction,))
    with torch.no_grad():
        outputs = net.eval()(images)
    halves = [torch.arange(start, len(images), 2) for start in (0, 1)]
    alone = {layer: dict.fromkeys(row, 0.0) for layer, row in one.candidates.items()}
    for fitted, seen in (halves, halves[::-1]):
        half = replace(one, images=images[fitted])
        for layer, row in one.candidates.items():
            for name in row:
                network = half.network({**dict.fromkeys(one.candidates, "dense"), layer: name})
                alone[layer][name] += loss(network, images[seen], outputs[seen]) / 2
    best = min(total(alone, c) for c in using(one))
    assert total(alone, RULES["sensitivity-knapsack"](one)) == pytest.approx(best, abs=1e-5)


def test_random_is_the_best_of_its_draws_and_each_uses_the_budget(net, images, labels, monkeypatch):
    tried, loss = [], Problem.loss

    def spied(self, network):
        choice = {}
        for layer, row in self.candidates.items():
            rank = rank_of(network.get_submodule(layer))
            choice[layer] = next(name for name in row if row[name] == rank)
        tried.append((loss(self, network), self.limits[0].costs.total(choice)))
        return tried[-1][0]

    monkeypatch.setattr(Problem, "loss", spied)
    one = problem(net, images, labels, (0.5,), seed=1)
    best = RULES["random"](one)
    budget = one.limits[0].budget
    assert len(tried) == scored.DRAWS
    assert all(USE * budget <= cost <= budget for _, cost in tried)
    assert len({value for value, _ in tried}) > 4
    assert loss(one, one.network(best)) == pytest.approx(min(value for value, _ in tried))


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("rule", RULES)
def test_the_seed_alone_decides(rule, net, images, labels, monkeypatch):
    monkeypatch.setattr(scored, "DRAWS", 1)  # the best of many is often the same
    found = []
    for state in range(4):
        torch.manual_seed(state)
        np.random.seed(state)
        found.append(
            RULES[rule](problem(net, images, labels, (0.5,), train=loader(images, labels)))
        )
    assert all(choice == found[0] for choice in found)


def test_another_seed_draws_other_plans(net, images, labels, monkeypatch):
    monkeypatch.setattr(scored, "DRAWS", 1)
    one = problem(net, images, labels, (0.5,))
    assert (
        len(
            {
                tuple(RULES["random"](dataclasses.replace(one, seed=seed)).values())
                for seed in range(8)
            }
        )
        > 2
    )
