"""Rules that choose ranks without a search: each maps a `Problem` to one candidate a layer.

A new rule is a function of a `Problem` that returns a `Choice`, in a file of its own, and a line in
`nni_haloc.inputs.registries.RULES`. One that runs no candidate may be marked with
`nni_haloc.plan.rules.problem.sees_every_rank`, one that can choose r1 and r2 apart with
`nni_haloc.plan.rules.problem.sees_pairs`.
"""

from nni_haloc.inputs.registries import RULES
from nni_haloc.plan.budget import Choice
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.plan.rules.problem import Problem


def plan(problem: Problem, rule: str) -> RankPlan:
    """Choose ranks by a rule, within every limit.

    Args:
        problem: the trained network, its candidates and the limits.
        rule: a name of `RULES`.

    Raises:
        SettingsError: for an unknown rule.
    """
    return describe(problem, RULES[rule](problem), rule)


def describe(problem: Problem, choice: Choice, rule: str) -> RankPlan:
    """Return the plan of a choice, with the facts of how it was made."""
    first, *others = (limit.facts(choice) for limit in problem.limits)
    facts = {"rule": rule, **first, "also": others, "seed": problem.seed}
    ranks = {layer: problem.candidates[layer][name] for layer, name in choice.items()}
    return RankPlan(ranks, facts)


__all__ = ["RULES", "Problem", "describe", "plan"]
