"""Read a plan layer by layer, and change it by hand: the other layers are refitted."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nni_haloc.costs.table import CostTable
from nni_haloc.plan.budget import Choice, Limit, choose_least
from nni_haloc.plan.known_layers import KnownLayers
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.plan.rules.scored import USE
from nni_haloc.space.names import DENSE, parse_rank, rank_name
from nni_haloc.utils.errors import InfeasibleBudget, SettingsError, brief, matches_none
from nni_haloc.utils.files import is_number
from nni_haloc.utils.printing import percent

BY_HAND = "by hand"
"""``chosen_by.rule`` of a plan that was changed by hand."""
_SHOWN = 8
"""Ranks of a layer that a message lists."""


@dataclass(frozen=True)
class Candidate:
    """One candidate of a layer.

    Attributes:
        name: ``dense``, ``r16``, ``r16x8``.
        cost: in the table's unit; None where the table does not have it.
        sensitivity: how far it alone moves the outputs; None where that was not measured.
    """

    name: str
    cost: float | None
    sensitivity: float | None


@dataclass(frozen=True)
class LayerRow:
    """What there is to know of a layer's place in a plan.

    Attributes:
        layer: its name.
        chosen: its candidate in the plan.
        dense: the dense candidate.
        cheaper: the next cheaper candidate; None where there is none, or its cost is unknown. Where
            sensitivities are known, candidates that another one beats in both are passed over.
        dearer: the next dearer one.
        reason: in plain words, why the layer has its rank.
        left_alone: whether the layer is not searched at all.
        number: of its candidates.
    """

    layer: str
    chosen: Candidate
    dense: Candidate
    cheaper: Candidate | None
    dearer: Candidate | None
    reason: str
    left_alone: bool = False
    number: int = 0


def explain(plan: RankPlan, costs: CostTable | None, known: KnownLayers | None) -> list[LayerRow]:
    """Explain a plan layer by layer.

    Args:
        plan: the plan.
        costs: the table of what the budget limits; None if there is none.
        known: what the run knew of the layers; None if it did not keep it.

    Returns:
        A row for each layer of the plan, then one for each that is left alone.
    """
    facts = facts_of(plan)[0]
    changed = facts.get("changed")
    by_hand = set(changed) if isinstance(changed, Mapping) else set()
    rows = []
    for layer, name in plan.names.items():
        every = _candidates(layer, name, costs, known)
        chosen = next(each for each in every if each.name == name)
        cheaper, dearer = _neighbours(chosen, every)
        if layer in by_hand:
            reason = "set by hand"
        elif known is not None and layer in known.pinned:
            reason = "pinned"
        elif facts.get("rule") == "plan" and len(every) < 3:
            reason = "as in the plan that was given"
        else:
            reason = _reason(chosen, cheaper, dearer, costs)
        dense, number = _dense(every, costs, layer), len(every)
        rows.append(LayerRow(layer, chosen, dense, cheaper, dearer, reason, number=number))
    for layer, why in (known.left_alone if known else {}).items():
        if layer not in plan.ranks:
            dense = _dense([], costs, layer)
            rows.append(LayerRow(layer, dense, dense, None, None, f"left alone: {why}", True))
    return rows


def _candidates(
    layer: str, name: str, costs: CostTable | None, known: KnownLayers | None
) -> list[Candidate]:
    """Return a layer's candidates, the chosen one among them."""
    row = costs.costs.get(layer, {}) if costs else {}
    added = known.candidates.get(layer) if known else None
    if added is None:
        added = dict.fromkeys(row)
    names = dict.fromkeys([*added, name])
    return [Candidate(each, row.get(each), added.get(each)) for each in names]


def _dense(every: Sequence[Candidate], costs: CostTable | None, layer: str) -> Candidate:
    """Return a layer's dense candidate, which moves nothing, whether it may be chosen or not."""
    cost = costs.costs.get(layer, {}).get(DENSE) if costs else None
    return next((each for each in every if each.name == DENSE), Candidate(DENSE, cost, 0.0))


def _neighbours(
    chosen: Candidate, every: Sequence[Candidate]
) -> tuple[Candidate | None, Candidate | None]:
    """Return the next cheaper and the next dearer candidate that no other one beats."""
    priced = [(each.cost, each) for each in every if each.cost is not None]
    if chosen.cost is None:
        return None, None
    best, kept = math.inf, []
    for cost, each in sorted(priced, key=lambda pair: (pair[0], pair[1].sensitivity or 0.0)):
        if each.sensitivity is None or each.sensitivity < best:
            best = math.inf if each.sensitivity is None else each.sensitivity
            kept.append((cost, each))
    cheaper = [each for cost, each in kept if cost < chosen.cost]
    dearer = [each for cost, each in kept if cost > chosen.cost]
    return (cheaper[-1] if cheaper else None), (dearer[0] if dearer else None)


def _reason(
    chosen: Candidate,
    cheaper: Candidate | None,
    dearer: Candidate | None,
    costs: CostTable | None,
) -> str:
    """Say in plain words what speaks for a candidate, by its neighbours."""
    if costs is None or chosen.cost is None:
        return ""
    if cheaper is not None and cheaper.cost is not None:
        saved = _share((chosen.cost - cheaper.cost) / costs.original)
        text = f"next lower rank {cheaper.name} saves {saved} of the network's cost"
        return f"{text}{_but(chosen, cheaper)}"
    if chosen.name == DENSE:
        return "dense: every low rank is dearer"
    if dearer is not None and dearer.cost is not None:
        more = _share((dearer.cost - chosen.cost) / costs.original)
        higher = DENSE if dearer.name == DENSE else f"next higher rank {dearer.name}"
        text = f"the cheapest: {higher} takes {more} more of the network's cost"
        return f"{text}{_but(chosen, dearer)}"
    return "the cheapest"


def _share(share: float) -> str:
    """Write a share of the network's cost as a percentage; a small one is not 0.0 %."""
    return percent(share) if share >= 5e-4 else f"{100 * share:.1g} %"


def _but(chosen: Candidate, other: Candidate) -> str:
    """Say how far another candidate moves the outputs, by how far the chosen one does."""
    own, its = chosen.sensitivity, other.sensitivity
    if own is None or its is None:
        return ""
    if own == its:
        return " and moves the outputs as far"
    if own <= 0:
        return f" but moves the outputs by {its:.2g}"
    times = its / own
    if times < 1:
        return f" and moves the outputs {times:.2g} times as far"
    return f" but moves the outputs {times:.3g} times as far"


def movement(choice: Mapping[str, str], known: KnownLayers) -> float | None:
    """Return the predicted change of the outputs: the sum of a choice's sensitivities.

    Args:
        choice: layer to candidate.
        known: what the run knew of the layers.

    Returns:
        The sum; None where a candidate was not measured.
    """
    added = [known.candidates.get(layer, {}).get(name) for layer, name in choice.items()]
    found = [value for value in added if value is not None]
    return math.fsum(found) if len(found) == len(added) else None


def facts_of(plan: RankPlan) -> list[Mapping[str, Any]]:
    """Return what a plan says of each of its limits; the first one says how it was chosen, too.

    A plan is a file that anybody may have written: what is no keys and values is left out.
    """
    if not isinstance(plan.chosen_by, Mapping):
        return [{}]
    also = plan.chosen_by.get("also")
    others = also if isinstance(also, list) else []
    return [plan.chosen_by, *(each for each in others if isinstance(each, Mapping))]


def limits_of_file(plan: RankPlan, tables: Sequence[CostTable]) -> list[Limit]:
    """Return the limits that a plan was made within.

    Args:
        plan: a plan with the facts of its limits.
        tables: the cost table of each limit.

    Raises:
        ValueError: if the plan does not say its budgets, or there are too few tables.
    """
    budgets = [fact.get("budget") for fact in facts_of(plan)]
    known = [float(x) for x in budgets if isinstance(x, (int, float)) and is_number(x) and x > 0]
    if len(known) < len(budgets):
        raise ValueError("ranks.json does not say its budget; run again to change its plan")
    if len(tables) < len(known):
        raise ValueError(f"expected {len(known)} cost tables, found {len(tables)}")
    return [Limit(table, budget) for table, budget in zip(tables, known, strict=False)]


def read_wishes(wishes: Sequence[str], known: KnownLayers) -> Choice:
    """Return the candidates that are wished by hand.

    Args:
        wishes: ``PATTERN=RANK`` each; the pattern, of `fnmatch`, is one of layers' names, the rank
            ``24``, ``24x32`` or ``dense``. The first pattern that matches a layer counts.
        known: the layers and their candidates.

    Returns:
        Layer to candidate.

    Raises:
        SettingsError: for a layer that is not searched, or a rank that is not among its candidates.
    """
    chosen: Choice = {}
    for wish in wishes:
        pattern, equals, text = wish.rpartition("=")
        if not equals or not pattern or not re.fullmatch(r"r?\d+(x\d+)?|dense", text):
            expected = "expected LAYER=RANK, the rank 24, 24x32 or dense"
            raise SettingsError(f"--set: {expected}, found {brief(wish)}")
        layers = fnmatch.filter(known.candidates, pattern)
        if not layers:
            raise SettingsError(f"--set {wish}: {_why_no_layer(pattern, known)}")
        if set(layers) <= set(chosen):
            raise SettingsError(f"--set {wish}: its layers are set already, the first --set counts")
        for layer in layers:
            if layer not in chosen:
                chosen[layer] = _candidate(wish, layer, text, known)
    return chosen


def _why_no_layer(pattern: str, known: KnownLayers) -> str:
    alone = fnmatch.filter(known.left_alone, pattern)
    if alone:
        return f"layer {alone[0]!r} is left alone: {known.left_alone[alone[0]]}"
    return f"no searched layer matches {matches_none(pattern, known.candidates, _SHOWN)}"


def _candidate(wish: str, layer: str, text: str, known: KnownLayers) -> str:
    """Return the name of the candidate that a wish means, if the layer has it."""
    kind, names = known.kinds[layer], list(known.candidates[layer])
    where = f"--set {wish}: layer {layer!r}"
    try:
        name = rank_name(parse_rank(text if text == DENSE else f"r{text.lstrip('r')}", kind))
    except ValueError:
        takes = "24, 24x32 or dense" if kind == "conv" else "one rank, such as 24, or dense"
        raise SettingsError(f"{where} is of kind {kind!r}: expected {takes}") from None
    if name in names:
        return name
    if layer in known.pinned:
        raise SettingsError(f"{where} is pinned to {names[0]}; run again with another pin")
    near = sorted(names, key=lambda other: (_distance(other, name), names.index(other)))[:_SHOWN]
    shown = ", ".join(each.removeprefix("r") for each in sorted(near, key=names.index))
    which = "one near it, such as" if len(names) > _SHOWN else "one of"
    remedy = "or run with a rank_space that has it"
    raise SettingsError(f"{where} has no candidate {text}: expected {which} {shown}, {remedy}")


def _distance(name: str, other: str) -> float:
    """Return how far two ranks are apart."""
    pairs = []
    for each in (name, other):
        numbers = [int(number) for number in re.findall(r"\d+", each)]
        if not numbers:
            return math.inf
        pairs.append((numbers[0], numbers[-1]))
    (a, b), (c, d) = pairs
    return abs(a - c) + abs(b - d)


def refit(
    plan: RankPlan,
    limits: Sequence[Limit],
    known: KnownLayers,
    wishes: Mapping[str, str],
    told: Sequence[Limit] | None = None,
) -> RankPlan:
    """Change some layers of a plan by hand, and choose the others anew within its limits.

    The others have the least sum of sensitivities, as the rule ``sensitivity-knapsack`` chooses
    them.

    Args:
        plan: the plan.
        limits: what the whole network may cost; every one holds.
        known: the candidates of every layer and their sensitivities.
        wishes: layer to the candidate that it is to have.
        told: the limits that the new plan gets its figures by (None: ``limits``).

    Returns:
        The new plan; its ``chosen_by`` has what was changed by hand.

    Raises:
        SettingsError: if sensitivities are not known.
        InfeasibleBudget: if no network with the wishes is within the limits.
    """
    if not known.measured:
        raise SettingsError(
            "--set: the run kept no sensitivities to refit the other layers by; run again with"
            " rule: sensitivity-knapsack, or search.start: sensitivity"
        )
    losses = {
        layer: {
            name: added or 0.0 for name, added in row.items() if name == wishes.get(layer, name)
        }
        for layer, row in known.candidates.items()
    }
    try:
        choice = choose_least(losses, limits, USE)
    except InfeasibleBudget as error:
        wished = ", ".join(f"{layer} at {name}" for layer, name in list(wishes.items())[:_SHOWN])
        more = ", ..." if len(wishes) > _SHOWN else ""
        raise InfeasibleBudget(
            f"--set: with {wished}{more}, {error.fact.removeprefix('budget: ')};"
            " choose lower ranks, or run with a higher budget"
        ) from None
    ranks = {layer: parse_rank(choice[layer], known.kinds[layer]) for layer in choice}
    ordered = {layer: ranks[layer] for layer in [*plan.ranks, *ranks] if layer in ranks}
    first, *others = (limit.facts(choice) for limit in told or limits)
    facts = {"rule": BY_HAND, "changed": dict(wishes), "from": facts_of(plan)[0].get("rule")}
    return RankPlan(ordered, {**facts, **first, "also": others})
