"""The table at the end of a run: the original network, the compressed one, and the change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import typer

from nni_haloc.utils.printing import percent, print_table

Figures = Mapping[str, float]

HEADINGS = {"finetune": "compressed", "prune": "pruned", "quantize": "quantized"}
"""Columns of stages, by the stages' names; others have their own name."""

ROWS: dict[str, tuple[str, Callable[[float], str]]] = {
    "top1": ("top-1", lambda share: percent(share, 2)),
    "top5": ("top-5", lambda share: percent(share, 2)),
    "latency_ms": ("latency", "{:.4g} ms".format),
    "macs": ("MACs", lambda count: short(count)),
    "params": ("parameters", lambda count: short(count)),
    "bytes": ("weights' file", lambda count: f"{short(count)}B"),
}
"""Rows of the table: a figure's name, its heading, and how it is written."""
ACCURACIES = ("top1", "top5")


def print_summary(folder: Path, stages: Mapping[str, Figures]) -> None:
    """Print a run's result, its folder and what to do next.

    Args:
        folder: the run's folder.
        stages: names of stages, the first one ``original``, to their figures: ``top1``, ``top5``
            (0 to 1), ``latency_ms``, ``macs``, ``params``, ``bytes``; any may be missing.
    """
    columns, rows = summary(stages)
    if rows:
        print_table("", columns, rows, text={columns[0]})
    typer.echo(f"results: {folder}")
    typer.echo(f"next:    haloc report {folder}   one HTML page on the run")
    typer.echo(f"         haloc bench {folder}    every stage timed, in torch and ONNX Runtime")


def summary(stages: Mapping[str, Figures]) -> tuple[list[str], list[list[str]]]:
    """Return the headings and the rows of the table; the change is from the first to the last."""
    shown = {
        HEADINGS.get(name, name): figures
        for name, figures in stages.items()
        if any(key in figures for key in ROWS)
    }
    rows = []
    for key, (heading, text) in ROWS.items():
        values = [figures.get(key) for figures in shown.values()]
        if any(value is not None for value in values):
            cells = ["" if value is None else text(value) for value in values]
            rows.append([heading, *cells, *([_change(key, values)] if len(values) > 1 else [])])
    return ["", *shown, *(["change"] if len(shown) > 1 else [])], rows


def _change(key: str, values: list[float | None]) -> str:
    """Return the change of one figure from the first network to the last: points or percent."""
    first, last = values[0], values[-1]
    if first is None or last is None:
        return ""
    if key in ACCURACIES:
        return f"{100 * (last - first):+.2f} points"
    return f"{100 * (last / first - 1):+.1f} %" if first else ""


def short(count: float) -> str:
    """Write a count with three or four digits and its thousands: ``1.494 M``, ``85.2 k``."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count:.4g} "
