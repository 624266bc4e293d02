"""Keep latency budgets on the device: runs of a trained network, and plans of random scores."""

from __future__ import annotations

import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from benchmarks.on_cuda.bench import Bench
from benchmarks.promise import Bench as Promise
from benchmarks.study.long import ORIGINAL_KEY, original_of, study_config, train_original
from benchmarks.study.pool import cache, start
from benchmarks.study.rows import chosen, trained

from nni_haloc.costs.counts import count_macs
from nni_haloc.costs.device.measure import measure
from nni_haloc.costs.device.runtime import Timing
from nni_haloc.costs.device.torch_runtime import TorchRuntime
from nni_haloc.costs.from_settings import latency_input, runtime_of
from nni_haloc.costs.specify import specify
from nni_haloc.runs.job import Job
from nni_haloc.runs.stages.by_rule import rank_spaces
from nni_haloc.utils.errors import InfeasibleBudget
from nni_haloc.utils.progress import progress
from nni_haloc.utils.quiet import quiet

BATCH, EPOCHS = 512, 5
FRACTIONS, RULES = (0.97, 0.95), ("sensitivity-knapsack", "uniform")
PLANS, DEAREST = 6, 0.98
"""Plans of random scores for each batch, and their largest budget."""


def budgets(bench: Bench) -> None:
    cache(bench)
    start(bench)
    bench.add(ORIGINAL_KEY, lambda: train_original(bench))
    for fraction, rule in product(FRACTIONS, RULES):
        key = {"part": "budget", "network": "vgg16", "fraction": fraction, "method": rule}
        bench.add(key, lambda k=key: one_budget(bench, **k))
    promises: dict[int, Promise] = {}
    for seed, batch in product(range(bench.few(PLANS)), (128, 1)):
        key = {"part": "promise", "network": "resnet18", "batch": batch, "seed": seed}
        bench.add(key, lambda b=batch, s=seed: one_promise(bench, promises, b, s))


def one_budget(
    bench: Bench, network: str, fraction: float, method: str, part: str = ""
) -> dict[str, Any]:
    """Compress VGG-16 to a share of its latency on the device, as a run does, and train it."""
    original = original_of(bench, network)
    more = {
        "cost.metric": "latency_ms",
        "cost.batch_size": bench.few(BATCH),
        "cost.graph": bench.device == "cuda",
        "rank_space.step": 16,
        "budget.check": "warn",
        "budget.fraction": fraction,
        "finetune.epochs": bench.few(EPOCHS),
    }
    config = study_config(bench, network, method, 0, more)
    file = bench.work / f"budget-{network}-{bench.device}-{bench.scale}.json"
    table_of(original.at(config, bench.work), file, Timing("alone", bench.few(3), 0.02))
    config = study_config(bench, network, method, 0, more | {"cost.table": str(file)})
    job = original.at(config, bench.work / f"budget-{network}-{method}-{fraction}")
    started = time.monotonic()
    try:
        plan, compressed = chosen(job)
    except InfeasibleBudget as error:
        return {"refused": str(error)}
    choose_s = time.monotonic() - started
    return {
        "choose_s": choose_s,
        "original_top1": job.score(job.model)["top1"],
        "by_table": plan.chosen_by["cost"] / plan.chosen_by["original_cost"],
        "timed": plan.chosen_by.get("timed"),
        "macs_fraction": count_macs(compressed, job.example) / count_macs(job.model, job.example),
        "ranks": plan.names,
        **trained(job, compressed),
    }


def table_of(job: Job, file: Path, timing: Timing) -> None:
    """Measure a job's cost table."""
    runtime, example = runtime_of(job.config), latency_input(job.config, job.example)
    allowed = rank_spaces(job.config)[0]
    spec = specify(job.model, example, allowed, job.config.model.name, program=False)
    measure(runtime.prepare(spec, job.model), runtime, file, timing, progress("measured"))


def one_promise(
    bench: Bench, promises: dict[int, Promise], batch: int, seed: int
) -> dict[str, Any]:
    """Make a plan of random scores for a budget, look at it as a run does, and time it anew."""
    with quiet():
        if batch not in promises:
            graph = bench.device == "cuda"
            runtime = TorchRuntime(bench.device, memory_format="channels_last", graph=graph)
            size = 224 if bench.scale == 1 else 64
            file = bench.work / f"promise-{batch}-{bench.device}-{bench.scale}.json"
            bench.work.mkdir(parents=True, exist_ok=True)
            torch.manual_seed(0)
            name, shape = "torchvision:resnet18", (bench.few(batch), 3, size, size)
            promises[batch] = Promise(name, shape, runtime, file, Timing(rounds=bench.few(3)))
        promise = promises[batch]
        facts = {"input": list(promise.shape), "machine": "idle", **promise.runtime.identity()}
        facts["original_ms"] = promise.costs.original
        try:
            return {**facts, **promise.row(seed, DEAREST)}
        except InfeasibleBudget as error:
            return {**facts, "refused_at_once": str(error)}
