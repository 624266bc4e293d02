"""Eq. 6-9 against closed forms, and docs/equations.md against the code."""

import importlib
import re
from pathlib import Path

import pytest
import torch

from nni_haloc.objective import approach_loss, expected_cost, probability_loss, probability_loss_paper, weight_loss


def test_expected_cost_is_a_weighted_sum_with_its_own_gradient():
    alpha = [torch.randn(3, dtype=torch.float64, requires_grad=True), torch.randn(2, dtype=torch.float64, requires_grad=True)]
    costs = [torch.tensor([3.0, 2.0, 1.0]), torch.tensor([5.0, 4.0])]
    probs = [a.softmax(-1) for a in alpha]
    e = expected_cost(probs, costs, fixed=7)
    assert float(e.detach()) == pytest.approx(7 + sum(float((p @ c.double()).detach()) for p, c in zip(probs, costs, strict=True)))
    for a, p, c, g in zip(alpha, probs, costs, torch.autograd.grad(e, alpha), strict=True):
        torch.testing.assert_close(g, (p * (c.double() - p @ c.double())).detach())  # dE/dalpha_j = p_j (c_j - E_i)
        assert a.grad is None


@pytest.mark.parametrize(("eta", "theta"), [(1.0, 1.0), (0.5, 2.0), (2.0, 0.6)])
def test_the_papers_loss_follows_the_product_rule(eta, theta):
    ce, e = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (1.7, 3.0))
    by_ce, by_e = torch.autograd.grad(probability_loss_paper(ce, e, 2.0, eta, theta), [ce, e])
    assert float(by_ce) == pytest.approx(eta * 1.5**theta)
    assert float(by_e) == pytest.approx(1.7 * eta * theta * 1.5 ** (theta - 1) / 2.0)


@pytest.mark.parametrize("e", [1.0, 3.0])
def test_the_settling_loss_pulls_towards_the_budget_from_both_sides(e):
    ce, cost = torch.tensor(1.0, requires_grad=True), torch.tensor(e, requires_grad=True)
    by_ce, by_cost = torch.autograd.grad(probability_loss(ce, cost, 2.0, beta=3.0), [ce, cost])
    assert (float(by_ce), float(by_cost)) == (1.0, pytest.approx(1.5 if e > 2 else -1.5))


def test_feature_maps_are_compared_by_mean_square_and_summed():
    outputs, targets = [torch.randn(2, 3, 4, 4), torch.randn(2, 5)], [torch.randn(2, 3, 4, 4), torch.randn(2, 5)]
    expected = sum(float(((y - t) ** 2).mean()) for y, t in zip(outputs, targets, strict=True))
    assert float(approach_loss(outputs, targets)) == pytest.approx(expected, rel=1e-5)
    assert float(weight_loss(torch.tensor(1.0), torch.tensor(2.0), 0.25)) == 1.5


def test_the_table_of_equations_matches_the_code():
    table = (Path(__file__).parents[1] / "docs" / "equations.md").read_text()
    rows = re.findall(r"^\| (\d+)[^|]*\| `([\w.]+)` \| `([\w/.:]+)` \|", table, re.M)
    assert {int(number) for number, _, _ in rows} == set(range(1, 10))
    for number, function, test in rows:
        module, _, attribute = function.rpartition(".")
        documented = getattr(importlib.import_module(f"nni_haloc.{module}"), attribute).__doc__
        assert re.search(rf"Eq\. \({number}\)|Eq\. \((\d)\)-\((\d)\)", documented), f"{function} does not say Eq. ({number})"
        file, _, name = test.partition("::")
        assert f"def {name}(" in (Path(__file__).parents[1] / file).read_text()
