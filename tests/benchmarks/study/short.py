"""Compare choices of ranks after short trainings at equal compute, several networks at a time.

The rows are part ``short`` of ``cuda.py``, on a processor too; those that are published are in
docs/raw/short.jsonl.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.minutes import Data, logits
from benchmarks.on_cuda.bench import ROOT, Bench
from benchmarks.study.long import WEIGHTS
from benchmarks.study.pool import cache, processes, run
from benchmarks.study.rows import FILES, HERE, chosen, trained
from torch import Tensor, nn

from nni_haloc.costs.counts import count_macs, count_params
from nni_haloc.inputs.config import Config, load_config
from nni_haloc.inputs.data import Splits
from nni_haloc.inputs.tensor_images import TensorImages
from nni_haloc.plan.compression import compress
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.runs.job import Job
from nni_haloc.space.names import parse_rank
from nni_haloc.space.ranks import find_layers
from nni_haloc.training.finetuning import finetune, recalibrate
from nni_haloc.training.recipe import Recipe
from nni_haloc.training.reconstruction import reconstruct_blocks
from nni_haloc.utils.log import log_to
from nni_haloc.utils.placement import accelerated, working_on
from nni_haloc.utils.quiet import quiet

CASES = (
    ("resnet20", "macs", 0.28),
    ("vgg16", "macs", 0.12),
    ("lite0", "macs", 0.7),
    ("vgg16", "macs", 0.28),
    ("vgg16", "latency_ms", 0.5),
    ("resnet20", "latency_ms", 0.7),
    ("lite0", "macs", 0.8),
)
METHODS = ("haloc", "sensitivity-knapsack", "uniform", "energy", "alds")
SEEDS = 3
EPOCHS = {"resnet20": 6.0, "vgg16": 4.0, "lite0": 40.0}
"""Epochs in all, for choosing ranks and for training."""
CHOICE = {"resnet20": 0.1, "vgg16": 0.4}
"""Epochs that the choice by sensitivity costs on a processor, with r1 = r2.

Of pairs, once and a half as many (docs/raw/minutes.jsonl).
"""
SEARCH, TEACHER = 1.2, 4 / 3
"""What an iteration of the search costs, and one with a teacher, in ordinary steps."""
SEARCHES = {"haloc": 1.0, "haloc, half an epoch": 0.5, "haloc, taught": 1.0, "haloc, 2 epochs": 2.0}
"""Methods that search, and their epochs of search."""
TAUGHT = ("haloc, taught", "sensitivity-knapsack, taught")
EQUAL = "sensitivity-knapsack, r1 = r2"
VARIANTS = (EQUAL, "haloc, half an epoch", "haloc, 2 epochs", *TAUGHT)
RATES, STARTS = (0.005, 0.02, 0.05), ("decomposed", "reconstructed")
"""Of EfficientNet-Lite0, chosen by halves of the images that calibrate."""


@dataclass(frozen=True)
class Row:
    """One network: how its ranks are chosen, what limits them, the seed."""

    network: str
    metric: str
    fraction: float
    method: str
    seed: int


def short(bench: Bench) -> None:
    """Make the rows that are missing, the most telling ones first."""
    cache(bench)
    with processes(bench) as pool:
        if bench.has_file("efficientnet-lite0-timm.safetensors"):
            folds = [
                {"part": "fold", "network": "lite0", "rate": rate, "start": start_}
                for rate in RATES
                for start_ in STARTS
            ]
            run(bench, pool, folds, one_fold)
        best = recipe_of(bench)
        keys = [{"part": "short", **asdict(row)} for row in rows()]
        known = {"lite0"} if best is not None else set()
        known |= {name for name in FILES if bench.has_file(WEIGHTS[name])}
        keys = [key for key in keys if key["network"] in known]
        run(bench, pool, keys, one_row, best)


def rows() -> Iterator[Row]:
    """List the rows: all methods seed by seed, then what else was tried."""
    of_lite0 = [method for method in METHODS if method not in SEARCHES]
    for seed, (network, metric, fraction) in product(range(SEEDS), CASES):
        for method in of_lite0 if network == "lite0" else METHODS:
            yield Row(network, metric, fraction, method, seed)
    for seed, (network, metric, fraction) in product(range(SEEDS), CASES):
        if network != "lite0" and metric == "macs":
            for method in VARIANTS:
                yield Row(network, metric, fraction, method, seed)


# What follows runs in processes of their own.


def config_of(bench: Bench, row: Row) -> Config:
    """Return the settings of a row."""
    method, *_ = row.method.split(", ")
    changes: dict[str, Any] = {
        "data": {"name": "benchmark", "batch_size": 128, "score": "val"},
        "weights": str(bench.data / WEIGHTS[row.network]),
        "seed": row.seed,
        "threads": None,
        "cost.metric": row.metric,
        "budget.fraction": row.fraction,
        "trainer.accelerator": "gpu" if bench.device == "cuda" else "cpu",
    }
    if row.metric == "latency_ms":
        changes["cost.table"] = str(HERE / f"costs-{row.network}.json")
    for section in ("search", "finetune"):
        changes[f"{section}.compile"] = bench.device == "cuda"
        if bench.device == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2":
            changes[f"{section}.precision"] = "32-true"  # bf16 takes many times as long there
    if row.method in SEARCHES:
        changes |= {"rule": "search", "search.epochs": SEARCHES[row.method]}
    else:
        changes["rule"] = method
    if row.method in TAUGHT:
        changes["finetune.distill"] = 0.9
    if row.method == EQUAL:
        changes["rank_space.equal"] = True
    return load_config(HERE / FILES[row.network], changes)


def epochs_left(row: Row) -> float:
    """Return the epochs of training that the choice of ranks leaves."""
    spent = SEARCH * SEARCHES.get(row.method, 0)
    if row.method in SEARCHES or row.method.startswith("sensitivity"):
        pairs = (
            row.metric == "macs" and row.method.startswith("sensitivity") and row.method != EQUAL
        )
        spent += (1.5 if pairs else 1.0) * CHOICE[row.network]
    left = EPOCHS[row.network] - spent
    return left / TEACHER if row.method in TAUGHT else left


def one_row(bench: Bench, key: dict[str, Any], best: dict[str, Any] | None) -> dict[str, Any]:
    """Choose ranks, train the network, and measure it."""
    row = Row(**{name: key[name] for name in Row.__dataclass_fields__})
    name = "-".join(map(str, asdict(row).values())).replace(", ", "-").replace(" ", "-")
    with working_on(bench.device), quiet(), log_to(bench.work / f"{name}.txt"):
        return (
            one_lite0(bench, row, best or {})
            if row.network == "lite0"
            else one_cifar(bench, row, name)
        )


def one_cifar(bench: Bench, row: Row, name: str) -> dict[str, Any]:
    config = config_of(bench, row)
    left = epochs_left(row) * min(1.0, 10 * bench.scale)
    tuning = config.finetune.model_copy(update={"epochs": left})
    job = Job(config.model_copy(update={"finetune": tuning}), bench.work / name)
    started = time.monotonic()
    plan, network = chosen(job)
    return {
        "choose_s": time.monotonic() - started,
        "cost_fraction": plan.chosen_by["cost"] / plan.chosen_by["original_cost"],
        "macs_fraction": count_macs(network, job.example) / count_macs(job.model, job.example),
        "params_fraction": count_params(network) / count_params(job.model),
        "ranks": plan.names,
        "precision": config.finetune.precision,
        **trained(job, network),
    }


def plans_of(fraction: float) -> dict[str, dict[str, str]]:
    """Return the ranks of EfficientNet-Lite0 by each method, from the study of minutes."""
    lines = (ROOT / "docs" / "raw" / "minutes.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    return {
        row["method"]: row["ranks"]
        for row in found
        if (row["network"], row["budget"]) == ("lite0", fraction)
    }


def one_fold(bench: Bench, key: dict[str, Any]) -> dict[str, Any]:
    """Train on half of the images that calibrate, and measure on the other half."""
    with working_on(bench.device), quiet():
        data = lite0(bench)
        hidden = data.images[1::2].to(bench.device)
        ranks = plans_of(0.7)["sensitivity-knapsack"]
        network = taught(bench, data, ranks, data.images[::2], key, seed=0)
        with accelerated(network, data.model):
            ours, theirs = (logits(x, hidden).log_softmax(1) for x in (network, data.model))
    return {
        "divergence": float(F.kl_div(ours, theirs, reduction="batchmean", log_target=True)),
        "agreement": float((ours.argmax(1) == theirs.argmax(1)).float().mean()),
    }


def recipe_of(bench: Bench) -> dict[str, Any] | None:
    """Return the recipe of the least divergence on images that it did not train on."""
    known = [
        row
        for row in bench.rows()
        if row["part"] == "fold" and row["scale"] == bench.scale and "error" not in row
    ]
    return min(known, key=lambda row: row["divergence"], default=None)


def one_lite0(bench: Bench, row: Row, best: dict[str, Any]) -> dict[str, Any]:
    data = lite0(bench)
    ranks = plans_of(row.fraction)[row.method]
    network = taught(bench, data, ranks, data.images, best, row.seed)
    found = logits(network.to(bench.device), data.shown.to(bench.device)).cpu()
    ours, theirs = found.log_softmax(1), data.original.log_softmax(1)
    return {
        "test_top1": float((found.argmax(1) == data.truth).float().mean()),
        "divergence": float(F.kl_div(ours, theirs, reduction="batchmean", log_target=True)),
        "rate": best["rate"],
        "start": best["start"],
        "ranks": ranks,
    }


def lite0(bench: Bench) -> Data:
    """Read EfficientNet-Lite0 and its images, once in a process."""
    if "lite0" not in HELD:
        HELD["lite0"] = Data("lite0", bench.data)
    return HELD["lite0"]


HELD: dict[str, Data] = {}


def taught(
    bench: Bench, data: Data, ranks: dict[str, str], images: Tensor, how: dict[str, Any], seed: int
) -> nn.Module:
    """Decompose at ranks, and train by the original's outputs alone on a few images."""
    specs = find_layers(data.model, data.images[:1], data.allowed).specs
    plan = RankPlan({layer: parse_rank(name, specs[layer].kind) for layer, name in ranks.items()})
    epochs = EPOCHS["lite0"] * bench.scale
    network = compress(data.model, plan, images)
    if how["start"] == "reconstructed":
        reconstruct_blocks(network, data.model, images, list(plan.ranks), epochs=bench.few(8))
    held = (images * 128 + 127).round().to(torch.uint8)
    labels = torch.zeros(len(held), dtype=torch.long)
    mean, std = [127 / 255] * 3, [128 / 255] * 3
    moved = TensorImages(held, labels, mean, std, pad=16, mirror=True)
    loader = (
        Splits(moved, moved, moved, moved, [])
        .on_device()
        .loader("train", 25, shuffle=True, seed=seed)
    )
    torch.manual_seed(seed)
    recipe = Recipe(epochs, lr=how["rate"], weight_decay=1e-5, schedule="onecycle")
    options: dict[str, Any] = {"enable_progress_bar": False}
    options["accelerator"] = "gpu" if bench.device == "cuda" else "cpu"
    finetune(network, loader, recipe, teacher=data.model, distill=1.0, **options)
    recalibrate(network, loader, batches=len(loader))
    return network
