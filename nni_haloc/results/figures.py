"""The paper's figures of a search, of one's own network: Figure 3, and the three parts of Figure 4."""

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

from nni_haloc.space.tucker import decompose, reconstruct

Columns = Mapping[str, Sequence[float]]
"""Of a history: see `history.COLUMNS`."""
Curve = tuple[NDArray[np.float64], NDArray[np.float64]]

_LINES = ("-", "--", ":", "-.")
MARKS = ("o", "s", "^", "x", "D")
_HATCHES = ("", "//", "..", "xx", "--", "\\\\", "++")
_WHOLE: dict[str, Any] = {"integer": True, "min_n_ticks": 1}


def losses(histories: Mapping[str, Columns], window: int | None = None) -> Figure:
    """Figure 4a: the sampled networks' cross-entropy on training images, a running mean over ``window`` iterations.

    By default over 25, or a quarter of the shortest history where that is less.
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
    """Figure 4b: the expected number of parameters."""
    runs = {
        name: [(x, y / 1e3) for x, y in _stretches(columns, "expected_params")]
        for name, columns in histories.items()
    }
    return _curves(runs, "expected parameters, thousands")


def _stretches(columns: Columns, name: str) -> list[Curve]:
    """Iterations and values of a column, cut where a history has a gap."""
    x, y = np.array(columns["iteration"]), np.array(columns[name])
    cuts = np.flatnonzero(np.diff(x) != 1) + 1
    return list(zip(np.split(x, cuts), np.split(y, cuts), strict=True))


def _smooth(x: NDArray[np.float64], y: NDArray[np.float64], window: int) -> Curve:
    size = min(window, len(y))
    return x[size - 1 :], np.convolve(y, np.ones(size) / size, mode="valid")


def _curves(runs: Mapping[str, Sequence[Curve]], label: str) -> Figure:
    """A line for each run, told from the others by its dashes and by some marks, which also show a single point."""
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
    """Loss, and accuracy on validation images, after each epoch of a fine-tuning; the accuracy before it at epoch 0."""
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
    """Figure 4c: the rank of every layer, the layers as they were marked; r1 above r2 where any differ. Dense layers are said to be."""
    layers = list(dict.fromkeys(layer for plan in plans.values() for layer in plan))
    ranks = [rank for plan in plans.values() for rank in plan.values() if rank]
    labels = (
        ("rank r1 (output)", "rank r2 (input)")
        if any(len(set(rank)) > 1 for rank in ranks)
        else ("rank (r1 = r2)",)
    )
    names = max(map(len, layers), default=0)
    size = (
        min(100, max(6.4, 0.35 * len(layers) * max(1, len(plans) / 2))),
        0.8 + 2.5 * len(labels) + 0.065 * names,
    )
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(labels), sharex=True, sharey=True, squeeze=False)[:, 0]
    width, handles = 0.8 / len(plans), []
    for i, (name, plan) in enumerate(plans.items()):
        style: dict[str, Any] = {
            "facecolor": f"C{i}",
            "hatch": _HATCHES[i % len(_HATCHES)],
            "edgecolor": "black",
            "linewidth": 0.5,
        }
        handles.append(Patch(label=name, **style))
        places = {layer: layers.index(layer) + (i + 0.5) * width - 0.4 for layer in plan}
        for side, axes in enumerate(panels):
            axes.bar(
                [places[layer] for layer, rank in plan.items() if rank],
                [r[-1 if side else 0] for r in plan.values() if r],
                width,
                **style,
            )
            for place in (places[layer] for layer, rank in plan.items() if not rank):
                whole = (
                    axes.get_xaxis_transform()
                )  # from the bottom of the figure to its top: no rank
                axes.bar(
                    place,
                    1,
                    width,
                    transform=whole,
                    facecolor="0.95",
                    edgecolor="0.5",
                    linestyle=":",
                    linewidth=0.8,
                    zorder=0,
                )
                axes.text(
                    place,
                    0.5,
                    "dense",
                    transform=whole,
                    rotation=90,
                    ha="center",
                    va="center",
                    fontsize=7,
                )
    for axes, label in zip(panels, labels, strict=True):
        axes.set_ylabel(label)
        axes.yaxis.set_major_locator(MaxNLocator("auto", steps=(1, 2, 4, 8, 10), **_WHOLE))
    panels[-1].set_xticks(range(len(layers)), layers, rotation=90, fontsize=7)
    panels[-1].set(xlim=(-0.6, len(layers) - 0.4), ylim=(0, 1.05 * max(map(max, ranks), default=1)))
    _legend(figure, list(plans), handles=handles)
    return figure


def _legend(figure: Figure, names: Sequence[str], **options: Any) -> None:
    """Above the axes, where it hides nothing; none for one run."""
    if len(names) > 1:
        fit = figure.get_figwidth() / (0.7 + 0.075 * max(map(len, names)))
        figure.legend(
            loc="outside upper center",
            ncols=max(1, min(len(names), 3, int(fit))),
            fontsize=9,
            **options,
        )


def discrepancy(
    weight: Tensor, shares: Sequence[float] = (0.1, 0.2, 0.4), points: int = 17
) -> dict[float, NDArray[np.float64]]:
    """Figure 3: of each share of a kernel's parameters ``(F, C, k1, k2)``, pairs of ranks that have it, and what they leave.

    Rows ``(r1, r2, relative error)``; r2 over the range that the share allows.
    """
    f, c, k = weight.shape[0], weight.shape[1], math.prod(weight.shape[2:])
    found = {}
    for share in shares:
        total = share * f * c * k
        pairs = []
        for r2 in sorted({round(r) for r in np.geomspace(1, c, points)} | {_equal(total, f, c, k)}):
            r1 = round((total - c * r2) / (k * r2 + f))
            if 1 <= r1 <= min(f, k * r2) and r2 <= min(
                c, k * r1
            ):  # a core has no more rank than that
                pairs.append((r1, r2))
        factors = decompose(weight, pairs, "hooi" if max(f, c) <= 128 else "warm_hooi", None)
        errors = [float((reconstruct(x) - weight).norm() / weight.norm()) for x in factors]
        found[share] = np.array(
            [(*pair, error) for pair, error in zip(pairs, errors, strict=True)]
        ).reshape(-1, 3)
    return found


def _equal(total: float, f: int, c: int, k: int) -> int:
    """The rank that r1 = r2 has within so many parameters."""
    return max(1, round((-(f + c) + math.sqrt((f + c) ** 2 + 4 * k * total)) / (2 * k)))
