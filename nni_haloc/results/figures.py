"""Draw the paper's figures of one's own search: Figure 3, and the three parts of Figure 4."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

from nni_haloc.inputs.options import Decomposition
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
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot(xlabel="epoch", ylabel="training loss")
    (loss,) = axes.plot(
        columns["epoch"],
        columns["train_loss"],
        "o-",
        markersize=4,
        color="C0",
        label="training loss",
    )
    right = axes.twinx()
    right.set_ylabel("top-1, %")
    (top1,) = right.plot(
        columns["epoch"],
        100 * np.array(columns["val_top1"]),
        "s--",
        markersize=4,
        color="C1",
        label="top-1 (validation)",
    )
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)
    figure.legend(handles=[loss, top1], loc="outside upper center", ncols=2, fontsize=9)
    return figure


def rank_bars(plans: Mapping[str, Mapping[str, tuple[int, ...] | None]]) -> Figure:
    """Draw Figure 4c: the rank of every layer.

    Where any layer has two ranks, r1 stands in a panel above r2. Dense layers are marked as such.

    Args:
        plans: name of a plan to its ranks by layer; None is a dense layer.
    """
    layers = list(dict.fromkeys(layer for plan in plans.values() for layer in plan))
    ranks = [rank for plan in plans.values() for rank in plan.values() if rank]
    labels = ["rank (r1 = r2)"]
    if any(len(set(rank)) > 1 for rank in ranks):
        labels = ["rank r1 (output)", "rank r2 (input)"]
    width = min(100, max(6.4, 0.35 * len(layers) * max(1, len(plans) / 2)))
    height = 0.8 + 2.5 * len(labels) + 0.065 * max(map(len, layers), default=0)
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(len(labels), sharex=True, sharey=True, squeeze=False)[:, 0]
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
            heights = {places[layer]: rank[-side] for layer, rank in plan.items() if rank}
            axes.bar(list(heights), list(heights.values()), bar, **style)
            for layer, rank in plan.items():
                if not rank:
                    _mark_dense(axes, places[layer], bar)
    for axes, label in zip(panels, labels, strict=True):
        axes.set_ylabel(label)
        axes.yaxis.set_major_locator(MaxNLocator("auto", steps=(1, 2, 4, 8, 10), **_WHOLE))
    panels[-1].set_xticks(range(len(layers)), layers, rotation=90, fontsize=7)
    top = 1.05 * max(map(max, ranks), default=1)
    panels[-1].set(xlim=(-0.6, len(layers) - 0.4), ylim=(0, top))
    _legend(figure, list(plans), handles=handles)
    return figure


def _mark_dense(axes: Any, place: float, width: float) -> None:
    """Mark a layer that keeps its kernel by a pale bar over the whole height."""
    whole = axes.get_xaxis_transform()
    pale = {"facecolor": "0.95", "edgecolor": "0.5", "linestyle": ":", "linewidth": 0.8}
    axes.bar(place, 1, width, transform=whole, zorder=0, **pale)
    middle = {"ha": "center", "va": "center", "fontsize": 7}
    axes.text(place, 0.5, "dense", transform=whole, rotation=90, **middle)


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
