"""Train the original and compressed networks at length."""

from __future__ import annotations

import copy
import hashlib
import io
import re
import tarfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.on_cuda.bench import Bench
from benchmarks.study.rows import HERE, chosen, trained
from PIL import Image
from safetensors.torch import load_file, save_file

from nni_haloc.costs.counts import count_macs, count_params
from nni_haloc.inputs.config import Config, load_config
from nni_haloc.inputs.data import Splits
from nni_haloc.inputs.normalisation import IMAGENET_MEAN, IMAGENET_STD
from nni_haloc.inputs.registries import DATA
from nni_haloc.inputs.tensor_images import TensorImages
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.runs.job import Job
from nni_haloc.runs.stages.pretrain import Pretrain
from nni_haloc.runs.stages.stage import ignore

WEIGHTS = "resnet20-cifar10-jpeg-45k.pt"
STUDY: dict[str, dict[str, Any]] = {
    "resnet20": {"model.name": "resnet20", "budget.fraction": 0.28},
    "vgg16": {
        "model.name": "vgg16",
        "budget.fraction": 0.12,
        "budget.also": [{"metric": "params", "fraction": 0.02}],
        "rank_space.exclude": ["features.0"],
        "rank_space.step": 16,
    },
}
ORIGINAL = "original"
IN_TURN = (
    (ORIGINAL, "haloc", "uniform"),
    ("sensitivity-knapsack", "energy"),
    ("alds", "paper"),
)
"""Methods, some of each network in turn, so that any prefix of the rows is a fair table."""
EPOCHS = 100
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
    """Make the study's rows: seed by seed, some methods of each network in turn."""
    images = packed(bench)
    DATA.register("benchmark")(lambda settings: images)
    jobs: dict[str, Job] = {}
    for seed, methods, network in product(range(SEEDS), IN_TURN, STUDY):
        for method in methods:
            key = {"part": "long", "network": network, "method": method, "seed": seed}
            if not bench.has(key) and bench.left > expected(bench, key):
                bench.add(key, lambda k=key: one_row(bench, jobs, **k))


def expected(bench: Bench, key: dict[str, Any]) -> float:
    """Return the seconds that a row of the study took before; 0 if none is known."""
    same = ("part", "network")
    known = [
        row["seconds"]
        for row in bench.rows()
        if all(row.get(name) == key[name] for name in same)
        and row["scale"] == bench.scale
        and "error" not in row
    ]
    return 1.1 * max(known, default=0.0)


def one_row(
    bench: Bench, jobs: dict[str, Job], network: str, method: str, seed: int, part: str = ""
) -> dict[str, Any]:
    """Choose ranks by a method and train its network, or train the original on as long."""
    config = study_config(bench, network, method, seed)
    if network not in jobs:
        jobs[network] = original_of(bench, network)
    job = jobs[network].at(config, bench.work / f"{network}-{method}-{seed}")
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
        "fraction": config.budget.fraction,
        "original": digest(job.model),
        "original_top1": start_top1,
        "choose_s": choose_s,
        "cost_fraction": plan.chosen_by["cost"] / plan.chosen_by["original_cost"],
        "macs_fraction": count_macs(compressed, job.example) / count_macs(job.model, job.example),
        "params_fraction": count_params(compressed) / count_params(job.model),
        "ranks": plan.names,
        **trained(job, compressed),
    }


def study_config(bench: Bench, network: str, method: str, seed: int) -> Config:
    """Return the settings of a row."""
    epochs = bench.few(EPOCHS)
    changes = STUDY[network] | {
        "data": {"name": "benchmark", "batch_size": 128, "in_memory": "device"},
        "data.share": min(1.0, 10 * bench.scale),
        "weights": str(bench.data / WEIGHTS),
        "seed": seed,
        "threads": None,
        "cost.device": bench.device,
        "finetune.epochs": epochs,
        "finetune.lr": 0.1 if network == "resnet20" else 0.05,
        "train.epochs": epochs,
        "train.lr": 0.1,
        "trainer.accelerator": "gpu" if bench.device == "cuda" else "cpu",
    }
    for section in ("search", "finetune", "train"):
        changes[f"{section}.compile"] = bench.device == "cuda"
        changes[f"{section}.precision"] = "bf16-mixed"
    changes |= METHODS.get(method, {} if method == ORIGINAL else {"rule": method})
    return load_config(HERE / "run.yml", changes)


def original_of(bench: Bench, network: str) -> Job:
    """Return a job with the trained original.

    VGG-16 is trained first. Its weights stay beside the rows, rounded to half precision and in two
    files, so that a later call has the same original.
    """
    config = study_config(bench, network, ORIGINAL, 0)
    job = Job(config, bench.work / f"{network}-original", trained=network == "resnet20")
    if network == "resnet20":
        return job
    files = [bench.out.with_name(f"{network}-original-{i}.safetensors") for i in range(2)]
    if not all(file.exists() for file in files):
        with job.active():
            Pretrain().run(job, None, ignore, False)
        values = {key: value.cpu() for key, value in job.model.state_dict().items()}
        rounded = {k: v.half() if v.is_floating_point() else v for k, v in values.items()}
        sizes = np.cumsum([value.numel() for value in rounded.values()])
        halves = [{}, {}]
        for (key, value), size in zip(rounded.items(), sizes, strict=True):
            halves[int(size > sizes[-1] / 2)][key] = value.contiguous()
        for file, half in zip(files, halves, strict=True):
            save_file(half, str(file))
    job.model.load_state_dict({k: v for file in files for k, v in load_file(str(file)).items()})
    return job


def digest(model: torch.nn.Module) -> str:
    """Return a name for a network's weights."""
    value = hashlib.sha256()
    for tensor in model.state_dict().values():
        value.update(tensor.cpu().contiguous().numpy().tobytes())
    return value.hexdigest()[:12]


def packed(bench: Bench) -> Splits:
    """Read CIFAR-10 from its archive or its folders; a tenth of each class is for validation."""
    archive = next(iter(sorted(bench.data.glob("*.tar.gz"))), None)
    files: list[tuple[str, bytes]] = []
    if archive is not None:
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.isfile():
                    content = tar.extractfile(member)
                    assert content is not None
                    files.append((member.name, content.read()))
    else:
        for path in sorted(bench.data.glob("*/*/*")):
            files.append((str(path.relative_to(bench.data)), path.read_bytes()))
    parts = [(Path(name).parts[-3:], content) for name, content in files]
    parts = sorted(part for part in parts if part[0][0] in ("train", "test"))
    classes = sorted({folder for (_, folder, _), _ in parts})
    images = torch.from_numpy(
        np.stack([np.array(Image.open(io.BytesIO(content))) for _, content in parts])
    ).permute(0, 3, 1, 2)
    labels = torch.tensor([classes.index(folder) for (_, folder, _), _ in parts])
    test = torch.tensor([split == "test" for (split, _, _), _ in parts])
    numbers = torch.tensor([int(re.sub(r"\D", "", name)) for (_, _, name), _ in parts])
    last = numbers >= 0.9 * (int(numbers[~test].max()) + 1)

    def split(which: torch.Tensor, **augmentation: Any) -> TensorImages:
        return TensorImages(
            images[which].contiguous(), labels[which], IMAGENET_MEAN, IMAGENET_STD, **augmentation
        )

    train = ~test & ~last
    return Splits(
        split(train, pad=4, mirror=True), split(train), split(~test & last), split(test), classes
    ).on_device()
