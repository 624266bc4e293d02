"""A run's folder as one HTML page that needs nothing else, and runs nothing."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from matplotlib import rc_context
from pydantic import ValidationError

from nni_haloc.inputs.registries import STAGES
from nni_haloc.inputs.schema.objective import Objective
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.results import figures
from nni_haloc.results.bench import TEXT, bench_table
from nni_haloc.results.pages import as_address, drawing, page
from nni_haloc.results.plan_table import PlanFiles, is_measured, timing_lines
from nni_haloc.runs.folder import SEARCH_VERSION, Figures, RunFolder, find_run
from nni_haloc.runs.kept import OF_BUDGET, missed_budgets
from nni_haloc.runs.plausibility import doubts
from nni_haloc.runs.run import RESULT, flatten, gains
from nni_haloc.runs.stages import all_stages
from nni_haloc.runs.summary import ACCURACIES, ROWS
from nni_haloc.runs.under_way import UnderWay, look
from nni_haloc.training import curves
from nni_haloc.utils.errors import SettingsError
from nni_haloc.utils.files import read_json
from nni_haloc.utils.printing import percent

_COLUMNS = {
    "top1": "top-1",
    "top5": "top-5",
    "test_top1": "top-1, test images",
    "test_top5": "top-5, test images",
    "latency_ms": "latency, ms",
    "macs": "MACs",
    "params": "parameters",
    "bytes": "file of weights",
    "measured_share": "latency, of the original",
    "latency_ms_of_budget": "latency, of the budget",
    "energy_mj_of_budget": "energy, of the budget",
    "budget_met": "budget met",
}
"""Figures of the table of networks, and their headings."""
_STAGES = {
    "original_": "original: ",
    "pruned_": "pruned: ",
    "quantized_": "quantized: ",
    "onnx_": "float32 in ONNX Runtime: ",
    "int8_": "int8 in ONNX Runtime: ",
    "": "",
}
"""Beginnings of the names that NNI gets, and what the page calls the networks."""
_OTHERS = {
    "default": "default (what a tuner maximises)",
    "images": "images that top-1 is of",
    "chance": "top-1 of guesses",
    "at_chance": "top-1 is not above chance (1: yes)",
    "far_above_original": "top-1 is far above the original's (1: yes)",
    "speedup": "times as fast as the original",
    "images_per_s": "images/s",
    "macs_reduction": "MACs: reduction",
    "params_reduction": "parameters: reduction",
}
"""Figures that are in no table, and their names on the page."""
_COSTS = {
    "budget": "budget",
    "cost": "cost by the table",
    "original_cost": "the original's cost by the table",
}
"""Facts of a plan that are in the unit of its metric, and their names on the page."""
_FIRST_ROWS = ("original", STAGES[RESULT].title)
"""Titles of the rows that the first cards of the page are about."""


def html_report(path: str | Path, *, refresh: int | None = None) -> str:
    """Make the page of a run's folder, or of a trial's with the run's in it.

    What the folder does not have is left out. The page of a run that has not ended says so.

    Args:
        path: the folder of a run, a search or a trial.
        refresh: seconds after which a browser loads the page again, as long as the run is under
            way (None: it does not).

    Returns:
        The page as HTML, which loads nothing from elsewhere.

    Raises:
        SettingsError: names the file, if there is no run or one of its files is damaged.
    """
    given, folder = Path(path), find_run(path, unfinished=True)
    under_way = look(folder)
    files = PlanFiles.read(folder.path) if folder.ranks.is_file() else None
    run = folder.read_metrics()
    stages = {name: _numbers(row) for name, row in folder.metrics().items()}
    config = run["config"]
    reported = flatten(stages, _objective(config))
    rows = _rows(stages)
    try:
        layers = _layers(files) if files else {}
        drawn = _drawn(files.plan if files else None, folder)
    except OverflowError as error:
        raise SettingsError(f"{folder}: numbers too large to draw ({error})") from None
    repeated = {key: value for key, value in config.items() if key not in ("scale", "preset")}
    settings = yaml.safe_dump(repeated, sort_keys=False)
    return page(
        "report.html",
        title="/".join(given.absolute().parts[-2:]),
        model=_flat(config.get("model", {})).get("name", ""),
        under_way=under_way,
        now=time.strftime("%Y-%m-%d %H:%M:%S") if under_way else "",
        refresh=refresh if under_way and under_way.running else None,
        likely=_likely(under_way, folder) if under_way else [],
        facts=_facts(files.plan) if files else {},
        headline=_headline(stages, rows),
        doubts=[*doubts(stages).values(), *missed_budgets(stages)],
        timing=timing_lines(files.plan) if files else [],
        formats=files.formats if files else None,
        stages=_table(rows),
        batch=_flat(config.get("cost", {})).get("batch_size", ""),
        texts=TEXT,
        bench=bench_table(folder.bench) if folder.bench.is_file() else None,
        metrics={_name_of(key): _shown(value) for key, value in reported.items()},
        layers=layers,
        drawn=drawn,
        parameters={key: _shown(value) for key, value in run["parameters"].items()},
        settings=settings if config else "",
        download=as_address("application/yaml", settings.encode()),
        given=shlex.quote(str(given)),
        folder=shlex.quote(str(folder)),
        searched=folder.searching.history.is_file(),
        versions={key: str(value) for key, value in _flat(run["versions"]).items()},
    )


def _objective(config: Mapping[str, Any]) -> Objective:
    """Return what a trial maximised, by the settings that a run has saved."""
    try:
        return Objective.model_validate(config.get("objective") or {})
    except ValidationError:  # somebody else's file
        return Objective()


def _facts(plan: RankPlan) -> dict[str, str]:
    """Return how a plan was chosen; costs are told with their unit."""
    facts = {key: _shown(v) for key, v in _flat(plan.chosen_by).items() if v is not None}
    unit = f", {facts['metric']}" if "metric" in facts else ""
    return {f"{_COSTS[key]}{unit}" if key in _COSTS else key: v for key, v in facts.items()}


def _likely(under_way: UnderWay, folder: RunFolder) -> list[dict[str, Any]]:
    """Return a row for each layer of an unfinished search: its most probable candidate, its cost.

    Costs are by the first limit.
    """
    try:
        rows = []
        for layer, row in under_way.search.get("layers", {}).items():
            name, best = max(row.items(), key=lambda item: item[1]["probability"])
            expected = sum(each["probability"] * each["cost"][0] for each in row.values())
            original = under_way.search["limits"][0]["original_cost"]
            rows.append(
                {
                    "layer": layer,
                    "candidate": name,
                    "candidates": len(row),
                    "probability": percent(best["probability"]),
                    "bar": round(100 * min(1.0, best["probability"]), 1),
                    "cost": percent(expected / original),
                }
            )
        return rows
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, ArithmeticError):
        expected = "expected candidates with probability and cost in each layer"
        raise SettingsError(f"{folder.search_file}: {expected}") from None


def _flat(content: Any) -> dict[str, Any]:
    """Return the entries of a mapping that have plain values; for anything else none."""
    if not isinstance(content, Mapping):
        return {}
    return {str(k): v for k, v in content.items() if not isinstance(v, (dict, list))}


def _numbers(row: Any) -> Figures:
    """Return the figures of a row that are numbers a page can show."""
    numbers = {key: _number(value) for key, value in _flat(row).items()}
    return {key: value for key, value in numbers.items() if math.isfinite(value)}


def _number(value: Any) -> float:
    """Return a number, or NaN for anything else."""
    return (
        float(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e18
        else math.nan
    )


def _shown(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return (
        f"{value:,}"
        if isinstance(value, int)
        else f"{value:,.0f}"
        if value.is_integer() and abs(value) < 1e15
        else f"{value:,.6g}"
    )


def _name_of(key: str) -> str:
    """Return the name of a figure as in the table of ``haloc run``; another stage's as it is."""
    for stage, title in _STAGES.items():
        name = key.removeprefix(stage)
        if key.startswith(stage) and name in ROWS:
            return f"{title}{ROWS[name][0]}{', ms' if name == 'latency_ms' else ''}"
        if key.startswith(stage) and name in _OTHERS:
            return f"{title}{_OTHERS[name]}"
    return key


def _rows(stages: Mapping[str, Figures]) -> dict[str, Figures]:
    """Return the rows of the table of networks: title to figures."""
    rows = {"original": dict(stages.get("original", {}))}
    known = {stage.name: stage for stage in all_stages()}
    for name, row in stages.items():
        if name != "original":
            rows |= known[name].rows(row) if name in known else {name: dict(row)}
    return {
        title: {key: value for key, value in row.items() if key in _COLUMNS}
        for title, row in rows.items()
    }


def _headline(
    stages: Mapping[str, Figures], rows: Mapping[str, Figures]
) -> list[tuple[str, str, str]]:
    """Return heading, figure and remark of what a reader looks for first."""
    original, result = stages.get("original", {}), stages.get(RESULT, {})
    gained, cards = gains(original, result), []
    if "top1" in result:
        remark = f"original {percent(original['top1'], 2)}" if "top1" in original else ""
        cards.append(("top-1", percent(result["top1"], 2), remark))
    if "latency_ms" in result:
        remarks = [_speed(gained["speedup"])] if "speedup" in gained else []
        if OF_BUDGET["latency_ms"] in result:
            remarks.append(f"{percent(result[OF_BUDGET['latency_ms']])} of the budget")
        cards.append(("latency", f"{result['latency_ms']:.4g} ms", ", ".join(remarks)))
    for key, name in (("macs", "MACs"), ("params", "parameters")):
        if key in result:
            less = gained.get(f"{key}_reduction")
            remark = "" if less is None else f"{percent(less)} fewer"
            cards.append((name, _rounded(result[key]), remark))
    for title, row in rows.items():
        name, _, where = title.partition(" in ")
        if title not in _FIRST_ROWS and "top1" in row and "simulated" not in title:
            remark = f"{row['latency_ms']:.4g} ms" if "latency_ms" in row else ""
            remark += f" in {where}" if remark and where else ""
            cards.append((f"top-1, {name}", percent(row["top1"], 2), remark))
    return cards


def _speed(speedup: float) -> str:
    """Say how fast a network is, of how many times as fast as the original it is."""
    slower = f"{100 * (1 / speedup - 1):.1f}"
    return f"{slower} % slower" if float(slower) > 0 else f"{speedup:.2f} times as fast"


def _rounded(count: float) -> str:
    """Write a number with k, M or G."""
    for power, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= power:
            return f"{count / power:.4g}{letter}"
    return f"{count:.4g}"


def _table(rows: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Return the table of stages: the headings in use, and a row for each stage."""
    heads = [key for key in _COLUMNS if any(key in row for row in rows.values())]
    cells = {
        name: [_cell(key, row[key]) if key in row else "" for key in heads]
        for name, row in rows.items()
        if row
    }
    names = dict(_COLUMNS)
    for key in ("top1", "top5"):
        if f"test_{key}" in heads:
            names[key] += ", validation images"
    return {"heads": [names[key] for key in heads], "rows": cells}


def _cell(key: str, value: float) -> str:
    if key in ACCURACIES:
        return percent(value, 2)
    if key in (*OF_BUDGET.values(), "measured_share"):
        return percent(value)
    if key == "budget_met":
        return "yes" if value else "no"
    if key == "bytes":
        return f"{value / 1000:,.1f} kB"
    return f"{value:,.0f}" if key in ("macs", "params") else f"{value:.4g}"


def _layers(files: PlanFiles) -> dict[str, Any]:
    """Return a row for each layer: rank, candidates, cost before and after, sensitivity, reason."""
    rows = []
    for row in files.rows():
        dense, chosen = row.dense.cost, row.chosen.cost
        share = chosen / dense if dense and chosen and not row.left_alone else None
        rows.append(
            {
                "layer": row.layer,
                "alone": row.left_alone,
                "rank": _rank(files.plan.ranks.get(row.layer)),
                "candidates": str(row.number) if row.number else "",
                "costs": [_cost(dense), "" if row.left_alone else _cost(chosen)],
                "share": percent(share),
                "bar": None if share is None else round(100 * min(1.0, share), 1),
                "sensitivity": "" if row.left_alone else _digits(row.chosen.sensitivity),
                "reason": row.reason,
            }
        )
    return {
        "metric": files.costs.metric if files.costs else "",
        "measured": is_measured(files),
        "reasons": any(row["reason"] for row in rows),
        "rows": rows,
    }


def _digits(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _rank(rank: tuple[int, ...] | None) -> str:
    if rank is None:
        return "dense"
    return " x ".join(map(str, rank if len(set(rank)) > 1 else rank[:1]))


def _cost(cost: float | None) -> str:
    if cost is None:
        return ""
    return f"{cost:,.4g}" if cost < 1e4 else f"{cost:,.0f}"


def _drawn(plan: RankPlan | None, folder: RunFolder) -> dict[str, tuple[str, str]]:
    """Draw the figures: name to caption and the image as an address."""
    drawn = {}
    # Layers' names are no formulas; and the same run gives the same page each time.
    with rc_context({"text.parse_math": False, "svg.hashsalt": "haloc"}):
        if plan is not None:
            names = {name: _plain(name, i) for i, name in enumerate(plan.ranks)}
            ranks = {names[layer]: rank for layer, rank in plan.ranks.items()}
            drawn["ranks"] = "Rank of every layer", drawing(figures.rank_bars({"plan": ranks}))
        if points := _search_curve(folder):
            caption = "Search: expected cost, and top-1 of the sampled networks"
            drawn["search"] = caption, drawing(figures.searching(points))
        if folder.searching.history.is_file():
            columns = {"search": curves.read(folder.searching.history)}
            loss, parameters = figures.losses(columns), figures.parameters(columns)
            drawn["loss"] = "Search: loss of the sampled networks", drawing(loss)
            drawn["parameters"] = "Search: expected parameters", drawing(parameters)
        for stage in all_stages():
            path = stage.files(folder).history
            if stage.training_title and stage.name != "search" and path.is_file():
                title = stage.training_title[:1].upper() + stage.training_title[1:]
                curve = figures.finetuning(curves.read(path, curves.EPOCH_COLUMNS))
                caption = f"{title}: loss, and top-1 on validation images"
                drawn[stage.name] = caption, drawing(curve)
    return drawn


def _search_curve(folder: RunFolder) -> list[Figures]:
    """Return the figures of each epoch of the search that can be drawn; none where it kept none."""
    if not folder.search_file.is_file():
        return []
    curve = read_json(folder.search_file, "search", SEARCH_VERSION).get("curve", [])
    points = [_numbers(point) for point in curve] if isinstance(curve, list) else []
    return [point for point in points if "epoch" in point]


def _plain(name: str, number: int) -> str:
    """Shorten a layer's name for a figure, in characters that every font has."""
    plain = ascii(name)[1:-1]
    return plain if len(plain) <= 40 else f"{plain[:32]}...#{number}"
