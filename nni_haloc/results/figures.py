"""Draw the paper's figures of one's own search: Figure 3, and the three parts of Figure 4."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

from nni_haloc.inputs.options import Decomposition
from nni_haloc.plan.by_hand import Candidate, LayerRow
from nni_haloc.space.tucker import decompose, reconstruct

Columns = Mapping[str, Sequence[float]]
"""The columns of a history; see `nni_haloc.training.curves`."""
Curve = tuple[NDArray[np.float64], NDArray[np.float64]]

_LINES = ("-", "--", ":", "-.")
MARKS = ("o", "s", "^", "x", "D")
_HATCHES = ("", "//", "..", "xx", "--", "\\\\", "++")
_WHOLE: dict[str, Any] = {"integer": True, "min_n_ticks": 1}


def losses(histories: Mapping[str, Columns], window: int | None = None) -> Figure:
    """Draw Figure 4a: the sampled networks' cross-entropy on training images.

    Args:
        histories: name of a search to its columns.
        window: iterations of the running mean (None: 25, or a quarter of the shortest history if
            that is less).
    """
    size = window or max(
        1, min(25, *(len(columns["iteration"]) // 4 for columns in histories.values()))
    )
    runs = {
        name: [_smooth(x, y, size) for x, y in _stretches(columns, "train_loss")]
        for name, columns in histories.items()
    }
    return _curves(
        runs, "training loss" if size == 1 else f"training loss (mean of {size} iterations)"
    )


def parameters(histories: Mapping[str, Columns]) -> Figure:
    """Draw Figure 4b: the expected number of parameters."""
    runs = {
        name: [(x, y / 1e3) for x, y in _stretches(columns, "expected_params")]
        for name, columns in histories.items()
    }
    return _curves(runs, "expected parameters, thousands")


def _stretches(columns: Columns, name: str) -> list[Curve]:
    """Return iterations and values of a column, cut where the history has a gap."""
    x, y = np.array(columns["iteration"]), np.array(columns[name])
    cuts = np.flatnonzero(np.diff(x) != 1) + 1
    return list(zip(np.split(x, cuts), np.split(y, cuts), strict=True))


def _smooth(x: NDArray[np.float64], y: NDArray[np.float64], window: int) -> Curve:
    size = min(window, len(y))
    return x[size - 1 :], np.convolve(y, np.ones(size) / size, mode="valid")


def _curves(runs: Mapping[str, Sequence[Curve]], label: str) -> Figure:
    """Draw a line for each run, with dashes and marks of its own; a mark shows a single point."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot(xlabel="iteration", ylabel=label)
    for i, (name, stretches) in enumerate(runs.items()):
        style: dict[str, Any] = {
            "color": f"C{i}",
            "linestyle": _LINES[i % len(_LINES)],
            "marker": MARKS[i % len(MARKS)],
            "markersize": 4,
        }
        for j, (x, y) in enumerate(stretches):
            axes.plot(x, y, **style, markevery=max(1, len(x) // 10), label=None if j else name)
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=(1, 2, 5, 10), **_WHOLE))
    axes.grid(alpha=0.3)
    _legend(figure, list(runs))
    return figure


def finetuning(columns: Mapping[str, Sequence[float]]) -> Figure:
    """Draw loss and validation accuracy of a fine-tuning by epoch; epoch 0 is before it."""
    top1 = 100 * np.array(columns["val_top1"])
    loss = "training loss", columns["train_loss"]
    return _by_epoch(columns["epoch"], loss, ("top-1 (validation)", top1))


def searching(curve: Sequence[Mapping[str, float]]) -> Figure:
    """Draw a search by epoch: the expected cost, and top-1 of the sampled networks.

    Args:
        curve: figures of each epoch, see `nni_haloc.search.history.epoch_figures`.
    """
    cost, top1 = (
        [100 * point.get(key, math.nan) for point in curve] for key in ("expected_cost", "top1")
    )
    figure = _by_epoch(
        [point["epoch"] for point in curve],
        ("expected cost, % of the original's", cost),
        ("top-1 of sampled networks", top1),
    )
    highest = max((value for value in cost if math.isfinite(value)), default=100.0)
    figure.axes[0].set_ylim(0, 1.1 * max(highest, 1e-9))
    return figure


def _by_epoch(
    epochs: Sequence[float],
    left: tuple[str, Sequence[float]],
    top1: tuple[str, Sequence[float] | NDArray[np.float64]],
) -> Figure:
    """Draw a figure by epoch on the left axis, and accuracies in per cent on the right one."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot(xlabel="epoch", ylabel=left[0])
    first = axes.plot(epochs, left[1], "o-", markersize=4, color="C0", label=left[0])
    right = axes.twinx()
    right.set_ylabel("top-1, %")
    second = right.plot(epochs, top1[1], "s--", markersize=4, color="C1", label=top1[0])
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)
    figure.legend(handles=[*first, *second], loc="outside upper center", ncols=2, fontsize=9)
    return figure


def rank_bars(plans: Mapping[str, Mapping[str, tuple[int, ...] | None]]) -> Figure:
    """Draw Figure 4c: the rank of every layer, in a row of its own.

    Where any layer has two ranks, r1 stands in a panel beside r2. Dense layers are marked as such.

    Args:
        plans: name of a plan to its ranks by layer; None is a dense layer.
    """
    layers = list(dict.fromkeys(layer for plan in plans.values() for layer in plan))
    ranks = [rank for plan in plans.values() for rank in plan.values() if rank]
    labels = ["rank (r1 = r2)"]
    if any(len(set(rank)) > 1 for rank in ranks):
        labels = ["rank r1 (output)", "rank r2 (input)"]
    figure, panels = _rows(layers, len(labels), max(1, len(plans) / 2))
    bar, handles = 0.8 / len(plans), []
    for i, (name, plan) in enumerate(plans.items()):
        style: dict[str, Any] = {
            "facecolor": f"C{i}",
            "hatch": _HATCHES[i % len(_HATCHES)],
            "edgecolor": "black",
            "linewidth": 0.5,
        }
        handles.append(Patch(label=name, **style))
        places = {layer: layers.index(layer) + (i + 0.5) * bar - 0.4 for layer in plan}
        for side, axes in enumerate(panels):
            lengths = {places[layer]: rank[-side] for layer, rank in plan.items() if rank}
            bars = axes.barh(list(lengths), list(lengths.values()), bar, **style)
            axes.bar_label(bars, padding=2, fontsize=7)
            for layer, rank in plan.items():
                if not rank:
                    _mark_dense(axes, places[layer], bar)
    right = 1.12 * max(map(max, ranks), default=1)
    for axes, label in zip(panels, labels, strict=True):
        axes.set(xlabel=label, xlim=(0, right))
        axes.xaxis.set_major_locator(MaxNLocator("auto", steps=(1, 2, 4, 8, 10), **_WHOLE))
    _legend(figure, list(plans), handles=handles)
    return figure


_ROW = 0.21
"""Inches of a row: a label of 8 points, and some air."""


def _rows(layers: Sequence[str], panels: int, share: float = 1.0) -> tuple[Figure, list[Axes]]:
    """Make panels side by side that share a row for each layer, the first one on top.

    Args:
        layers: names of the rows.
        panels: how many.
        share: how much higher than a line of text a row is.
    """
    names = 0.07 * max(map(len, layers), default=0)
    size = 3.4 + names + 2.4 * panels, min(200, 1.1 + _ROW * share * max(2, len(layers)))
    figure = Figure(figsize=size, layout="constrained")
    found = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    found[0].set_yticks(range(len(layers)), layers, fontsize=8)
    found[0].set_ylim(len(layers) - 0.4, -0.6)
    return figure, list(found)


def _mark_dense(axes: Axes, place: float, height: float) -> None:
    """Mark a layer that keeps its kernel by a pale bar over the whole width."""
    whole = axes.get_yaxis_transform()
    pale: dict[str, Any] = {"facecolor": "0.95", "edgecolor": "0.5", "linestyle": ":"}
    axes.barh(place, 1, height, transform=whole, zorder=0, linewidth=0.8, **pale)
    middle: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7}
    axes.text(0.5, place, "dense", transform=whole, **middle)


def plan_rows(rows: Sequence[LayerRow], metric: str) -> Figure:
    """Draw a plan: each layer's cost, dense and chosen, and how far it moves the outputs.

    Args:
        rows: the plan's layers; those that are left alone are not drawn.
        metric: what the costs are in; empty where there are none.
    """
    rows = [row for row in rows if not row.left_alone]
    measured = any(row.chosen.sensitivity is not None for row in rows)
    figure, panels = _rows([row.layer for row in rows], 1 + measured)
    places = range(len(rows))
    whole = [row.dense.cost or 0.0 for row in rows]
    costs = [row.chosen.cost or 0.0 for row in rows]
    panels[0].barh(places, whole, 0.8, facecolor="0.88", edgecolor="0.5", linewidth=0.5)
    panels[0].barh(places, costs, 0.8, facecolor="C0", edgecolor="black", linewidth=0.5)
    right = max([*whole, *costs, 1e-12])
    for place, row, *ends in zip(places, rows, whole, costs, strict=True):
        panels[0].text(max(ends) + 0.01 * right, place, row.chosen.name, va="center", fontsize=7)
    panels[0].set(xlabel=f"cost in {metric}: dense (pale), chosen", xlim=(0, 1.18 * right))
    panels[0].xaxis.set_major_locator(MaxNLocator(5))
    if right >= 1e4:
        panels[0].xaxis.set_major_formatter(EngFormatter())
    if measured:
        _draw_sensitivities(panels[1], rows)
        handles, _ = panels[1].get_legend_handles_labels()
        figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=8)
    return figure


def _draw_sensitivities(axes: Axes, rows: Sequence[LayerRow]) -> None:
    """Draw the sensitivity of each layer's candidate and of its neighbours, on a log scale.

    Nothing at all is at the left edge.
    """
    columns: list[tuple[str, str, str, list[Candidate | None]]] = [
        ("next cheaper", "<", "C3", [row.cheaper for row in rows]),
        ("chosen", "o", "C0", [row.chosen for row in rows]),
        ("next dearer", ">", "C2", [row.dearer for row in rows]),
    ]
    spots = {
        name: [
            (each.sensitivity, place)
            for place, each in enumerate(column)
            if each is not None and each.sensitivity is not None
        ]
        for name, _, _, column in columns
    }
    known = [value for row in spots.values() for value, _ in row if value > 0]
    left = min(known, default=0.1) / 3
    for name, mark, colour, _ in columns:
        x = [max(value, left) for value, _ in spots[name]]
        y = [place for _, place in spots[name]]
        axes.plot(x, y, mark, color=colour, markersize=4, label=name, clip_on=False)
    axes.set(xscale="log", xlabel="sensitivity (nothing: left edge)")
    axes.set_xlim(left=left, right=2 * max(known, default=1.0))
    # Its own labels are formulas, which are switched off where names might be taken for some.
    axes.xaxis.set_major_locator(LogLocator(numticks=6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(alpha=0.3)


def _legend(figure: Figure, names: Sequence[str], **options: Any) -> None:
    """Put a legend above the axes, where it hides nothing; none for a single run."""
    if len(names) > 1:
        fit = figure.get_figwidth() / (0.7 + 0.075 * max(map(len, names)))
        columns = max(1, min(len(names), 3, int(fit)))
        figure.legend(loc="outside upper center", ncols=columns, fontsize=9, **options)


def discrepancy(
    weight: Tensor, shares: Sequence[float] = (0.1, 0.2, 0.4), points: int = 17
) -> dict[float, NDArray[np.float64]]:
    """Compute Figure 3: the error of a kernel over the difference of its two ranks.

    Args:
        weight: the kernel, ``(F, C, k1, k2)``.
        shares: shares of the kernel's parameters that pairs of ranks may have.
        points: values of r2, over the range that a share allows.

    Returns:
        Share to rows ``(r1, r2, relative error)``.
    """
    f, c, k = weight.shape[0], weight.shape[1], math.prod(weight.shape[2:])
    method: Decomposition = "hooi" if max(f, c) <= 128 else "warm_hooi"
    curves = {}
    for share in shares:
        total = share * f * c * k
        inputs = {round(r) for r in np.geomspace(1, c, points)} | {_equal_rank(total, f, c, k)}
        pairs = [(round((total - c * r2) / (k * r2 + f)), r2) for r2 in sorted(inputs)]
        # A core (r1, r2, k1, k2) has no more rank than r1 <= k r2 and r2 <= k r1.
        pairs = [(r1, r2) for r1, r2 in pairs if 1 <= r1 <= min(f, k * r2) and r2 <= min(c, k * r1)]
        factors = decompose(weight, pairs, method, None)
        errors = [float((reconstruct(x) - weight).norm() / weight.norm()) for x in factors]
        rows = [(*pair, error) for pair, error in zip(pairs, errors, strict=True)]
        curves[share] = np.array(rows).reshape(-1, 3)
    return curves


def _equal_rank(total: float, f: int, c: int, k: int) -> int:
    """Return the rank r1 = r2 that a kernel has with so many parameters."""
    return max(1, round((-(f + c) + math.sqrt((f + c) ** 2 + 4 * k * total)) / (2 * k)))
