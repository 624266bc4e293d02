"""Measure the latency table that all rows share, on an otherwise idle machine.

    python tests/benchmarks/study/costs.py
    python tests/benchmarks/study/costs.py --network vgg16 --processes 3

Where a process puts its tensors can slow an entry down by half for as long as the process lives, so
each entry is the median of several processes.
"""

from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer

from nni_haloc.costs.device.runtime import Timing
from nni_haloc.costs.device.torch_runtime import TorchRuntime
from nni_haloc.costs.latency import latency_table
from nni_haloc.costs.table import CostTable
from nni_haloc.inputs.models import build_model
from nni_haloc.space.ranks import AllowedRanks

RUNTIME = TorchRuntime(memory_format="channels_last", threads=1)
NETWORKS: dict[str, tuple[dict[str, Any], str, Timing]] = {
    "resnet20": ({}, "conv1", Timing(rounds=2)),
    "vgg16": ({"width": 0.5}, "features.0", Timing(rounds=3, min_run_time=0.03)),
}
"""Arguments of each network, the layer that stays, and how long its 600 or 1,700 entries run."""


def measured(network: str, _: int) -> CostTable:
    arguments, first, timing = NETWORKS[network]
    allowed = AllowedRanks(kinds=("conv",), exclude=(first,), step=1)
    model = build_model(network, arguments).eval()
    return latency_table(model, torch.randn(128, 3, 32, 32), allowed, RUNTIME, timing)


def main(
    network: Annotated[str, typer.Option(help=" or ".join(NETWORKS))] = "resnet20",
    processes: Annotated[int, typer.Option(help="one after another")] = 5,
) -> None:
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        tables = list(pool.imap(partial(measured, network), range(processes)))
    first = tables[0]
    costs = {
        layer: {name: median(t.costs[layer][name] for t in tables) for name in row}
        for layer, row in first.costs.items()
    }
    identity = {**first.identity, "processes": processes}
    table = CostTable("latency_ms", costs, median(t.fixed for t in tables), identity)
    table.save(Path(__file__).parent / f"costs-{network}.json")
    spread = sorted(
        max(t.costs[a][b] for t in tables) / min(t.costs[a][b] for t in tables)
        for a, row in costs.items()
        for b in row
    )
    print(
        f"original {table.original:.1f} ms; largest over smallest of an entry: "
        f"median {median(spread):.2f}, most {spread[-1]:.2f}"
    )


if __name__ == "__main__":
    typer.run(main)
