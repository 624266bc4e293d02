"""Train the original and compressed networks at length."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from benchmarks.on_cuda.bench import Bench
from benchmarks.study.pool import cache, processes, run, start
from benchmarks.study.rows import HERE, chosen, trained
from safetensors.torch import save_file

from nni_haloc.costs.counts import count_macs, count_params
from nni_haloc.inputs.config import Config, load_config
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.runs.job import Job
from nni_haloc.runs.stages.pretrain import Pretrain
from nni_haloc.runs.stages.stage import ignore
from nni_haloc.utils.log import log_to
from nni_haloc.utils.placement import working_on
from nni_haloc.utils.quiet import quiet

WEIGHTS = {"resnet20": "resnet20-cifar10-jpeg-45k.pt", "vgg16": "vgg16-half.safetensors"}
STUDY: dict[str, dict[str, Any]] = {
    "resnet20": {"model.name": "resnet20", "budget.fraction": 0.28},
    "vgg16": {
        "model.name": "vgg16",
        "model.arguments": {"width": 0.5},
        "budget.fraction": 0.12,
        "rank_space.exclude": ["features.0"],
    },
}
ORIGINAL = "original"
ORIGINAL_KEY = {"part": "original", "network": "vgg16"}
IN_TURN = (
    (ORIGINAL, "haloc", "uniform"),
    ("sensitivity-knapsack", "energy"),
    ("alds", "paper"),
)
"""Methods, some of each network in turn, so that any prefix of the rows is a fair table."""
SEEDS = 3


METHODS: dict[str, dict[str, Any]] = {  # settings of each; any other name is a rule's
    "haloc": {"rule": "search"},
    "paper": {
        "preset": "paper",
        "search.epochs": 3,
        "recalibration_batches": 50,
    },  # from uniform probabilities one is too few
}


def long(bench: Bench) -> None:
    """Make the rows, several at a time: seed by seed, some methods of each network in turn."""
    cache(bench)
    start(bench)
    bench.add(ORIGINAL_KEY, lambda: train_original(bench))
    keys = [
        {"part": "long", "network": network, "method": method, "seed": seed, "of": bench.epochs}
        for seed, methods, network in product(range(SEEDS), IN_TURN, STUDY)
        for method in methods
    ]
    with processes(bench) as pool:
        run(bench, pool, keys, one_row)


def one_row(bench: Bench, key: dict[str, Any]) -> dict[str, Any]:
    """Choose ranks by a method and train its network, or train the original for as long."""
    network, method, seed = (key[name] for name in ("network", "method", "seed"))
    name = f"{network}-{method}-{seed}"
    with working_on(bench.device), quiet(), log_to(bench.work / f"{name}.txt"):
        config = study_config(bench, network, method, seed)
        return row_of(original_of(bench, network).at(config, bench.work / name), method)


def row_of(job: Job, method: str) -> dict[str, Any]:
    started = time.monotonic()
    if method == ORIGINAL:
        plan = RankPlan({}, {"cost": 1.0, "original_cost": 1.0})
        compressed = copy.deepcopy(job.model)
    else:
        plan, compressed = chosen(job)
    choose_s = time.monotonic() - started
    with job.active():
        start_top1 = job.score(job.model)["top1"]
    return {
        "fraction": job.config.budget.fraction,
        "original": digest(job.model),
        "original_top1": start_top1,
        "choose_s": choose_s,
        "cost_fraction": plan.chosen_by["cost"] / plan.chosen_by["original_cost"],
        "macs_fraction": count_macs(compressed, job.example) / count_macs(job.model, job.example),
        "params_fraction": count_params(compressed) / count_params(job.model),
        "ranks": plan.names,
        **trained(job, compressed),
    }


def study_config(
    bench: Bench,
    network: str,
    method: str,
    seed: int,
    more: Mapping[str, Any] = MappingProxyType({}),
) -> Config:
    """Return the settings of a row; ``more`` goes before what rows share."""
    changes = STUDY[network] | {
        "data": {"name": "benchmark", "batch_size": 128, "in_memory": "device"},
        "weights": str(weights_of(bench, network)),
        "seed": seed,
        "threads": None,
        "cost.device": bench.device,
        "finetune.epochs": bench.few(bench.epochs),
        "finetune.lr": 0.1 if network == "resnet20" else 0.05,
        "trainer.accelerator": "gpu" if bench.device == "cuda" else "cpu",
    }
    for section in ("search", "finetune"):
        changes[f"{section}.compile"] = bench.device == "cuda"
        changes[f"{section}.precision"] = bench.precision
    changes |= METHODS.get(method, {} if method == ORIGINAL else {"rule": method})
    return load_config(HERE / "run.yml", changes | more)


def weights_of(bench: Bench, network: str) -> Path:
    """Return the file of a network's weights: among the data, or beside the rows."""
    file = bench.data / WEIGHTS[network]
    if file.exists():
        return file
    mark = "" if bench.scale == 1 else f"-{bench.scale}"
    return bench.out.with_name(f"{file.stem}{mark}{file.suffix}")


def original_of(bench: Bench, network: str) -> Job:
    """Return a job with the trained original."""
    config = study_config(bench, network, ORIGINAL, 0)
    return Job(config, bench.work / f"{network}-original")


def train_original(bench: Bench) -> dict[str, Any]:
    """Train VGG-16 as vgg16_half.yml says, unless there are weights of it.

    They stay beside the rows, in half precision: a later call has the same original.
    """
    file = weights_of(bench, "vgg16")
    if file.exists():
        return {}
    changes = {
        "data": {"name": "benchmark", "batch_size": 128},
        "weights": str(file),
        "train.epochs": bench.few(16),
        "train.precision": bench.precision,
        "train.compile": bench.device == "cuda",
        "trainer.accelerator": "gpu" if bench.device == "cuda" else "cpu",
        "threads": None,
    }
    config = load_config(HERE.parent / "vgg16_half.yml", changes, training=True)
    job = Job(config, bench.work / "vgg16-trained", trained=False)
    with job.active():
        Pretrain().run(job, None, ignore, False)
    values = {key: value.cpu() for key, value in job.model.state_dict().items()}
    rounded = {k: v.half() if v.is_floating_point() else v for k, v in values.items()}
    save_file({key: value.contiguous() for key, value in rounded.items()}, str(file))
    return {"top1": job.score(job.model)["top1"]}


def digest(model: torch.nn.Module) -> str:
    """Return a name for a network's weights."""
    value = hashlib.sha256()
    for tensor in model.state_dict().values():
        value.update(tensor.cpu().contiguous().numpy().tobytes())
    return value.hexdigest()[:12]
