"""Figure 2: one layer's cost over both ranks, for a device or for the accelerator model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import nn

from nni_haloc.costs.accelerator import CACHE, accelerator_costs
from nni_haloc.costs.device.measurements import keep_measurements
from nni_haloc.costs.device.measuring import Timing, measure
from nni_haloc.costs.device.replay import Replay
from nni_haloc.costs.device.spec import Entry, Specification
from nni_haloc.costs.device.torch_runtime import TorchRuntime
from nni_haloc.costs.measure import Parser, model_of
from nni_haloc.costs.table import CostTable
from nni_haloc.space.layers import LayerSpec
from nni_haloc.space.names import DENSE, rank_name
from nni_haloc.space.ranks import RankRules, find_layers
from nni_haloc.utils.files import whole
from nni_haloc.utils.progress import progress

UNITS = {"latency_ms": "ms", "cycles": "cycles", "energy_pj": "pJ"}


def heatmap_main(arguments: Sequence[str] | None = None) -> None:
    """Draw the cost of every pair of ranks of one layer, and keep the numbers beside the picture: a cost table of that layer.

    Measuring goes on where it was stopped.
    """
    parser = Parser("haloc heatmap", "Draw what every pair of ranks (r1, r2) of one layer costs.")
    parser.model_options("heatmap.png")
    parser.add_argument("--layer", required=True, help="the layer's name in the model")
    parser.add_argument(
        "--step", type=int, default=4, help="distance between ranks (default: %(default)s)"
    )
    parser.add_argument(
        "--metric",
        choices=tuple(UNITS),
        default="latency_ms",
        help="measured here, or of an Eyeriss-like array",
    )
    parser.add_argument(
        "--memory-format", choices=("contiguous", "channels_last"), default="contiguous"
    )
    parser.add_argument("--threads", type=int, help="processor threads (default: torch's)")
    parser.add_argument(
        "--rounds", type=int, default=3, help="passes over all pairs (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    model, example, _ = model_of(options)
    spec = find_layers(model, example, RankRules(1)).specs.get(options.layer)
    if spec is None or spec.kind != "conv":
        raise ValueError(
            f"--layer: expected a convolution with a kernel larger than 1x1, found {options.layer!r}"
        )
    if not 0 < options.step <= min(spec.in_channels, spec.out_channels):
        raise ValueError(
            f"--step: expected 1 to {min(spec.in_channels, spec.out_channels)}, found {options.step}"
        )
    if options.out.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--out: expected a picture, .png, .pdf or .svg, found {options.out}")
    numbers = options.out.with_suffix(".json")
    numbers.parent.mkdir(parents=True, exist_ok=True)
    pairs = [
        (r1, r2)
        for r1 in _ranks(spec.out_channels, options.step)
        for r2 in _ranks(spec.in_channels, options.step)
    ]
    if options.metric == "latency_ms":
        runtime = TorchRuntime(memory_format=options.memory_format, threads=options.threads)
        table = _measured(
            spec, pairs, runtime, options.rounds, f"{options.model} {options.layer}", numbers
        )
        where = f"{runtime.identity()['device']}, batch {options.batch}, {options.memory_format}"
    else:
        keep_measurements(numbers)
        found = accelerator_costs(
            [(spec, rank) for rank in [None, *pairs]], options.metric, CACHE, progress("modelled")
        )
        names = [rank_name(rank) for rank in [None, *pairs]]
        where = "Eyeriss-like array"
        table = CostTable(
            options.metric, {spec.name: dict(zip(names, found, strict=True))}, 0, {"device": where}
        )
        table.save(numbers)
    row = table.costs[spec.name]
    title = f"{options.model} {options.layer}: {options.metric.partition('_')[0]} on {where}"
    draw_heatmap(
        {pair: row[rank_name(pair)] for pair in pairs},
        row[DENSE],
        UNITS[options.metric],
        title,
        options.out,
    )
    print(f"{options.out}: dense {row[DENSE]:.4g} {UNITS[options.metric]}; the numbers: {numbers}")


def _ranks(channels: int, step: int) -> range:
    return range(step, channels + 1, step)


def _measured(
    spec: LayerSpec,
    pairs: list[tuple[int, int]],
    runtime: TorchRuntime,
    rounds: int,
    name: str,
    out: Path,
) -> CostTable:
    fields = json.loads(json.dumps(asdict(spec)))
    del fields["name"]
    entries = (Entry(fields, None), *(Entry(fields, pair) for pair in pairs))
    names = [rank_name(rank) for rank in [None, *pairs]]
    whole = Specification(
        name,
        spec.input_shapes[0],
        {spec.name: dict(zip(names, range(len(names)), strict=True))},
        entries,
    )
    runtime = replace(runtime, model=_as_model(spec))
    measure(whole, runtime, out, Timing(rounds=rounds), progress("measured"))
    return CostTable.load(out)


def _as_model(spec: LayerSpec) -> nn.Module:
    """The dense layer as a network that has it under its name."""
    return Replay(
        [{"input": [], "out": 0}, {"layer": spec.name, "args": [{"tensor": 0}], "out": [1]}],
        {spec.name: spec},
    )


def draw_heatmap(
    costs: dict[tuple[int, int], float], dense: float, unit: str, title: str, path: Path
) -> None:
    """``costs``: of each pair (r1, r2); a white line where they reach that of the dense layer."""
    rows, columns = (sorted({pair[i] for pair in costs}) for i in (0, 1))
    grid = np.array([[costs[r1, r2] for r2 in columns] for r1 in rows])
    figure = Figure(figsize=(6.5, 5.5), layout="constrained")
    axes = figure.add_subplot(xlabel="r2 (input)", ylabel="r1 (output)")
    image = axes.imshow(grid, origin="lower", cmap="cividis", aspect="auto")
    if grid.min() < dense < grid.max() and min(grid.shape) > 1:
        axes.contour(grid, levels=[dense], colors="white", linewidths=1.5)
    for axis, ranks in ((axes.xaxis, columns), (axes.yaxis, rows)):
        every = max(1, len(ranks) // 16)
        axis.set_ticks(range(0, len(ranks), every), [str(r) for r in ranks[::every]])
    axes.set_title(f"{title}\nwhite: as the dense layer, {dense:.4g} {unit}", fontsize=10)
    figure.colorbar(image, label=unit)
    with whole(path) as part:
        figure.savefig(part, dpi=150, format=path.suffix[1:])
