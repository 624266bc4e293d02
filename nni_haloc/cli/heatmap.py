"""The command heatmap: one layer's cost over both ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from nni_haloc.cli.options import COSTS, Batch, Model, Shape
from nni_haloc.utils.errors import as_one_line

heatmap = typer.Typer()

MemoryFormat = Annotated[
    Literal["contiguous", "channels_last"],
    typer.Option(metavar="NAME", help="Layout of the images: contiguous or channels_last."),
]


@heatmap.command("heatmap", rich_help_panel=COSTS)
def heatmap_command(
    layer: Annotated[
        str,
        typer.Option(metavar="NAME", help="The layer's name in the network.", show_default=False),
    ],
    model: Model = None,
    input_: Shape = None,
    batch: Batch = 1,
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="The picture: .png, .pdf or .svg.")
    ] = Path("heatmap.png"),
    step: Annotated[int, typer.Option(metavar="N", help="Distance between ranks.")] = 4,
    metric: Annotated[
        Literal["latency_ms", "cycles", "energy_pj"],
        typer.Option(
            metavar="NAME",
            help="latency_ms, measured here; cycles or energy_pj, modelled (Eyeriss).",
        ),
    ] = "latency_ms",
    memory_format: MemoryFormat = "contiguous",
    threads: Annotated[
        int | None, typer.Option(metavar="N", help="Processor threads (default: torch's).")
    ] = None,
    rounds: Annotated[int, typer.Option(metavar="N", help="Passes over all pairs.")] = 3,
) -> None:
    """Draw one layer's cost at every pair of ranks (Figure 2)."""
    with as_one_line():
        from nni_haloc.costs.device.torch_runtime import TorchRuntime
        from nni_haloc.costs.measure import model_of
        from nni_haloc.results.heatmap import layer_spec, write_heatmap

        network, example, _ = model_of(model, input_, batch)
        spec, runtime = layer_spec(network, example, layer), None
        if metric == "latency_ms":
            runtime = TorchRuntime(memory_format=memory_format, threads=threads)
        line = write_heatmap(
            spec,
            f"{model} {layer}",
            out,
            metric=metric,
            step=step,
            rounds=rounds,
            runtime=runtime,
        )
    typer.echo(line)
