"""The table at the end of a run: the original network, the compressed one, and the change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import typer

from nni_haloc.runs.stages import all_stages
from nni_haloc.utils.printing import percent, print_table

Figures = Mapping[str, float]

ROWS: dict[str, tuple[str, Callable[[float], str]]] = {
    "top1": ("top-1", lambda share: percent(share, 2)),
    "top5": ("top-5", lambda share: percent(share, 2)),
    "latency_ms": ("latency", "{:.4g} ms".format),
    "macs": ("MACs", lambda count: short(count)),
    "params": ("parameters", lambda count: short(count)),
    "bytes": ("file of weights", lambda count: short(count, "B")),
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
    print_next(
        folder,
        {
            f"haloc report {folder}": "one HTML page on the run",
            f"haloc bench {folder}": "every stage timed, in torch and ONNX Runtime",
        },
    )


def print_next(folder: Path, commands: Mapping[str, str]) -> None:
    """Print where the results are, and the commands that may follow.

    Args:
        folder: the folder of the results.
        commands: command lines to what they do.
    """
    typer.echo(f"results: {folder}")
    width = max(map(len, commands))
    for number, (command, text) in enumerate(commands.items()):
        typer.echo(f"{'' if number else 'next:':9}{command:{width}}   {text}")


def summary(stages: Mapping[str, Figures]) -> tuple[list[str], list[list[str]]]:
    """Return the headings and the rows of the table; the change is from the first to the last."""
    titles = {stage.name: stage.title for stage in all_stages()}
    shown = {
        titles.get(name) or name: figures
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


def short(count: float, unit: str = "") -> str:
    """Write a count with four digits and its thousands: ``1.494 M``, ``85.2 kB``."""
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.4g} {prefix}{unit}"
    return f"{count:.4g} {unit}".rstrip()
