"""The command ``haloc plot``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

from nni_haloc.costs.measure import Parser, named_model
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.results.figures import MARKS, discrepancy, losses, parameters, rank_bars
from nni_haloc.runs.folder import RANKS_FILE, SEARCH_FOLDER
from nni_haloc.space.layers import LayerSpec
from nni_haloc.training import curves as history
from nni_haloc.utils.files import whole


def plot_main(arguments: Sequence[str] | None = None) -> None:
    """Draw a finished search, or what the difference of a layer's two ranks does to its error."""
    parser = Parser(
        "haloc plot",
        "Draw a search: loss, parameters and ranks (Figure 4); or a layer's error over r1 - r2 (Figure 3).",
    )
    parser.add_argument(
        "folders",
        nargs="*",
        type=Path,
        metavar="FOLDER",
        help="of searches or runs; several share the figures",
    )
    parser.add_argument(
        "--out", type=Path, help="folder for the figures, PNG and SVG (default: the first one)"
    )
    parser.add_argument("--layer", help="draw Figure 3 of this convolution of --model")
    parser.add_argument("--model", help="resnet20, torchvision:resnet18, ...; with --weights")
    parser.add_argument("--weights", type=Path, help="the trained weights")
    options = parser.parse_args(arguments)
    given = [name for name in ("layer", "model", "weights") if getattr(options, name) is not None]
    if options.folders and given:
        raise ValueError(
            f"FOLDER and --{given[0]}: expected folders of searches, or --layer with --model and --weights"
        )
    if not options.folders and options.layer is None:
        raise ValueError("expected folders of searches, or --layer with --model and --weights")
    if options.layer is not None:
        _draw_layer(options.model, options.weights, options.layer, options.out or Path())
        return
    out = options.out or options.folders[0]
    names = _names(options.folders)
    histories = {
        name: history.read(folder / SEARCH_FOLDER / history.HISTORY_FILE)
        for name, folder in names.items()
    }
    plans = {name: RankPlan.load(folder / RANKS_FILE) for name, folder in names.items()}
    _save(losses(histories), out / "loss")
    _save(parameters(histories), out / "parameters")
    _save(rank_bars({name: plan.ranks for name, plan in plans.items()}), out / "ranks")


def _draw_layer(model: str | None, weights: Path | None, layer: str, out: Path) -> None:
    from nni_haloc.inputs.weights import load_weights

    if model is None or weights is None:
        raise ValueError("--layer: expected --model and --weights, too")
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
        found = discrepancy(module.weight.detach())
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot(
        xlabel="r1 - r2 (output - input)", ylabel="relative error of the kernel"
    )
    for (share, rows), mark in zip(found.items(), MARKS, strict=False):
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
        title="share of the layer's parameters", loc="outside lower center", ncols=len(found)
    )
    _save(figure, out / "discrepancy")


def _names(folders: Sequence[Path]) -> dict[str, Path]:
    """The folders by their names, with as many of the parents' as tell them apart: those of an experiment's trials have one name."""
    whole = [folder.absolute() for folder in dict.fromkeys(folders)]
    for length in range(1, max(len(path.parts) for path in whole) + 1):
        names = {"/".join(path.parts[-length:]): path for path in whole}
        if len(names) == len(whole):
            return names
    return {str(path): path for path in whole}


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for kind in ("png", "svg"):
        with whole(path.with_suffix(f".{kind}")) as part:
            figure.savefig(part, dpi=150, format=kind)
    print(f"{path}.png, .svg")
