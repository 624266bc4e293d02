"""Compress networks in minutes, with a few hundred images, no labels but for the report.

    python tests/benchmarks/minutes.py lite0 --data FOLDER
    python tests/benchmarks/minutes.py resnet20 --data FOLDER
    python tests/benchmarks/minutes.py vgg16 --data FOLDER

FOLDER has, for EfficientNet-Lite0 (timm), ``efficientnet-lite0-timm.safetensors`` and
``imagenet-500.tar``: the even images calibrate and choose, the odd ones are reported. For ResNet-20
it has ``resnet20-cifar10-jpeg-45k.pt`` and ``cifar10-jpeg.tar.gz``: 512 training images calibrate,
the 5,000 validation images are reported. VGG-16 of half width has the same images and
``vgg16-half.safetensors``, which ``haloc train tests/benchmarks/vgg16_half.yml`` makes.

Each method chooses ranks at each budget, and its network is decomposed for the data; it is measured
so, and again after its blocks were reconstructed. Rows are appended; those that are there are not
made again. ``--report`` prints tables.
"""

from __future__ import annotations

import io
import json
import tarfile
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from nni_haloc.costs.analytic import mac_table
from nni_haloc.costs.table import worthwhile
from nni_haloc.inputs.models import build_model
from nni_haloc.inputs.normalisation import IMAGENET_MEAN, IMAGENET_STD
from nni_haloc.plan.budget import Limit
from nni_haloc.plan.rules import RULES, Problem, plan
from nni_haloc.space.modules import evaluating
from nni_haloc.space.ranks import AllowedRanks, find_layers
from nni_haloc.training.reconstruction import reconstruct_blocks

RAW = Path(__file__).parents[2] / "docs" / "raw" / "minutes.jsonl"
BUDGETS = {"lite0": (0.9, 0.8, 0.7, 0.6), "resnet20": (0.6, 0.45, 0.28), "vgg16": (0.6, 0.45, 0.28)}
KEYS = ("network", "method", "budget")
METHODS = ("sensitivity-knapsack", "uniform", "error-knapsack", "alds", "energy")


class Data:
    """Hold a network and its images.

    Attributes:
        model: the trained network, in channels-last format.
        allowed: its rank space.
        images, labels: to calibrate with; the labels are for rules that need some.
        shown, truth: to report on.
    """

    def __init__(self, network: str, folder: Path) -> None:
        self.allowed = AllowedRanks()
        if network == "lite0":
            import timm

            model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
            model.load_state_dict(load_file(folder / "efficientnet-lite0-timm.safetensors"))
            images, labels = imagenet(folder / "imagenet-500.tar")
            parts = images[::2], labels[::2], images[1::2], labels[1::2]
        else:
            if network == "vgg16":
                model = build_model("vgg16", {"width": 0.5})
                weights = load_file(folder / "vgg16-half.safetensors")
            else:
                model = build_model("resnet20", {})
                weights = torch.load(folder / "resnet20-cifar10-jpeg-45k.pt", weights_only=True)
            model.load_state_dict(weights)
            first = "features.0" if network == "vgg16" else "conv1"
            self.allowed = AllowedRanks(kinds=("conv",), exclude=(first,))
            parts = cifar(folder / "cifar10-jpeg.tar.gz")
        self.model = model.eval().to(memory_format=torch.channels_last)
        self.images, self.labels, self.shown, self.truth = parts
        self.images = self.images.contiguous(memory_format=torch.channels_last)
        self.original = logits(self.model, self.shown)


def imagenet(file: Path) -> tuple[Tensor, Tensor]:
    """Read the images, resized to 256 and cropped to 224 pixels."""
    images, labels = [], []
    with tarfile.open(file) as tar:
        for member in sorted(tar.getmembers(), key=lambda m: m.name):
            if not member.name.endswith(".jpg"):
                continue
            image = Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB")
            scale = 256 / min(image.size)
            size = [round(side * scale) for side in image.size]
            image = image.resize(size, Image.Resampling.BILINEAR)
            left, top = ((side - 224) // 2 for side in size)
            pixels = np.array(image.crop((left, top, left + 224, top + 224)))
            images.append((torch.from_numpy(pixels).permute(2, 0, 1).float() - 127) / 128)
            labels.append(int(Path(member.name).name[:4]))
    return torch.stack(images), torch.tensor(labels)


def cifar(file: Path, number: int = 512) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Read ``number`` training images and all validation images: those from 4500.jpg on."""
    known: dict[bool, list[tuple[str, bytes]]] = {False: [], True: []}
    with tarfile.open(file) as tar:
        for member in tar:
            path = Path(member.name)
            if member.isfile() and "train" in path.parts:
                content = tar.extractfile(member).read()
                known[int(path.stem) >= 4500].append((member.name, content))
    classes = sorted({Path(name).parent.name for name, _ in known[True]})
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))

    def read(files: list[tuple[str, bytes]]) -> tuple[Tensor, Tensor]:
        pixels = np.stack([np.array(Image.open(io.BytesIO(content))) for _, content in files])
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
        labels = [classes.index(Path(name).parent.name) for name, _ in files]
        return (images - mean) / std, torch.tensor(labels)

    order = torch.randperm(len(known[False]), generator=torch.Generator().manual_seed(0))
    training = sorted(known[False])
    return *read([training[i] for i in order[:number]]), *read(sorted(known[True]))


@torch.no_grad()
def logits(network: nn.Module, images: Tensor) -> Tensor:
    with evaluating(network):
        parts = images.split(100)
        return torch.cat([network(x.contiguous(memory_format=torch.channels_last)) for x in parts])


def measured(network: nn.Module, data: Data) -> dict[str, float]:
    """Return top-1, agreement with the original, and the divergence from it."""
    found = logits(network, data.shown)
    log_p, log_q = (z.log_softmax(1) for z in (data.original, found))
    return {
        "top1": float((found.argmax(1) == data.truth).float().mean()),
        "agreement": float((found.argmax(1) == data.original.argmax(1)).float().mean()),
        "divergence": float(F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)),
    }


def rows(network: str, data: Data, method: str, known: list[dict[str, Any]]) -> Any:
    """Yield the rows of a method that are missing, two for each budget."""
    missing = [
        budget
        for budget in BUDGETS[network]
        if not any(
            (network, method, budget, "reconstructed") == tuple(map(row.get, (*KEYS, "weights")))
            for row in known
        )
    ]
    pairs, every_rank = (getattr(RULES[method], mark, False) for mark in ("pairs", "every_rank"))
    allowed = replace(data.allowed, equal=not pairs, step="every" if every_rank else None)
    layers = find_layers(data.model, data.images[:1], allowed)
    macs = mac_table(data.model, data.images[:1], allowed, layers)
    candidates, _ = worthwhile(layers.candidates(allowed), [macs])
    known_facts: dict[str, Any] = {}  # what does not depend on the budget: the first one pays
    for budget in missing:
        limit = Limit(macs, budget * macs.original)
        problem = Problem(data.model, layers.specs, candidates, [limit], data.images, data.labels)
        vars(problem).update(known_facts)
        started = time.process_time()
        chosen = plan(problem, method)
        row: dict[str, Any] = dict(zip(KEYS, (network, method, budget), strict=True))
        row |= {"choose_s": time.process_time() - started, "ranks": chosen.names}
        facts = ("evidence", "errors", "modules")
        known_facts = {key: vars(problem)[key] for key in facts if key in vars(problem)}
        row["macs"] = chosen.chosen_by["cost"] / macs.original
        made = problem.network(chosen.names)
        first = row | {"weights": "decomposed", "fit_s": 0.0, **measured(made, data)}
        started = time.process_time()
        reconstruct_blocks(made, data.model, data.images, list(chosen.ranks))
        fit_s = time.process_time() - started
        yield first
        yield row | {"weights": "reconstructed", "fit_s": fit_s, **measured(made, data)}


def table(lines: list[dict[str, Any]], network: str) -> str:
    found: dict[tuple[str, str], dict[float, dict[str, Any]]] = defaultdict(dict)
    for row in lines:
        if row["network"] == network:
            found[row["method"], row["weights"]][row["budget"]] = row
    budgets = BUDGETS[network]
    text = ["| ranks by | weights | " + " | ".join(f"{100 * b:g} %" for b in budgets) + " | s |"]
    text.append("| --- " * (len(budgets) + 3) + "|")
    for (method, weights), row in found.items():
        cells = [f"{100 * row[b]['top1']:.1f}" if b in row else "" for b in budgets]
        spent = sum(max(line[key] for line in row.values()) for key in ("choose_s", "fit_s"))
        text.append(f"| {method} | {weights} | {' | '.join(cells)} | {spent:.0f} |")
    return "\n".join(text)


def main(
    network: Annotated[str, typer.Argument(help=" or ".join(BUDGETS))] = "lite0",
    data: Annotated[Path | None, typer.Option(help="folder of images and weights")] = None,
    method: Annotated[list[str] | None, typer.Option(help="these alone")] = None,
    threads: int = 1,
    out: Annotated[Path, typer.Option(help="JSON lines, appended to")] = RAW,
    report: Annotated[bool, typer.Option(help="print tables, measure nothing")] = False,
) -> None:
    known = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    if report or data is None:
        print("\n\n".join(f"{name}\n\n{table(known, name)}" for name in BUDGETS))
        return
    torch.set_num_threads(threads)
    images = Data(network, data)
    for name in method or METHODS:
        for row in rows(network, images, name, known):
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            shown = {key: row[key] for key in ("method", "budget", "weights", "top1")}
            print(shown, flush=True)


if __name__ == "__main__":
    typer.run(main)
