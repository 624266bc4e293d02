"""The trials of an experiment that no other trial beats: accuracy against cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from nni_haloc.utils.errors import SettingsError
from nni_haloc.utils.files import is_number, whole

_LABELS = {"latency_ms": "measured latency", "macs": "MACs", "params": "parameters"}
COSTS = tuple(_LABELS)
"""Figures of a trial that a front may be drawn over."""
STAGES = ("pruned_", "")
"""What the figures of a trial's stages begin with, the last stage first."""


class Point(NamedTuple):
    """Hold one trial's place in the picture.

    Attributes:
        trial: its id.
        share: its cost as a fraction of the original's. Both are of the same trial: latencies of
            two trials were measured at different times, and do not compare.
        top1: its accuracy, from 0 to 1.
        original: the original network's accuracy in the same trial.
        on_front: whether no other trial is at least as accurate at a lower cost, or more accurate
            at the same cost.
        parameters: what the tuner set.
    """

    trial: str
    share: float
    top1: float
    original: float
    on_front: bool
    parameters: dict[str, Any]


def front_of(rows: Iterable[Mapping[str, Any]], cost: str = "latency_ms") -> list[Point]:
    """Place the finished trials by cost and accuracy, and find the front.

    Args:
        rows: trials with their final figures, as `trial_results` returns them.
        cost: ``latency_ms``, ``macs`` or ``params``.

    Returns:
        The trials, the cheapest first. A trial without both figures is left out.

    Raises:
        SettingsError: if no trial has both.
    """
    rows = list(rows)
    places = [found for row in rows if (found := _place(row, cost))]
    if not places:
        known = sorted({name for row in rows for name in COSTS if _place(row, name)})
        remedy = f"; there is {', '.join(known)}" if known else ""
        raise SettingsError(f"--by: no finished trial has top1 and {cost}{remedy}")
    points = []
    for row, share, top1 in places:
        beaten = any(
            (other_share <= share and other_top1 > top1)
            or (other_share < share and other_top1 >= top1)
            for _, other_share, other_top1 in places
        )
        original = float(row.get("original_top1", "nan"))
        points.append(Point(row["trial"], share, top1, original, not beaten, _tuned(row)))
    return sorted(points, key=lambda point: (point.share, -point.top1))


def _place(row: Mapping[str, Any], cost: str) -> tuple[Mapping[str, Any], float, float] | None:
    """Return a trial, its share of the original's cost, and its accuracy, of its last stage."""
    for stage in STAGES:
        values = [row.get(f"{stage}{cost}"), row.get(f"{stage}top1"), row.get(f"original_{cost}")]
        numbers = [float(value) for value in values if value is not None and is_number(value)]
        if len(numbers) == 3 and numbers[2] > 0:
            return row, numbers[0] / numbers[2], numbers[1]
    return None


def _tuned(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the tuner set: it stands between a trial's status and its first figure."""
    keys = list(row)
    return {key: row[key] for key in keys[2 : keys.index("default")]} if "default" in keys else {}


def draw_front(points: Sequence[Point], cost: str, file: str | Path, title: str = "") -> None:
    """Draw accuracy over cost: every trial, the front, and the original network.

    Args:
        points: what `front_of` returned.
        cost: its ``cost``.
        file: the picture's name; its suffix says the format. With ``.html`` it is a page that has
            the picture and a table of all trials, and loads nothing from elsewhere.
        title: of the page.

    Raises:
        SettingsError: if the suffix is no format of pictures.
    """
    kind = Path(file).suffix[1:].lower()
    figure = _figure(points, cost)
    if kind not in {"html", *figure.canvas.get_supported_filetypes()}:
        expected = "expected a picture such as front.png or front.svg, or a page such as front.html"
        raise SettingsError(f"{file}: {expected}")
    with whole(Path(file)) as part:
        if kind == "html":
            part.write_text(_page(points, cost, figure, title), encoding="utf-8")
        else:
            figure.savefig(part, dpi=150, format=kind)


def tuned_keys(points: Iterable[Point]) -> list[str]:
    """Return the keys that the tuner set in any of some trials, in their order."""
    return list(dict.fromkeys(key for point in points for key in point.parameters))


def _page(points: Sequence[Point], cost: str, figure: Any, title: str) -> str:
    from nni_haloc.results.pages import drawing, page  # slow to import

    return page(
        "front.html",
        title=title or "Front",
        picture=drawing(figure),
        cost=_LABELS[cost],
        points=points,
        tuned=tuned_keys(points),
    )


def _figure(points: Sequence[Point], cost: str) -> Any:
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    label = f"{_LABELS[cost]}, % of the original's"
    axes = figure.add_subplot(xlabel=label, ylabel="top-1, %")
    best = [point for point in points if point.on_front]
    beaten = [point for point in points if not point.on_front]
    if beaten:
        axes.plot(*_places(beaten), "o", color="0.6", label="other trials")
    axes.plot(*_places(best), "o-", color="C0", label="best trials")
    axes.plot([100], [100 * median(p.original for p in points)], "k*", ms=12, label="original")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def _places(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [100 * point.share for point in points], [100 * point.top1 for point in points]
