"""Measure cost tables of ResNet-18, and networks that are chosen by them."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import numpy as np
import torch
from benchmarks.latency_plans import MACS, NEAR, ranks, uniform
from benchmarks.on_cuda.bench import Bench
from benchmarks.predictor import EQUAL, SPREAD, plans

from nni_haloc.costs.analytic import mac_table
from nni_haloc.costs.counts import count_macs
from nni_haloc.costs.device.measure import measure, time_together
from nni_haloc.costs.device.runtime import Timing
from nni_haloc.costs.device.torch_runtime import TorchRuntime
from nni_haloc.costs.specify import specify
from nni_haloc.costs.table import CostTable
from nni_haloc.inputs.models import build_model
from nni_haloc.plan.budget import Limit, choose
from nni_haloc.plan.compression import restructure
from nni_haloc.space.ranks import AllowedRanks

TABLES = ((1, True), (128, True), (1, False))
"""Batch, and whether the pass is a captured graph, of each cost table of ResNet-18."""


def tables(bench: Bench) -> None:
    for batch, graph in TABLES:
        key = {"part": "table", "network": "resnet18", "batch": batch, "graph": graph}
        bench.add(key, lambda b=batch, g=graph: one_table(bench, b, g))


def one_table(bench: Bench, batch: int, graph: bool) -> dict[str, Any]:
    """Measure a cost table of ResNet-18, and networks by the table and by uniform ranks."""
    batch, size = bench.few(batch), 224 if bench.scale == 1 else 64
    torch.manual_seed(0)
    model, shape = build_model("torchvision:resnet18").eval(), (batch, 3, size, size)
    example = torch.randn(shape)
    allowed = AllowedRanks(kinds=("conv",), exclude=("conv1",))
    runtime = TorchRuntime(
        bench.device, memory_format="channels_last", graph=graph and bench.device == "cuda"
    )
    started = time.perf_counter()
    spec = runtime.prepare(specify(model, example, allowed, "resnet18", program=False), model)
    timing = Timing(rounds=bench.few(3, 1), min_run_time=0.05 * bench.scale)
    file = bench.work / f"table-{batch}-{graph}.json"
    bench.work.mkdir(parents=True, exist_ok=True)
    content = measure(spec, runtime, file, timing)
    seconds = time.perf_counter() - started
    costs, macs = CostTable.load(file), mac_table(model, example, allowed)
    least = MACS * count_macs(model, example[:1]) / 1819.07e6  # of a smaller image less
    drawn = plans(macs)[EQUAL][: bench.few(10, 2)]
    drawn += plans(macs, seed=1)[SPREAD][:: 3 if bench.scale == 1 else 10]
    fastest = {
        layer: {name: -cost for name, cost in row.items()} for layer, row in costs.costs.items()
    }
    ours = choose(fastest, [Limit(macs, (1 + NEAR) * least)], (1 - NEAR) / (1 + NEAR))
    named = {
        "uniform": uniform(model, example[:1], allowed) if bench.scale == 1 else ranks(drawn[0]),
        "ours": ranks(ours),
    }
    networks = {"original": model}
    networks |= {name: restructure(model, plan) for name, plan in named.items()}
    networks |= {f"plan {i}": restructure(model, ranks(plan)) for i, plan in enumerate(drawn)}
    counted = {name: count_macs(networks[name], example[:1]) for name in ("original", *named)}
    with runtime.pinned():  # moves the networks to the device
        runs = {name: runtime.ready(network, shape) for name, network in networks.items()}
        found = [time_together(runs, runtime, 0.02 * bench.scale) for _ in range(bench.few(9, 2))]
    measured = {name: 1e3 * median(times[name] for times in found) for name in networks}
    errors = [costs.total(plan) / measured[f"plan {i}"] - 1 for i, plan in enumerate(drawn)]
    return {
        "identity": costs.identity,
        "entries": len(spec.entries),
        "table_s": seconds,
        "spread": content["quality"].get("spread"),
        "predicted_over_measured": errors,
        "network_error": float(np.mean(np.abs(errors))),
        "ms": {name: [1e3 * times[name] for times in found] for name in ("original", *named)},
        "macs": counted,
        "plans": {name: plan.names for name, plan in named.items()},
    }
