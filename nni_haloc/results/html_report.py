"""`haloc report`: a finished run's folder as one HTML page that needs nothing else, and runs nothing."""

from __future__ import annotations

import base64
import json
import math
import shlex
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib import rc_context
from matplotlib.figure import Figure

from nni_haloc.costs.table import CostTable
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.results import figures
from nni_haloc.results.bench import TEXT, bench_table
from nni_haloc.runs.folder import (
    BENCH_FILE,
    COSTS_FILE,
    FINETUNING_FOLDER,
    METRICS_FILE,
    PRUNED_FOLDER,
    QUANTIZED_FOLDER,
    RANKS_FILE,
    SEARCH_FOLDER,
    WEIGHTS_FILE,
)
from nni_haloc.space.names import rank_name
from nni_haloc.training import curves as history
from nni_haloc.utils.errors import SettingsError
from nni_haloc.utils.printing import percent

REPORT_FILE = "report.html"
_PARTS = ("metrics", "config", "parameters", "versions")
"""Of ``metrics.json``."""
_ROWS = {  # of the table of stages: name to what its metrics begin with
    "original": "baseline_", "haloc": "haloc_", "pruned": "pruned_", "quantized (simulated)": "quantized_",
    "float32 in ONNX Runtime": "onnx_", "int8 in ONNX Runtime": "int8_",
}  # fmt: skip
_COLUMNS = {
    "top1": "top-1",
    "top5": "top-5",
    "latency_ms": "latency, ms",
    "macs": "MACs",
    "params": "parameters",
    "bytes": "file",
}
_TRAININGS = {
    FINETUNING_FOLDER: "Fine-tuning", PRUNED_FOLDER: "Fine-tuning of the pruned network", QUANTIZED_FOLDER: "Quantization-aware training",
}  # fmt: skip
_TEMPLATES = Environment(
    loader=PackageLoader(__package__), autoescape=True, undefined=StrictUndefined, trim_blocks=True
)


def html_report(folder: Path) -> str:
    """The page of a run's folder, or of a trial's with the run's in it; what the folder does not have is left out.

    Raises ValueError naming the file where there is no run, or where one of its files is damaged.
    """
    given, folder = (
        folder,
        folder / "haloc" if (folder / "haloc" / RANKS_FILE).is_file() else folder,
    )
    if not (folder / RANKS_FILE).is_file():
        raise SettingsError(
            f"{folder / RANKS_FILE}: no such file; expected the folder of a finished run (haloc run, haloc search, a trial)"
        )
    plan = RankPlan.load(folder / RANKS_FILE)
    run = _read(folder / METRICS_FILE)
    metrics, config = _flat(run.get("metrics", {})), run.get("config", {})
    rows = _rows(metrics, folder)
    try:
        layers, drawn = _layers(plan, folder), _drawn(plan, folder)
    except OverflowError as error:
        raise SettingsError(f"{folder}: numbers too large to draw ({error})") from None
    settings = yaml.safe_dump(
        {key: value for key, value in config.items() if key not in ("scale", "preset")},
        sort_keys=False,
    )
    page = _TEMPLATES.get_template(REPORT_FILE).render(
        title="/".join(given.absolute().parts[-2:]),
        model=_flat(config.get("model", {})).get("name", ""),
        facts={
            key: _shown(value) for key, value in _flat(plan.chosen_by).items() if value is not None
        },
        headline=_headline(metrics, rows),
        stages=_table(rows),
        batch=_flat(config.get("cost", {})).get("batch_size", ""),
        texts=TEXT,
        bench=bench_table(folder / BENCH_FILE) if (folder / BENCH_FILE).is_file() else None,
        metrics={key: _shown(value) for key, value in metrics.items()},
        layers=layers,
        drawn=drawn,
        parameters={key: _shown(value) for key, value in run.get("parameters", {}).items()},
        settings=settings if config else "",
        download=_data("application/yaml", settings.encode()),
        given=shlex.quote(str(given)),
        folder=shlex.quote(str(folder)),
        searched=(folder / SEARCH_FOLDER / history.HISTORY_FILE).is_file(),
        versions={key: str(value) for key, value in _flat(run.get("versions", {})).items()},
    )
    return page.encode("utf-8", "replace").decode()  # JSON may hold halves of characters


def _read(path: Path) -> dict[str, Any]:
    """What a run's JSON file says; nothing where there is none."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{path}: not a JSON file ({error})") from None
    parts = {"": content} | {
        f"{key}: ": content[key] for key in _PARTS if isinstance(content, dict) and key in content
    }
    for key, part in parts.items():
        if not isinstance(part, dict):
            raise SettingsError(
                f"{path}: {key}expected keys and values, found {type(part).__name__}"
            )
    return content


def _flat(content: Any) -> dict[str, Any]:
    """The keys of a mapping that have plain values; nothing of anything else."""
    return (
        {str(k): v for k, v in content.items() if not isinstance(v, (dict, list))}
        if isinstance(content, Mapping)
        else {}
    )


def _number(value: Any) -> float:
    """NaN for what is none."""
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


def _rows(metrics: Mapping[str, Any], folder: Path) -> dict[str, dict[str, float]]:
    """The figures of every stage, by the names of `_COLUMNS`; those that a command of its own made are in the stage's folder alone."""
    m, folders = dict(metrics), (PRUNED_FOLDER, QUANTIZED_FOLDER)
    if not any(
        f"{stage}_top1" in m for stage in folders
    ):  # then what has no stage's name is HALOC's
        m["haloc_top1"] = m.get("default")
        m["haloc_bytes"] = (
            (folder / WEIGHTS_FILE).stat().st_size if (folder / WEIGHTS_FILE).is_file() else None
        )
    for stage in folders:
        m |= _flat(_read(folder / stage / METRICS_FILE).get("metrics", {}))
    m |= {f"haloc_{key}": m.get(key) for key in ("top5", "latency_ms", "macs", "params")}
    for key in ("macs", "params"):
        kept = 1 - _number(m.get(f"{key}_reduction"))
        m[f"baseline_{key}"] = (
            float(round(before))
            if kept > 0 and math.isfinite(before := _number(m.get(key)) / kept)
            else None
        )
    found = {
        row: {key: _number(m.get(start + key)) for key in _COLUMNS} for row, start in _ROWS.items()
    }
    return {
        row: {key: value for key, value in cells.items() if math.isfinite(value)}
        for row, cells in found.items()
    }


def _headline(
    metrics: Mapping[str, Any], rows: Mapping[str, Mapping[str, float]]
) -> list[tuple[str, str, str]]:
    """Heading, figure and remark of what a reader looks for first."""
    original, haloc, cards = rows["original"], rows["haloc"], []
    if "top1" in haloc:
        cards.append(
            (
                "top-1",
                percent(haloc["top1"], 2),
                f"original {percent(original['top1'], 2)}" if "top1" in original else "",
            )
        )
    if "latency_ms" in haloc:
        speedup = _number(metrics.get("speedup"))
        cards.append(
            (
                "latency",
                f"{haloc['latency_ms']:.4g} ms",
                f"{speedup:.2f} times as fast" if math.isfinite(speedup) else "",
            )
        )
    for key, name in (("macs", "MACs"), ("params", "parameters")):
        if key in haloc:
            less = _number(metrics.get(f"{key}_reduction"))
            cards.append(
                (
                    name,
                    _rounded(haloc[key]),
                    f"{percent(less)} fewer" if math.isfinite(less) else "",
                )
            )
    for row in ("pruned", "int8 in ONNX Runtime"):
        (name, _, where), cells = row.partition(" in "), rows[row]
        if "top1" in cells:
            remark = (
                f"{cells['latency_ms']:.4g} ms{where and f' in {where}'}"
                if "latency_ms" in cells
                else ""
            )
            cards.append((f"top-1, {name}", percent(cells["top1"], 2), remark))
    return cards


def _rounded(count: float) -> str:
    """With a letter for thousands, millions, ..."""
    for power, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= power:
            return f"{count / power:.4g}{letter}"
    return f"{count:.4g}"


def _table(rows: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Of stages: ``heads`` of those columns that any has, and ``rows`` of a name and cells."""
    heads = [key for key in _COLUMNS if any(key in row for row in rows.values())]
    cells = {
        name: [_cell(key, row[key]) if key in row else "" for key in heads]
        for name, row in rows.items()
        if row
    }
    return {"heads": [_COLUMNS[key] for key in heads], "rows": cells}


def _cell(key: str, value: float) -> str:
    if key in ("top1", "top5"):
        return percent(value, 2)
    if key == "bytes":
        return f"{value / 1000:,.1f} kB"
    return f"{value:,.0f}" if key in ("macs", "params") else f"{value:.4g}"


def _layers(plan: RankPlan, folder: Path) -> dict[str, Any]:
    """A row for each layer: name, chosen rank, candidates, cost dense and chosen, and the share that is left."""
    table = CostTable.load(folder / COSTS_FILE) if (folder / COSTS_FILE).is_file() else None
    rows = []
    for layer, rank in plan.ranks.items():
        name, costs = rank_name(rank), table.costs.get(layer, {}) if table else {}
        dense, chosen = costs.get("dense", math.nan), costs.get(name, math.nan)
        share = chosen / dense if math.isfinite(chosen) else math.nan
        shown = [
            f"{cost:,.4g}" if cost < 1e4 else f"{cost:,.0f}" if math.isfinite(cost) else ""
            for cost in (dense, chosen)
        ]
        rows.append(
            {
                "layer": layer,
                "rank": "dense"
                if rank is None
                else " x ".join(map(str, rank if len(set(rank)) > 1 else rank[:1])),
                "candidates": str(len(costs)) if costs else "",
                "costs": shown,
                "share": percent(share) if math.isfinite(share) else "",
                "bar": round(100 * min(1.0, share), 1) if math.isfinite(share) else None,
            }
        )
    return {"metric": table.metric if table else "", "rows": rows}


def _drawn(plan: RankPlan, folder: Path) -> dict[str, tuple[str, str]]:
    """Figures: name to caption and the image as an address."""
    drawn = {}
    with rc_context(
        {"text.parse_math": False, "svg.hashsalt": "haloc"}
    ):  # names of layers are no formulas; the same page each time
        names = {name: _plain(name, i) for i, name in enumerate(plan.ranks)}
        bars = figures.rank_bars(
            {"plan": {names[layer]: rank for layer, rank in plan.ranks.items()}}
        )
        drawn["ranks"] = "Rank of every layer", _image(bars)
        path = folder / SEARCH_FOLDER / history.HISTORY_FILE
        if path.is_file():
            columns = history.read(path)
            drawn["loss"] = (
                "Search: loss of the sampled networks",
                _image(figures.losses({"search": columns})),
            )
            drawn["parameters"] = (
                "Search: expected parameters",
                _image(figures.parameters({"search": columns})),
            )
        for name, caption in _TRAININGS.items():
            if (path := folder / name / history.HISTORY_FILE).is_file():
                columns = history.read(path, history.EPOCH_COLUMNS)
                drawn[name] = (
                    f"{caption}: loss, and top-1 on validation images",
                    _image(figures.finetuning(columns)),
                )
    return drawn


def _plain(name: str, number: int) -> str:
    """A layer's name for a figure: short, of characters that fonts and SVG have, and still its own."""
    plain = ascii(name)[1:-1]
    return plain if len(plain) <= 40 else f"{plain[:32]}...#{number}"


def _image(figure: Figure) -> str:
    out = BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return _data("image/svg+xml", out.getvalue())


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
