"""The hard budget against trying every choice."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nni_haloc.budget import InfeasibleBudget, cheapest, choose, total


def every(costs):
    layers = list(costs)
    for names in itertools.product(*(costs[layer] for layer in layers)):
        yield dict(zip(layers, names, strict=True))


NUMBER = st.one_of(st.integers(1, 50).map(float), st.floats(1e-3, 1e9))


@st.composite
def problems(draw):
    widths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    costs = {f"l{i}": {f"c{j}": draw(NUMBER) for j in range(n)} for i, n in enumerate(widths)}
    scores = {layer: {c: draw(st.floats(-10, 10)) for c in row} for layer, row in costs.items()}
    fixed = draw(st.one_of(st.just(0.0), NUMBER))
    sums = sorted(total(choice, costs, fixed) for choice in every(costs))
    budget = draw(st.sampled_from(sums)) * draw(st.sampled_from([1.0, 1 - 1e-15, 1 + 1e-15, 1 - 1e-9, 1 + 1e-9, 1 - 1e-6, 1.1]))
    return scores, costs, fixed, budget


@settings(max_examples=300, deadline=None)
@given(problems())
def test_the_budget_is_never_exceeded_and_the_score_is_the_best(problem):
    scores, costs, fixed, budget = problem
    fitting = [c for c in every(costs) if total(c, costs, fixed) <= budget]
    if not fitting:
        with pytest.raises(InfeasibleBudget):
            choose(scores, costs, fixed, budget)
        return
    choice = choose(scores, costs, fixed, budget)
    assert total(choice, costs, fixed) <= budget

    def score(c):
        return math.fsum(scores[layer][name] for layer, name in c.items())

    assert score(choice) >= max(map(score, fitting)) - 1e-4


def test_what_is_left_of_a_larger_budget_is_used():
    costs = {"a": {"dense": 10.0, "r2": 2.0}, "b": {"dense": 10.0, "r2": 2.0}}
    scores = {"a": {"dense": 1.0, "r2": 0.0}, "b": {"dense": 2.0, "r2": 0.0}}
    assert choose(scores, costs, 1.0, 5.0) == {"a": "r2", "b": "r2"}
    assert choose(scores, costs, 1.0, 13.0) == {"a": "r2", "b": "dense"}
    assert choose(scores, costs, 1.0, 21.0) == {"a": "dense", "b": "dense"}


def test_an_impossible_budget_names_the_cheapest_network():
    costs = {"a": {"dense": 10.0, "r2": 2.0}}
    assert cheapest(costs, 3.0) == 5.0
    with pytest.raises(InfeasibleBudget, match=r"budget: 4\.9 macs is below the cheapest network, 5 macs"):
        choose({"a": {"dense": 0.0, "r2": 0.0}}, costs, 3.0, 4.9, "macs")
    with pytest.raises(InfeasibleBudget):
        choose({"a": {"dense": 0.0, "r2": 0.0}}, costs, 3.0, math.nan)


def test_a_score_that_is_not_finite_is_named():
    with pytest.raises(ValueError, match="layer 'a', candidate 'r2'"):
        choose({"a": {"dense": 0.0, "r2": math.inf}}, {"a": {"dense": 2.0, "r2": 1.0}}, 0.0, 3.0)
