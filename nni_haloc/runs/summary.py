"""The table at the end of a run: the original network, the compressed one, and the change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


def summary(networks: Mapping[str, Figures]) -> tuple[list[str], list[list[str]]]:
    """Return the headings and the rows of the table.

    Args:
        networks: titles of networks to their figures. The first is the original, the second the
            compressed network, followed by a column with the change.
    """
    shown = {title: row for title, row in networks.items() if any(key in row for key in ROWS)}
    changed = len(shown) > 1
    headings = ["", *shown]
    if changed:
        headings.insert(3, "change")
    rows = []
    for key, (heading, text) in ROWS.items():
        values = [row.get(key) for row in shown.values()]
        if all(value is None for value in values):
            continue
        cells = [heading, *("" if value is None else text(value) for value in values)]
        if changed:
            cells.insert(3, _change(key, values[0], values[1]))
        rows.append(cells)
    return headings, rows


def summary_line(figures: Figures) -> str:
    """Return a network's figures on one line: ``top-1 96.94 %, latency 3.536 ms, ...``."""
    known = {key: figures[key] for key in ROWS if key in figures}
    return ", ".join(f"{ROWS[key][0]} {ROWS[key][1](value)}" for key, value in known.items())


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


def _change(key: str, first: float | None, last: float | None) -> str:
    """Return how a figure changed: in points or in percent."""
    if first is None or last is None:
        return ""
    if key in ACCURACIES:
        return f"{100 * (last - first):+.2f} points"
    return f"{100 * (last / first - 1):+.1f} %" if first else ""
