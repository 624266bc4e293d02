"""Rules of thumb that choose ranks without a search, to compare with: each maps a `Problem` to one candidate a layer."""

from collections.abc import Callable

from nni_haloc.plan.budget import Choice
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.plan.rules.knapsacks import error_knapsack, random, sensitivity_knapsack
from nni_haloc.plan.rules.learned import learned
from nni_haloc.plan.rules.problem import Problem
from nni_haloc.plan.rules.thresholds import alds, energy, uniform
from nni_haloc.plan.rules.vbmf import vbmf

RULES: dict[str, Callable[[Problem], Choice]] = {
    "uniform": uniform,
    "energy": energy,
    "alds": alds,
    "vbmf": vbmf,
    "error-knapsack": error_knapsack,
    "sensitivity-knapsack": sensitivity_knapsack,
    "random": random,
    "learned": learned,
}
"""Name to rule."""


def plan(problem: Problem, rule: str) -> RankPlan:
    """The ranks that a rule chooses, within every limit; ValueError for an unknown rule."""
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(RULES)}, found {rule!r}")
    return described(problem, RULES[rule](problem), rule)


def described(problem: Problem, choice: Choice, rule: str) -> RankPlan:
    """The plan of a choice, with the facts of how it was made."""
    first, *others = (limit.facts(choice) for limit in problem.limits)
    facts = {"rule": rule, **first, "also": others, "seed": problem.seed}
    return RankPlan(
        {layer: problem.candidates[layer][name] for layer, name in choice.items()}, facts
    )


__all__ = ["RULES", "Problem", "described", "plan"]
