"""The paper's figures of a search, of one's own network: Figure 3, and the three parts of Figure 4."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn

from . import history
from .compression import RANKS_FILE
from .job import SEARCH_FOLDER
from .layers import LayerSpec
from .measure import Parser
from .models import build_model
from .ranks import RankPlan
from .tucker import decompose, reconstruct
from .yaml_files import ConfigError

_LINES = ("-", "--", ":", "-.")
_MARKS = ("o", "s", "^", "x")


def plot_main(arguments: Sequence[str] | None = None) -> None:
    """Draw a finished search, or what the difference of a layer's two ranks does to its error."""
    parser = Parser("haloc plot", "Draw a search: loss, parameters and ranks (Figure 4); or a layer's error over r1 - r2 (Figure 3).")
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="of searches or runs; several share the figures")
    parser.add_argument("--out", type=Path, help="folder for the figures, PNG and SVG (default: the first one)")
    parser.add_argument("--layer", help="draw Figure 3 of this convolution of --model")
    parser.add_argument("--model", help="resnet20, torchvision:resnet18, ...; with --weights")
    parser.add_argument("--weights", type=Path, help="the trained weights")
    options = parser.parse_args(arguments)
    if (options.layer is None) == (not options.folders):
        raise ValueError("expected folders of searches, or --layer with --model and --weights")
    if options.layer is not None:
        _draw_layer(options.model, options.weights, options.layer, options.out or Path())
        return
    out = options.out or options.folders[0]
    names = _names(options.folders)
    histories = {name: history.read(folder / SEARCH_FOLDER / history.HISTORY_FILE) for name, folder in names.items()}
    plans = {name: RankPlan.load(folder / RANKS_FILE) for name, folder in names.items()}
    _save(losses({name: columns["train_loss"] for name, columns in histories.items()}), out / "loss")
    _save(parameters({name: columns["expected_params"] for name, columns in histories.items()}), out / "parameters")
    _save(rank_bars({name: plan.ranks for name, plan in plans.items()}), out / "ranks")


def losses(runs: Mapping[str, Sequence[float]], window: int = 25) -> Figure:
    """Figure 4a: the sampled networks' cross-entropy on training images, a running mean over ``window`` iterations."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot(xlabel="iteration", ylabel=f"training loss (mean of {window} iterations)")
    for (name, values), line in zip(runs.items(), _cycled(_LINES, len(runs)), strict=True):
        size = min(window, len(values))
        smooth = np.convolve(values, np.ones(size) / size, mode="valid")
        axes.plot(np.arange(size, len(values) + 1), smooth, line, label=name)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def parameters(runs: Mapping[str, Sequence[float]]) -> Figure:
    """Figure 4b: the expected number of parameters."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot(xlabel="iteration", ylabel="expected parameters, thousands")
    for (name, values), line in zip(runs.items(), _cycled(_LINES, len(runs)), strict=True):
        axes.plot(np.arange(1, len(values) + 1), np.array(values) / 1e3, line, label=name)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def rank_bars(plans: Mapping[str, Mapping[str, tuple[int, ...] | None]]) -> Figure:
    """Figure 4c: the rank of every layer (r1 where there are two), the layers as they were marked."""
    layers = list(dict.fromkeys(layer for plan in plans.values() for layer in plan))
    highest = max((rank[0] for plan in plans.values() for rank in plan.values() if rank), default=1)
    figure = Figure(figsize=(max(6.4, 0.35 * len(layers) * max(1, len(plans) / 2)), 4.2), layout="constrained")
    axes = figure.add_subplot(ylabel="rank r1")
    width = 0.8 / len(plans)
    for i, (name, plan) in enumerate(plans.items()):
        places = [layers.index(layer) + (i + 0.5) * width - 0.4 for layer in plan]
        heights = [rank[0] if rank else 0 for rank in plan.values()]
        axes.bar(places, heights, width, label=name, hatch=("", "//", "..", "xx")[i % 4], edgecolor="black", linewidth=0.5)
        for place, rank in zip(places, plan.values(), strict=True):
            if rank is None:
                axes.annotate("dense", (place, highest / 100), rotation=90, ha="center", va="bottom", fontsize=7)
    axes.set_xticks(range(len(layers)), layers, rotation=90, fontsize=7)
    axes.set_ylim(0, 1.1 * highest)
    if len(plans) > 1:
        axes.legend()
    return figure


def discrepancy(weight: Tensor, shares: Sequence[float] = (0.1, 0.2, 0.4), points: int = 17) -> dict[float, NDArray[np.float64]]:
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
            if 1 <= r1 <= min(f, k * r2) and r2 <= min(c, k * r1):  # a core has no more rank than that
                pairs.append((r1, r2))
        factors = decompose(weight, pairs, "hooi" if max(f, c) <= 128 else "warm_hooi", None)
        errors = [float((reconstruct(x) - weight).norm() / weight.norm()) for x in factors]
        found[share] = np.array([(*pair, error) for pair, error in zip(pairs, errors, strict=True)])
    return found


def _equal(total: float, f: int, c: int, k: int) -> int:
    """The rank that r1 = r2 has within so many parameters."""
    return max(1, round((-(f + c) + math.sqrt((f + c) ** 2 + 4 * k * total)) / (2 * k)))


def _draw_layer(model: str | None, weights: Path | None, layer: str, out: Path) -> None:
    from .compression import load_weights

    if model is None or weights is None:
        raise ValueError("--layer: expected --model and --weights, too")
    network = build_model(model)
    load_weights(network, weights)
    module = dict(network.named_modules()).get(layer)
    if not isinstance(module, nn.Conv2d) or module.groups != 1 or LayerSpec.of(layer, module).kind != "conv":
        raise ValueError(f"--layer: expected a convolution with a kernel larger than 1x1, found {layer!r}")
    with torch.no_grad():
        found = discrepancy(module.weight.detach())
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot(xlabel="r1 - r2 (output - input)", ylabel="relative error of the kernel")
    for (share, rows), mark in zip(found.items(), _cycled(_MARKS, len(found)), strict=True):
        axes.plot(rows[:, 0] - rows[:, 1], rows[:, 2], f"{mark}-", markersize=4, label=f"{100 * share:.0f} %")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.grid(alpha=0.3)
    axes.set_title(f"{model} {layer}", fontsize=10)
    figure.legend(title="share of the layer's parameters", loc="outside lower center", ncols=len(found))
    _save(figure, out / "discrepancy")


def _names(folders: Sequence[Path]) -> dict[str, Path]:
    """The folders by their names, with as many of the parents' as tell them apart: those of an experiment's trials have one name."""
    whole = [folder.absolute() for folder in dict.fromkeys(folders)]
    for length in range(1, max(len(path.parts) for path in whole) + 1):
        names = {"/".join(path.parts[-length:]): path for path in whole}
        if len(names) == len(whole):
            return names
    return {str(path): path for path in whole}


def _cycled(kinds: Sequence[str], number: int) -> list[str]:
    return [kinds[i % len(kinds)] for i in range(number)]


def _save(figure: Figure, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for suffix in (".png", ".svg"):
            figure.savefig(path.with_suffix(suffix), dpi=150)
    except OSError as error:
        raise ConfigError(f"{path.parent}: expected a folder that can be written to, found: {error.strerror}") from None
    print(f"{path}.png, .svg")
