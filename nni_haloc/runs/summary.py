"""The table at the end of a run: the original network, the compressed one, and the change."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from nni_haloc.runs.folder import Figures
from nni_haloc.utils.printing import percent, short, text_table

ROWS: dict[str, tuple[str, Callable[[float], str]]] = {
    "top1": ("top-1", lambda share: percent(share, 2)),
    "top5": ("top-5", lambda share: percent(share, 2)),
    "test_top1": ("top-1, test images", lambda share: percent(share, 2)),
    "test_top5": ("top-5, test images", lambda share: percent(share, 2)),
    "latency_ms": ("latency", "{:.4g} ms".format),
    "macs": ("MACs", short),
    "params": ("parameters", short),
    "bytes": ("file of weights", lambda count: short(count, "B")),
    "measured_share": ("latency, of the original", percent),
    "latency_ms_of_budget": ("latency, of the budget", percent),
    "energy_mj_of_budget": ("energy, of the budget", percent),
    "budget_met": ("budget met", lambda met: "yes" if met else "no"),
}
"""Rows of the table: a figure's name, its heading, and how it is written."""
ACCURACIES = ("top1", "top5", "test_top1", "test_top5")


def summary(
    networks: Mapping[str, Figures], without_change: Collection[str] = ()
) -> tuple[list[str], list[list[str]]]:
    """Return the headings and the rows of the table.

    Args:
        networks: titles of networks to their figures. The first is the original; each other one is
            followed by a column with the change from it. The latency of the second network was
            timed in turn with that of the first column; that of a later one changes by its own
            ``speedup``, if it has one.
        without_change: titles of networks that no such column follows.
    """
    shown = {title: row for title, row in networks.items() if any(key in row for key in ROWS)}
    first = next(iter(shown.values()), {})
    headings = [""]
    for number, title in enumerate(shown):
        headings += [title, "change"] if number and title not in without_change else [title]
    rows = []
    for key, (_, text) in ROWS.items():
        if all(row.get(key) is None for row in shown.values()):
            continue
        cells = [_heading(key, first)]
        for number, (title, row) in enumerate(shown.items()):
            value = row.get(key)
            cells.append("" if value is None else text(value))
            if number and title not in without_change:
                known = first.get(key)
                if key == "latency_ms" and number > 1:  # not timed beside the first column's
                    known = value * row["speedup"] if value and "speedup" in row else None
                cells.append(_change(key, known, value))
        rows.append(cells)
    return headings, rows


def summary_line(figures: Figures) -> str:
    """Return a network's figures on one line: ``top-1 96.94 %, latency 3.536 ms, ...``."""
    parts = []
    for key, (_, text) in ROWS.items():
        if key in figures:
            name, _, images = _heading(key, figures).partition(", ")
            of = f" ({images})" if images and key in ACCURACIES else ""
            name = name if of or not images else f"{name} {images}"
            parts.append(f"{name} {text(figures[key])}{of}")
    return ", ".join(parts)


def cost_line(facts: Mapping[str, Any]) -> str:
    """Return what a plan costs: ``441 k of 1.494 M macs (29.5 %), budget 448.1 k``.

    Args:
        facts: ``cost``, ``original_cost``, ``metric`` and ``budget``, as in ``ranks.json``.
    """
    cost, original = facts["cost"], facts["original_cost"]
    share = percent(cost / original)
    return (
        f"{short(cost)} of {short(original)} {facts['metric']} ({share}), "
        f"budget {short(facts['budget'])}"
    )


def summary_text(networks: Mapping[str, Figures]) -> str:
    """Return the table as plain text."""
    headings, rows = summary(networks)
    return text_table(headings, rows)


def _heading(key: str, figures: Figures) -> str:
    """Return the heading of a figure; beside those of test images, accuracies name their own."""
    if key in ("top1", "top5") and f"test_{key}" in figures:
        number = f"{figures['images']:.0f} " if "images" in figures else ""
        return f"{ROWS[key][0]}, {number}validation images"
    return ROWS[key][0]


def _change(key: str, first: float | None, last: float | None) -> str:
    """Return how a figure changed: in points or in percent."""
    if first is None or last is None:
        return ""
    if key in ACCURACIES:
        return f"{100 * (last - first):+.2f} points"
    return f"{100 * (last / first - 1):+.1f} %" if first else ""
