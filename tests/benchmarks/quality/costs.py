"""Measure the latency table that all rows share, on an otherwise idle machine.

    python tests/benchmarks/quality/costs.py

Where a process puts its tensors can slow an entry down by half for as long as the process lives, so
each entry is the median of several processes.
"""

from multiprocessing import get_context
from statistics import median
from typing import Annotated

import torch
import typer
from rows import HERE, RUNTIME

from nni_haloc.costs.device.runtime import Timing
from nni_haloc.costs.latency import latency_table
from nni_haloc.costs.table import CostTable
from nni_haloc.inputs.models import build_model
from nni_haloc.space.ranks import AllowedRanks


def measured(_: int) -> CostTable:
    example = torch.randn(128, 3, 32, 32)
    allowed = AllowedRanks(kinds=("conv",), exclude=("conv1",), step=1)
    return latency_table(
        build_model("resnet20", {}).eval(), example, allowed, RUNTIME, Timing(rounds=2)
    )


def main(processes: Annotated[int, typer.Option(help="one after another")] = 5) -> None:
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        tables = list(pool.imap(measured, range(processes)))
    first = tables[0]
    costs = {
        layer: {name: median(t.costs[layer][name] for t in tables) for name in row}
        for layer, row in first.costs.items()
    }
    identity = {**first.identity, "processes": processes}
    table = CostTable("latency_ms", costs, median(t.fixed for t in tables), identity)
    table.save(HERE / "costs.json")
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
