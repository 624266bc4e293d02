"""The command plot: the figures of searches, or of one layer's error."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nni_haloc.cli.options import AFTER
from nni_haloc.utils.errors import SettingsError, as_one_line

plot = typer.Typer()


@plot.command("plot", rich_help_panel=AFTER)
def plot_command(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="FOLDER",
            help="Folders of searches or runs; several share the figures.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder for the figures (default: the first FOLDER; with --layer, this one).",
        ),
    ] = None,
    layer: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Draw the error of this convolution of --model."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Network: resnet20, torchvision:resnet18, ..."),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Trained weights of --model.")
    ] = None,
) -> None:
    """Draw searches (Figure 4), or one layer's error (Figure 3).

    Of searches it draws loss, parameters and ranks, as PNG and SVG, from
    search/history.csv and ranks.json. Curves are smoothed over 25 iterations,
    short ones over fewer. The ranks show r1 above r2 if they differ in any layer,
    and say which layers are dense.

    With --layer, --model and --weights, and without folders, it draws the error
    of the layer's kernel over r1 - r2.
    """
    given = {"layer": layer, "model": model, "weights": weights}
    expected = "expected folders of searches, or --layer with --model and --weights"
    for name, value in given.items():
        if folders and value is not None:
            raise SettingsError(f"FOLDER and --{name}: {expected}")
    if not folders and layer is None:
        raise SettingsError(expected)
    with as_one_line():
        from nni_haloc.results.plots import draw_layer, draw_searches

        if folders:
            draw_searches(folders, out or folders[0])
        elif layer is not None and model is not None and weights is not None:
            draw_layer(model, weights, layer, out or Path())
        else:
            raise SettingsError("--layer: expected --model and --weights, too")
