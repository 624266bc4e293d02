"""Draw a layer's error over the difference of its ranks, and searches (Figures 3 and 4)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

from nni_haloc.costs.measure import named_model
from nni_haloc.inputs.weights import load_weights
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.results.figures import MARKS, discrepancy, losses, parameters, rank_bars
from nni_haloc.runs.folder import RunFolder, hold
from nni_haloc.space.layers import LayerSpec
from nni_haloc.training import curves
from nni_haloc.utils.files import make_folder, whole


def draw_searches(folders: Sequence[Path], out: Path) -> None:
    """Draw the loss, the parameters and the ranks of finished searches (Figure 4).

    Args:
        folders: folders of searches or runs; several share the figures.
        out: folder for the figures, PNG and SVG.

    Raises:
        ValueError: if a folder's history or plan is damaged.
        OSError: if there is none.
    """
    names = _names(folders)
    histories = {
        name: curves.read(RunFolder(folder).searching.history) for name, folder in names.items()
    }
    plans = {name: RankPlan.load(RunFolder(folder).ranks) for name, folder in names.items()}
    with hold(RunFolder(out)):
        _save(losses(histories), out / "loss")
        _save(parameters(histories), out / "parameters")
        _save(rank_bars({name: plan.ranks for name, plan in plans.items()}), out / "ranks")


def draw_layer(model: str, weights: Path, layer: str, out: Path) -> None:
    """Draw the error of one layer's kernel over r1 - r2, at equal parameters (Figure 3).

    Args:
        model: name of the network.
        weights: file of its trained weights.
        layer: name of a convolution with a kernel larger than 1x1.
        out: folder for the figure, PNG and SVG.

    Raises:
        ValueError: if the network has no such convolution, or the weights do not fit.
        OSError: if the weights can't be read.
    """
    network = named_model(model)
    load_weights(network, weights)
    module = dict(network.named_modules()).get(layer)
    if (
        not isinstance(module, nn.Conv2d)
        or module.groups != 1
        or LayerSpec.of(layer, module).kind != "conv"
    ):
        raise ValueError(
            f"--layer: expected a convolution with a kernel larger than 1x1, found {layer!r}"
        )
    with torch.no_grad():
        errors = discrepancy(module.weight.detach())
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot(
        xlabel="r1 - r2 (output - input)", ylabel="relative error of the kernel"
    )
    for (share, rows), mark in zip(errors.items(), MARKS, strict=False):
        axes.plot(
            rows[:, 0] - rows[:, 1],
            rows[:, 2],
            f"{mark}-",
            markersize=4,
            label=f"{100 * share:.0f} %",
        )
    axes.axvline(0, color="black", linewidth=0.8)
    axes.grid(alpha=0.3)
    axes.set_title(f"{model} {layer}", fontsize=10)
    figure.legend(
        title="share of the layer's parameters", loc="outside lower center", ncols=len(errors)
    )
    _save(figure, out / "discrepancy")


def _names(folders: Sequence[Path]) -> dict[str, Path]:
    """Name the folders, with as many parents as tell them apart: all trials' have one name."""
    whole = [folder.absolute() for folder in dict.fromkeys(folders)]
    for length in range(1, max(len(path.parts) for path in whole) + 1):
        names = {"/".join(path.parts[-length:]): path for path in whole}
        if len(names) == len(whole):
            return names
    return {str(path): path for path in whole}


def _save(figure: Figure, path: Path) -> None:
    make_folder(path.parent)
    for kind in ("png", "svg"):
        with whole(path.with_suffix(f".{kind}")) as part:
            figure.savefig(part, dpi=150, format=kind)
    print(f"{path}.png, {path}.svg")
