"""Figure 2: one layer's cost over both ranks, for a device or for the accelerator model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import nn

from .device.files import DENSE, write_json
from .device.measuring import Timing, measure
from .device.replay import Replay
from .device.spec import Entry, Specification
from .device.torch_runtime import TorchRuntime
from .layers import LayerSpec
from .measure import Parser, model_of, progress
from .predictors.accelerator import CACHE, accelerator_costs
from .ranks import RankRules, find_layers

UNITS = {"latency_ms": "ms", "cycles": "cycles", "energy_pj": "pJ"}


def heatmap_main(arguments: Sequence[str] | None = None) -> None:
    """Draw the cost of every pair of ranks of one layer, and keep the numbers beside the picture."""
    parser = Parser("haloc heatmap", "Draw what every pair of ranks (r1, r2) of one layer costs.")
    parser.model_options("heatmap.png")
    parser.add_argument("--layer", required=True, help="the layer's name in the model")
    parser.add_argument("--step", type=int, default=4, help="distance between ranks (default: %(default)s)")
    parser.add_argument("--metric", choices=tuple(UNITS), default="latency_ms", help="measured here, or of an Eyeriss-like array")
    parser.add_argument("--memory-format", choices=("contiguous", "channels_last"), default="contiguous")
    parser.add_argument("--threads", type=int, help="processor threads (default: torch's)")
    parser.add_argument("--rounds", type=int, default=3, help="passes over all pairs (default: %(default)s)")
    options = parser.parse_args(arguments)
    model, example, _ = model_of(options)
    spec = find_layers(model, example, RankRules(1)).specs.get(options.layer)
    if spec is None or spec.kind != "conv":
        raise ValueError(f"--layer: expected a convolution with a kernel larger than 1x1, found {options.layer!r}")
    if not 0 < options.step <= min(spec.in_channels, spec.out_channels):
        raise ValueError(f"--step: expected 1 to {min(spec.in_channels, spec.out_channels)}, found {options.step}")
    pairs = [(r1, r2) for r1 in _ranks(spec.out_channels, options.step) for r2 in _ranks(spec.in_channels, options.step)]
    if options.metric == "latency_ms":
        runtime = TorchRuntime(memory_format=options.memory_format, threads=options.threads)
        costs = _measured(spec, pairs, runtime, options.rounds)
        where = f"{runtime.identity()['device']}, batch {options.batch}, {options.memory_format}"
    else:
        found = accelerator_costs([(spec, rank) for rank in [None, *pairs]], options.metric, CACHE, progress("modelled"))
        costs = dict(zip([None, *pairs], found, strict=True))
        where = "Eyeriss-like array"
    dense = costs.pop(None)
    title = f"{options.model} {options.layer}: {options.metric.partition('_')[0]} on {where}"
    draw_heatmap({rank: cost for rank, cost in costs.items() if rank is not None}, dense, UNITS[options.metric], title, options.out)
    numbers = {f"r{rank[0]}x{rank[1]}": cost for rank, cost in costs.items() if rank is not None}
    write_json(options.out.with_suffix(".json"), {"title": title, "metric": options.metric, DENSE: dense, "costs": numbers})
    print(f"{options.out}: dense {dense:.4g} {UNITS[options.metric]}; the numbers: {options.out.with_suffix('.json')}")


def _ranks(channels: int, step: int) -> range:
    return range(step, channels + 1, step)


def _measured(spec: LayerSpec, pairs: list[tuple[int, int]], runtime: TorchRuntime, rounds: int) -> dict[tuple[int, int] | None, float]:
    fields = json.loads(json.dumps(asdict(spec)))
    del fields["name"]
    entries = (Entry(fields, None), *(Entry(fields, pair) for pair in pairs))
    names = [DENSE, *(f"r{r1}x{r2}" for r1, r2 in pairs)]
    whole = Specification("layer", spec.input_shapes[0], {spec.name: dict(zip(names, range(len(names)), strict=True))}, entries)
    runtime = replace(runtime, model=_as_model(spec))
    content = measure(whole, runtime, None, Timing(rounds=rounds), progress("measured"))
    return dict(zip([None, *pairs], content["costs"][spec.name].values(), strict=True))


def _as_model(spec: LayerSpec) -> nn.Module:
    """The dense layer as a network that has it under its name."""
    return Replay([{"input": [], "out": 0}, {"layer": spec.name, "args": [{"tensor": 0}], "out": [1]}], {spec.name: spec})


def draw_heatmap(costs: dict[tuple[int, int], float], dense: float, unit: str, title: str, path: Path) -> None:
    """``costs``: of each pair (r1, r2); a white line where they reach that of the dense layer."""
    rows, columns = (sorted({pair[i] for pair in costs}) for i in (0, 1))
    grid = np.array([[costs[r1, r2] for r2 in columns] for r1 in rows])
    figure = Figure(figsize=(6.5, 5.5), layout="constrained")
    axes = figure.add_subplot(xlabel="r2 (input)", ylabel="r1 (output)")
    image = axes.imshow(grid, origin="lower", cmap="cividis", aspect="auto")
    if grid.min() < dense < grid.max():
        axes.contour(grid, levels=[dense], colors="white", linewidths=1.5)
    for axis, ranks in ((axes.xaxis, columns), (axes.yaxis, rows)):
        every = max(1, len(ranks) // 16)
        axis.set_ticks(range(0, len(ranks), every), [str(r) for r in ranks[::every]])
    axes.set_title(f"{title}\nwhite: as the dense layer, {dense:.4g} {unit}", fontsize=10)
    figure.colorbar(image, label=unit)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
