"""Draw one layer's cost over both ranks, on a device or by the accelerator model (Figure 2)."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor, nn

from nni_haloc.costs.accelerator import CACHE, accelerator_costs
from nni_haloc.costs.device.measure import measure
from nni_haloc.costs.device.measured_file import refuse_to_overwrite
from nni_haloc.costs.device.replay import Replay
from nni_haloc.costs.device.runtime import Timing
from nni_haloc.costs.device.spec import Entry, Specification
from nni_haloc.costs.device.torch_runtime import TorchRuntime
from nni_haloc.costs.table import CostTable
from nni_haloc.space.layers import LayerSpec
from nni_haloc.space.names import DENSE, rank_name
from nni_haloc.space.ranks import AllowedRanks, find_layers
from nni_haloc.utils.files import make_folder, whole
from nni_haloc.utils.progress import progress

UNITS = {"latency_ms": "ms", "cycles": "cycles", "energy_pj": "pJ"}
Pair = tuple[int, int]


def write_heatmap(
    spec: LayerSpec,
    name: str,
    out: Path,
    *,
    metric: str = "latency_ms",
    step: int = 4,
    rounds: int = 3,
    runtime: TorchRuntime | None = None,
) -> str:
    """Draw the cost of every pair of ranks of one layer; keep the numbers beside the picture.

    The numbers are a cost table of that layer, ``out`` with the ending ``.json``. Measuring goes on
    where it was stopped.

    Args:
        spec: the layer, as `layer_spec` finds it.
        name: what the title calls the layer.
        out: the picture: ``.png``, ``.pdf`` or ``.svg``.
        metric: ``latency_ms``, measured here, or ``cycles`` or ``energy_pj``, of an Eyeriss-like
            array.
        step: distance between ranks.
        rounds: how many times each pair is measured.
        runtime: what measures ``latency_ms``.

    Returns:
        One line on the dense layer's cost and the files.

    Raises:
        ValueError: if the step does not fit the layer, or the file is no picture.
    """
    most = min(spec.in_channels, spec.out_channels)
    if not 0 < step <= most:
        raise ValueError(f"--step: expected 1 to {most}, found {step}")
    if out.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--out: expected a picture, .png, .pdf or .svg, found {out}")
    numbers = out.with_suffix(".json")
    make_folder(numbers.parent)
    pairs = [
        (r1, r2) for r1 in _ranks(spec.out_channels, step) for r2 in _ranks(spec.in_channels, step)
    ]
    if runtime is not None:
        table = _measured(spec, pairs, runtime, rounds, name, numbers)
        device = runtime.identity()["device"]
        where = f"{device}, batch {spec.input_shapes[0][0]}, {runtime.memory_format}"
    else:
        table, where = _modelled(spec, pairs, metric, numbers), "Eyeriss-like array"
    row, unit = table.costs[spec.name], UNITS[metric]
    title = f"{name}: {metric.partition('_')[0]} on {where}"
    draw_heatmap({pair: row[rank_name(pair)] for pair in pairs}, row[DENSE], unit, title, out)
    return f"{out}: dense {row[DENSE]:.4g} {unit}; the numbers: {numbers}"


def layer_spec(model: nn.Module, example: Tensor, layer: str) -> LayerSpec:
    """Return what the rank space knows of a convolution.

    Raises:
        ValueError: if the network has no such convolution, or its kernel is 1x1.
    """
    spec = find_layers(model, example, AllowedRanks(1)).specs.get(layer)
    if spec is None or spec.kind != "conv":
        raise ValueError(
            f"--layer: expected a convolution with a kernel larger than 1x1, found {layer!r}"
        )
    return spec


def _ranks(channels: int, step: int) -> range:
    return range(step, channels + 1, step)


def _modelled(spec: LayerSpec, pairs: list[Pair], metric: str, out: Path) -> CostTable:
    """Write and return the layer's table for the accelerator model."""
    refuse_to_overwrite(out)
    ranks = [None, *pairs]
    costs = accelerator_costs([(spec, rank) for rank in ranks], metric, CACHE, progress("modelled"))
    row = dict(zip(map(rank_name, ranks), costs, strict=True))
    table = CostTable(metric, {spec.name: row}, 0, {"device": "Eyeriss-like array"})
    table.save(out)
    return table


def _measured(
    spec: LayerSpec,
    pairs: list[Pair],
    runtime: TorchRuntime,
    rounds: int,
    name: str,
    out: Path,
) -> CostTable:
    fields = json.loads(json.dumps(asdict(spec)))
    del fields["name"]
    entries = (Entry(fields, None), *(Entry(fields, pair) for pair in pairs))
    names = [rank_name(rank) for rank in [None, *pairs]]
    pairs_of_layer = Specification(
        name,
        spec.input_shapes[0],
        {spec.name: dict(zip(names, range(len(names)), strict=True))},
        entries,
    )
    measure(
        runtime.prepare(pairs_of_layer, _as_model(spec)),
        runtime,
        out,
        Timing(rounds=rounds),
        progress("measured"),
    )
    return CostTable.load(out)


def _as_model(spec: LayerSpec) -> nn.Module:
    """Return a network of the dense layer alone, under its name."""
    return Replay(
        [{"input": [], "out": 0}, {"layer": spec.name, "args": [{"tensor": 0}], "out": [1]}],
        {spec.name: spec},
    )


def draw_heatmap(costs: dict[Pair, float], dense: float, unit: str, title: str, path: Path) -> None:
    """Draw a layer's cost over both ranks, with a white line where it is that of the dense layer.

    Args:
        costs: pairs (r1, r2) to costs.
        dense: cost of the dense layer.
        unit: unit of the costs.
        title: first line of the title.
        path: the picture; its ending says which kind.
    """
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
