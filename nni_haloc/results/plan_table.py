"""Show a run's plan layer by layer, and change it by hand."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nni_haloc.costs.device.torch_runtime import hardware
from nni_haloc.costs.from_settings import runtime_of
from nni_haloc.costs.latency import measure_latency
from nni_haloc.costs.table import CostTable
from nni_haloc.plan.budget import Limit
from nni_haloc.plan.by_hand import (
    Candidate,
    LayerRow,
    explain,
    facts_of,
    limits_of_file,
    movement,
    read_wishes,
    refit,
)
from nni_haloc.plan.compression import restructure
from nni_haloc.plan.known_layers import KnownLayers
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.runs.finished import Finished
from nni_haloc.runs.folder import RunFolder, find_run
from nni_haloc.runs.kept import TOLERANCE
from nni_haloc.runs.memory_format import Formats, fastest_original
from nni_haloc.runs.promise import METRIC, with_factor
from nni_haloc.runs.saved import factory_of
from nni_haloc.runs.summary import cost_line
from nni_haloc.utils.errors import HalocError, SettingsError, as_one_line, reason_of
from nni_haloc.utils.files import is_number
from nni_haloc.utils.log import logger
from nni_haloc.utils.printing import percent, print_table, short
from nni_haloc.utils.quiet import quiet

TEXT = ("layer", "reason", "rank before", "rank after", "")
"""Headings of the columns that hold text."""

_WIDE, _NARROW = 140, 105
"""Columns of a terminal that has room for the whole table, and for the table without neighbours."""


@dataclass(frozen=True)
class PlanFiles:
    """What a run's folder says of its plan.

    Attributes:
        folder: the run's folder.
        plan: its plan.
        tables: the cost table of each limit, as far as the folder has them.
        known: what the run knew of its layers; None in the folder of an earlier version.
    """

    folder: RunFolder
    plan: RankPlan
    tables: Sequence[CostTable]
    known: KnownLayers | None

    @classmethod
    def read(cls, path: str | Path) -> PlanFiles:
        """Read a folder: that of a run, of a search or of a trial.

        Raises:
            SettingsError: names the file, if there is no plan or one of the files is damaged.
        """
        folder = find_run(path)
        with as_one_line():
            plan = RankPlan.load(folder.ranks)
            files = [
                folder.costs,
                *(folder.further_costs(i) for i in range(len(facts_of(plan)) - 1)),
            ]
            tables = [CostTable.load(file) for file in files if file.is_file()]
            known = KnownLayers.load(folder.layers) if folder.layers.is_file() else None
        return cls(folder, plan, tables if folder.costs.is_file() else [], known)

    @property
    def costs(self) -> CostTable | None:
        """The table of what the budget limits."""
        return self.tables[0] if self.tables else None

    @property
    def formats(self) -> Formats | None:
        """By what the memory format was chosen; None where it was given."""
        return Formats.of(facts_of(self.plan)[0].get("formats"))

    def rows(self, plan: RankPlan | None = None) -> list[LayerRow]:
        """Explain the folder's plan, or another one of the same network."""
        return explain(plan or self.plan, self.costs, self.known)

    def limits(self) -> list[Limit]:
        """Return the limits that the plan was made within.

        Raises:
            SettingsError: if the folder does not have them.
        """
        with as_one_line(where=str(self.folder)):
            return limits_of_file(self.plan, self.tables)

    def limits_to_refit(self) -> list[Limit]:
        """Return the limits for another plan: by tables that the timing of this one corrected."""
        factor = timed_facts(self.plan).get("table_factor", 1.0)
        return [
            replace(limit, costs=with_factor(limit.costs, factor))
            if limit.costs.metric == METRIC and factor != 1.0
            else limit
            for limit in self.limits()
        ]

    def facts(self, plan: RankPlan) -> dict[str, Any]:
        """Return what a plan of the same network costs, and how far it moves the outputs.

        Returns:
            ``costs``, a list with the facts of each limit, and ``movement``, the sum of the
            sensitivities, which is None where they are not known.
        """
        keys = ("metric", "budget", "cost", "original_cost")
        costs = [{k: each[k] for k in keys} for each in facts_of(plan) if set(keys) <= set(each)]
        moved = movement(plan.names, self.known) if self.known else None
        return {"costs": costs, "movement": moved}


def change_plan(
    files: PlanFiles, wishes: Sequence[str], *, timing: bool = True, factories: bool = False
) -> tuple[RankPlan, dict[str, Any]]:
    """Change some layers of a run's plan by hand, and refit the others within its limits.

    Args:
        files: what the run's folder says.
        wishes: ``PATTERN=RANK`` each, see `nni_haloc.plan.by_hand.read_wishes`.
        timing: whether to time the whole networks, where a limit is a latency of this device.
        factories: see `Finished`.

    Returns:
        The new plan, and what it changes: ``changed``, ``before``, ``after`` (see
        `PlanFiles.facts`), ``layers``; where networks were timed, ``latency_ms``, or
        ``not_timed``, the reason.

    Raises:
        SettingsError: for a wish that is not possible; names the layer.
        InfeasibleBudget: if no network with the wishes is within the limits.
    """
    if files.known is None:
        raise SettingsError(
            f"{files.folder.layers}: no such file: a run of an earlier version, or one without a"
            " rank space; run again to change its plan"
        )
    limits = files.limits()
    wished = read_wishes(wishes, files.known)
    new = refit(files.plan, files.limits_to_refit(), files.known, wished, limits)
    before = {row.layer: row for row in files.rows()}
    content: dict[str, Any] = {
        "folder": str(files.folder),
        "changed": wished,
        "before": files.facts(files.plan),
        "after": files.facts(new),
        "layers": [
            {
                "layer": row.layer,
                "before": _shown(before[row.layer].chosen) if row.layer in before else None,
                "after": _shown(row.chosen),
                "reason": row.reason,
            }
            for row in files.rows(new)
        ],
    }
    if timing and any(limit.costs.metric == "latency_ms" for limit in limits):
        content |= _timed(files, {"before": files.plan, "after": new}, limits, factories)
    return new, content


def _timed(
    files: PlanFiles, plans: Mapping[str, RankPlan], limits: Sequence[Limit], factories: bool
) -> dict[str, Any]:
    """Time the original network and those of plans in alternation, or say why not."""
    if not factories and (name := factory_of(files.folder.path)):
        return {"not_timed": f"the network is made by code of your own, {name}; add --code FOLDER"}
    try:
        run = Finished(files.folder.path, data=False, factories=factories)
        runtime = runtime_of(run.config)
        here = runtime.identity().get("device") or hardware(run.config.cost.device)
        tables = [limit.costs for limit in limits if limit.costs.metric == "latency_ms"]
        devices = {table.identity.get("device", here) for table in tables}
        if here not in devices:
            return {"not_timed": f"the budget is one of another device, {min(devices)}"}
        original = run.original()
        networks = {name: restructure(original, plan).eval() for name, plan in plans.items()}
        beside, other = fastest_original(
            original, runtime, lambda each: runtime_of(run.config, each), tables[0].identity
        )
        networks = {"original": beside, **networks}
        with quiet():
            batch = run.example(run.config.cost.batch_size)
            others = {"original": other}
            times = measure_latency(networks, batch, runtime, others=others)
        asked, own = run.config.budget.fraction, run.config.cost.metric == METRIC
        budgets = [
            asked * times["original"]
            if own and asked is not None and limit is limits[0]
            else limit.budget
            for limit in limits
            if limit.costs.metric == METRIC and limit.costs.identity.get("device", here) == here
        ]
        return {"latency_ms": times, "latency_budget_ms": min(budgets)}
    except (HalocError, ValueError, RuntimeError) as error:
        return {"not_timed": reason_of(error)}


def plan_content(files: PlanFiles) -> dict[str, Any]:
    """Return a run's plan as plain lists and dicts.

    Returns:
        ``folder``, ``metric``, ``measured`` (whether sensitivities are known), ``costs`` and
        ``movement`` (see `PlanFiles.facts`), ``timed``, the figures of the timing that the plan
        was kept by, ``memory_formats``, by what the memory format was chosen (None of both: there
        was none), and ``layers``, a list of dicts.
    """
    layers = [
        {
            "layer": row.layer,
            "chosen": _shown(row.chosen),
            "dense": _shown(row.dense),
            "cheaper": row.cheaper and _shown(row.cheaper),
            "dearer": row.dearer and _shown(row.dearer),
            "reason": row.reason,
        }
        for row in files.rows()
    ]
    formats = files.formats
    return {
        "folder": str(files.folder),
        "metric": files.costs.metric if files.costs else None,
        "measured": is_measured(files),
        **files.facts(files.plan),
        "timed": timed_facts(files.plan) or None,
        "memory_formats": formats and formats.facts(),
        "layers": layers,
    }


def timed_facts(plan: RankPlan) -> dict[str, float]:
    """Return the numbers of the timing that a plan was kept by; none where it was not timed."""
    timed = facts_of(plan)[0].get("timed")
    found = timed.items() if isinstance(timed, Mapping) else ()
    return {str(key): float(value) for key, value in found if is_number(value) and value > 0}


def timing_lines(plan: RankPlan) -> list[str]:
    """Say what a plan's network took when it was timed, and whether its table was corrected.

    Args:
        plan: the plan.

    Returns:
        No line where nothing was timed.
    """
    facts, lines = timed_facts(plan), []
    if {"measured_share", "of_budget"} <= facts.keys():
        share, of_budget = percent(facts["measured_share"]), percent(facts["of_budget"])
        lines.append(
            f"timed as a whole, before training: {share} of the original's latency, "
            f"{of_budget} of the budget"
        )
    factor = facts.get("table_factor", 1.0)
    if factor != 1:
        what, so = (
            ("tightened", "a part of the budget is left")
            if factor > 1
            else ("enlarged", "the plan may be above the budget")
        )
        lines.append(
            f"{what}: low ranks take {factor:.3g} times what the table says, so by the table {so}"
        )
    return lines


def is_measured(files: PlanFiles) -> bool:
    """Tell whether the sensitivities of a run's candidates are known."""
    return files.known is not None and files.known.measured


def _shown(candidate: Candidate) -> dict[str, Any]:
    return {
        "rank": candidate.name,
        "cost": candidate.cost,
        "sensitivity": candidate.sensitivity,
    }


def plan_cells(rows: Sequence[LayerRow], metric: str) -> tuple[list[str], list[list[str]]]:
    """Return the headings and the cells of the table of a plan.

    Args:
        rows: the plan's layers.
        metric: what costs are in; empty where there is no table.

    Returns:
        Columns that no row has are left out.
    """
    columns: dict[str, list[str]] = {
        "layer": [row.layer for row in rows],
        "rank": [row.chosen.name for row in rows],
        f"dense, {metric}": [_cost(row.dense.cost) for row in rows],
        "chosen": [_cost(row.chosen.cost) for row in rows],
        "left": [_left(row) for row in rows],
        "sensitivity": [_number(row.chosen) for row in rows],
        "next cheaper": [_neighbour(row.cheaper) for row in rows],
        "next dearer": [_neighbour(row.dearer) for row in rows],
        "reason": [row.reason for row in rows],
    }
    measured = any(row.chosen.sensitivity is not None for row in rows if not row.left_alone)
    if not measured:
        columns["sensitivity"] = []
    used = {name: cells for name, cells in columns.items() if any(cells)}
    return list(used), [list(cells) for cells in zip(*used.values(), strict=True)]


def _cost(cost: float | None) -> str:
    return "" if cost is None else short(cost)


def _left(row: LayerRow) -> str:
    known = row.dense.cost and row.chosen.cost and not row.left_alone
    return percent(row.chosen.cost / row.dense.cost) if known else ""  # type: ignore[operator]


def _number(candidate: Candidate) -> str:
    return "" if candidate.sensitivity is None else f"{candidate.sensitivity:.3g}"


def _neighbour(candidate: Candidate | None) -> str:
    if candidate is None:
        return ""
    return f"{candidate.name}: {_number(candidate)}" if _number(candidate) else candidate.name


def print_plan(files: PlanFiles) -> None:
    """Print a run's plan as a table, with what it costs and how far it moves the outputs."""
    columns, rows = plan_cells(files.rows(), files.costs.metric if files.costs else "")
    spare = _spare() if sys.stdout.isatty() else ()
    kept = [i for i, name in enumerate(columns) if not name.startswith(spare)]
    columns, rows = [columns[i] for i in kept], [[row[i] for i in kept] for row in rows]
    print_table(str(files.folder), columns, rows, text=TEXT)
    facts = files.facts(files.plan)
    for cost in facts["costs"]:
        print(cost_line(cost))
    for line in timing_lines(files.plan):
        print(line)
    if files.formats is not None:
        print(files.formats)
    if facts["movement"] is not None:
        print(f"predicted change of the outputs: {facts['movement']:.3g}, sum of sensitivities")
    else:
        print(f"no sensitivities: {_why_not_measured(files)}")


def _spare() -> tuple[str, ...]:
    """Return the columns that a narrow terminal has no room for; `haloc plan --json` has all."""
    width = shutil.get_terminal_size().columns
    if width >= _WIDE:
        return ()
    return ("left", "next ") if width >= _NARROW else ("left", "next ", "dense, ")


def _why_not_measured(files: PlanFiles) -> str:
    if files.known is None:
        return "the folder has no layers.json"
    rule = facts_of(files.plan)[0].get("rule", "")
    return f"the run measured none (rule {rule!r})"


def print_change(content: Mapping[str, Any]) -> None:
    """Print what `change_plan` changes: a table of layers, and one of the network."""
    moved = [row for row in content["layers"] if row["before"] != row["after"]]
    rows = [
        [
            row["layer"],
            *(row[when]["rank"] for when in ("before", "after")),
            *(_cost(row[when]["cost"]) for when in ("before", "after")),
            *(f"{row[when]['sensitivity']:.3g}" for when in ("before", "after")),
            "set by hand" if row["layer"] in content["changed"] else "refitted",
        ]
        for row in moved
    ]
    heads = ["rank before", "rank after", "cost before", "cost after"]
    heads += ["sensitivity before", "sensitivity after", "reason"]
    print_table(content["folder"], ["layer", *heads], rows, text=TEXT)
    stay = len(content["layers"]) - len(moved)
    print(f"{stay} layers stay as they were")
    before, after = content["before"], content["after"]
    lines = [
        [f"cost, {old['metric']}", *map(short, (old["original_cost"], old["cost"], new["cost"]))]
        + [short(new["budget"])]
        for old, new in zip(before["costs"], after["costs"], strict=True)
    ]
    movements = [f"{each['movement']:.3g}" for each in (before, after)]
    lines.append(["predicted change of the outputs", "0", *movements, ""])
    if "latency_ms" in content:
        times = content["latency_ms"]
        cells = [f"{times[name]:.4g}" for name in ("original", "before", "after")]
        lines.append(["measured latency, ms", *cells, short(content["latency_budget_ms"])])
    print_table("", ["", "original", "before", "after", "budget"], lines, text=TEXT)
    if "not_timed" in content:
        print(f"not timed: {content['not_timed']}")
    if "latency_ms" in content:
        of_budget = content["latency_ms"]["after"] / content["latency_budget_ms"]
        if of_budget > TOLERANCE:
            logger.warning(
                "the changed plan takes %s of its latency budget, as measured; lower other ranks, "
                "or raise the budget",
                percent(of_budget),
            )


def draw_plan(files: PlanFiles, plan: RankPlan | None, path: Path) -> None:
    """Draw a run's plan, or another one of its network.

    Args:
        files: what the run's folder says.
        plan: another plan; None is the run's own.
        path: the picture; its ending says of which kind.

    Raises:
        SettingsError: for another ending.
    """
    from matplotlib import rc_context  # slow to import

    from nni_haloc.results.figures import plan_rows
    from nni_haloc.utils.files import whole

    metric = files.costs.metric if files.costs else ""
    with rc_context({"text.parse_math": False}):  # layers' names are no formulas
        figure = plan_rows(files.rows(plan), metric)
        with whole(path) as part:
            figure.savefig(part, dpi=150, format=path.suffix[1:] or "png")
