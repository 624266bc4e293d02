"""Eq. 6-9 against closed forms, and docs/explanation/equations.md against the code."""

import importlib
import re

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import torch
from helpers.paths import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from nni_haloc.search.objective import expected_cost, probability_loss_paper, settle, weight_loss


def test_expected_cost_is_a_weighted_sum_with_its_own_gradient():
    alpha = [
        torch.randn(3, dtype=torch.float64, requires_grad=True),
        torch.randn(2, dtype=torch.float64, requires_grad=True),
    ]
    costs = [torch.tensor([3.0, 2.0, 1.0]), torch.tensor([5.0, 4.0])]
    probs = [a.softmax(-1) for a in alpha]
    e = expected_cost(probs, costs, fixed=7)
    assert float(e.detach()) == pytest.approx(
        7 + sum(float((p @ c.double()).detach()) for p, c in zip(probs, costs, strict=True))
    )
    for a, p, c, g in zip(alpha, probs, costs, torch.autograd.grad(e, alpha), strict=True):
        torch.testing.assert_close(
            g, (p * (c.double() - p @ c.double())).detach()
        )  # dE/dalpha_j = p_j (c_j - E_i)
        assert a.grad is None


@pytest.mark.parametrize(("eta", "theta"), [(1.0, 1.0), (0.5, 2.0), (2.0, 0.6)])
def test_the_papers_loss_follows_the_product_rule(eta, theta):
    ce, e = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (1.7, 3.0))
    by_ce, by_e = torch.autograd.grad(probability_loss_paper(ce, e, 2.0, eta, theta), [ce, e])
    assert float(by_ce) == pytest.approx(eta * 1.5**theta)
    assert float(by_e) == pytest.approx(1.7 * eta * theta * 1.5 ** (theta - 1) / 2.0)


def expected_costs(logits, sizes, costs, fixed):
    """Eq. (6) of every limit, layer by layer."""
    result = np.array(fixed, dtype=float)
    for z, c in zip(
        np.split(logits, np.cumsum(sizes)[:-1]),
        np.split(costs, np.cumsum(sizes)[:-1], axis=1),
        strict=True,
    ):
        result += c @ (np.exp(z - z.max()) / np.exp(z - z.max()).sum())
    return result


@st.composite
def settlings(draw):
    """Logits, and costs over budgets that some probabilities meet exactly or with a little to
    spare.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = draw(st.lists(st.integers(1, 8), min_size=1, max_size=20))
    costs = rng.lognormal(0, 1, (draw(st.integers(1, 3)), sum(sizes))) * draw(
        st.sampled_from([1e-3, 1.0, 1e6])
    )
    fixed = costs.mean(1) * rng.uniform(0, 2)
    budgets = expected_costs(rng.normal(0, 2, sum(sizes)), sizes, costs, fixed) * rng.uniform(
        1, 1.1, len(costs)
    )
    return rng.normal(0, 1, sum(sizes)), sizes, costs / budgets[:, None], fixed / budgets


@settings(max_examples=200, deadline=None)
@given(settlings())
def test_settled_logits_meet_every_limit_and_use_one(problem):
    logits, sizes, costs, fixed = problem
    settled, prices = settle(*problem)
    after = expected_costs(settled, sizes, costs, fixed)
    assert expected_costs(logits - prices @ costs, sizes, costs, fixed) == pytest.approx(
        after, abs=1e-6
    )
    assert after.max() <= 1 + 1e-7
    if (
        after.max() < 1 - 1e-7
    ):  # nowhere to go: the limit that binds most can't be reached by paying for cost
        k = int(np.argmax(expected_costs(logits, sizes, costs, fixed)))
        assert (
            expected_costs(-np.argsort(np.argsort(-costs[k])) * 1e5, sizes, costs, fixed)[k]
            < 1 + 1e-7
        )


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_limits_that_conflict_are_met_and_prices_forget_what_was(seed):
    """Where a candidate is cheap by one table it is dear by the other; and an earlier price leaves
    no trace.
    """
    rng = np.random.default_rng(seed)
    sizes = [4] * 6
    first = rng.uniform(0.05, 1, 24)
    costs, fixed = np.stack([first, 1.1 - first + rng.uniform(0, 0.05, 24)]), np.zeros(2)
    budgets = expected_costs(rng.normal(0, 1, 24), sizes, costs, fixed) * rng.uniform(1, 1.02, 2)
    costs = costs / budgets[:, None]
    settled, prices = settle(rng.normal(0, 2, 24), sizes, costs, fixed)
    after = expected_costs(settled, sizes, costs, fixed)
    assert after.max() == pytest.approx(1, abs=1e-6)
    assert (
        prices[after < 1 - 1e-4] < 1e-3 * max(prices.max(), 1)
    ).all()  # none where there is room to spare


def test_settling_takes_the_nearest_probabilities_at_the_budget():
    """Against a general-purpose optimizer: of all probabilities with that expected cost, the least
    Kullback-Leibler divergence.
    """
    rng = np.random.default_rng(0)
    logits, costs, fixed = rng.normal(0, 1, 7), rng.uniform(0.05, 0.8, (1, 7)), np.array([0.1])
    ours = [
        scipy.special.softmax(z) for z in np.split(settle(logits, [3, 4], costs, fixed)[0], [3])
    ]
    before = [scipy.special.softmax(z) for z in np.split(logits, [3])]

    def divergence(p):
        return sum(
            float((q * np.log(q / b)).sum()) for q, b in zip(np.split(p, [3]), before, strict=True)
        )

    constraints = [
        {"type": "eq", "fun": lambda p: p[:3].sum() - 1},
        {"type": "eq", "fun": lambda p: p[3:].sum() - 1},
        {"type": "eq", "fun": lambda p: fixed[0] + costs[0] @ p - 1},
    ]
    found = scipy.optimize.minimize(
        divergence,
        np.concatenate(before),
        bounds=[(1e-9, 1)] * 7,
        constraints=constraints,
        tol=1e-12,
    )
    np.testing.assert_allclose(np.concatenate(ours), found.x, atol=1e-4)


def test_settling_leaves_alone_what_no_network_can_use():
    logits = np.array([0.3, -0.2])
    settled, prices = settle(
        logits, [2], np.array([[0.5, 1.0]]), np.array([0.0])
    )  # the dearest just meets it
    np.testing.assert_array_equal(settled, logits)
    assert not prices.any()


def test_a_budget_of_the_cheapest_network_settles_there():
    after, _ = settle(np.zeros(4), [2, 2], np.array([[0.5, 3.0, 0.25, 0.26]]), np.array([0.25]))
    assert expected_costs(
        after, [2, 2], np.array([[0.5, 3.0, 0.25, 0.26]]), [0.25]
    ) == pytest.approx(1.0)


def test_the_loss_of_the_weights_is_a_weighted_sum():
    assert float(weight_loss(torch.tensor(1.0), torch.tensor(2.0), 0.25)) == 1.5


def test_the_table_of_equations_matches_the_code():
    table = (ROOT / "docs" / "explanation" / "equations.md").read_text()
    rows = re.findall(r"^\| (\d+)[^|]*\| `([\w.]+)` \| `([\w/.:]+)` \|", table, re.M)
    assert {int(number) for number, _, _ in rows} == set(range(1, 10))
    for number, function, test in rows:
        module, _, attribute = function.rpartition(".")
        documented = getattr(importlib.import_module(f"nni_haloc.{module}"), attribute).__doc__
        assert re.search(rf"Eq\. \({number}\)|Eq\. \((\d)\)-\((\d)\)", documented), (
            f"{function} does not say Eq. ({number})"
        )
        file, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / file).read_text()
