"""Time training steps and search iterations, beside the limit by counted work."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from functools import cache
from itertools import chain, count, islice, product
from statistics import quantiles
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from benchmarks.on_cuda.bench import Bench
from benchmarks.search_iteration import Spread
from torch import nn

from nni_haloc.costs.analytic import measure_peaks
from nni_haloc.costs.counts import count_macs
from nni_haloc.costs.device.torch_runtime import TorchRuntime
from nni_haloc.inputs.data import Splits
from nni_haloc.inputs.models import build_model
from nni_haloc.inputs.normalisation import IMAGENET_MEAN, IMAGENET_STD
from nni_haloc.inputs.tensor_images import TensorImages
from nni_haloc.search.evaluator import Classification
from nni_haloc.search.space import RankSpace
from nni_haloc.search.strategy import Haloc, run_search
from nni_haloc.training.finetuning import finetune
from nni_haloc.training.recipe import Recipe

SPEED = {  # network: name, image size, classes, batch
    "resnet20": ("resnet20", 32, 10, 128),
    "vgg16": ("vgg16", 32, 10, 128),
    "resnet18": ("torchvision:resnet18", 224, 1000, 128),
}
WINDOW, WINDOWS = 25, 8
"""Iterations that are timed together, and how often; the first two windows are warm-up."""


class Windows(pl.Callback):
    """Time windows of iterations; the device is waited for only between them."""

    def __init__(self, device: str, size: int) -> None:
        self.device, self.size, self.seconds, self.start = device, size, [], 0.0

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, i: int
    ) -> None:
        if (i + 1) % self.size == 0:
            if self.device == "cuda":
                torch.cuda.synchronize()
            now = time.perf_counter()
            self.seconds.append((now - self.start) / self.size)
            self.start = now


def speed(bench: Bench) -> None:
    for numbers in ((0, 8), (2, 16)):
        for network in SPEED:
            for mode, candidates in product(("compiled", "eager"), numbers):
                key = {"part": "speed", "network": network, "mode": mode, "candidates": candidates}
                bench.add(key, lambda k=key: one_speed(bench, **k))
    for network in SPEED:
        bench.add({"part": "limit", "network": network}, lambda n=network: limit(bench, n))


def one_speed(
    bench: Bench, network: str, mode: str, candidates: int, part: str = ""
) -> dict[str, Any]:
    """Time an ordinary training step (0 candidates), or a search iteration at its defaults."""
    name, size, classes, batch = SPEED[network]
    batch = bench.few(batch, 4)
    if bench.device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    window, number = bench.few(WINDOW, 2), bench.few(WINDOWS, 3)
    windows = Windows(bench.device, window)
    torch.manual_seed(0)
    model = build_model(name).to(memory_format=torch.channels_last)
    data = random_images(min(batch * window * number, 4096), size, classes)
    splits = Splits(data, data, data, data, list(map(str, range(classes)))).on_device()
    loaders = [
        Repeated(splits.loader("train", batch, shuffle=True, seed=i), window * number)
        for i in range(2)
    ]
    options: dict[str, Any] = {"enable_progress_bar": False, "callbacks": [windows]}
    options["accelerator"] = "gpu" if bench.device == "cuda" else "cpu"
    recipe = Recipe(1, lr=1e-4, schedule="constant")
    compile = mode == "compiled"
    if candidates:
        allowed = Spread(number=candidates)
        example = torch.zeros(1, 3, size, size)
        space = RankSpace(model, example, allowed=allowed, decomposition="hosvd")
        start = {layer: dict.fromkeys(row, 0.0) for layer, row in space.candidates.items()}
        strategy = Haloc(space.costs, 0.5, start=start, compile=compile)
        run_search(space, Classification(*loaders, recipe, **options), strategy)
    else:
        finetune(model, loaders[0], recipe, compile=compile, **options)
    times = windows.seconds[2:]
    low, middle, high = quantiles(times, n=4) if len(times) > 1 else times * 3
    return {
        "batch": batch,
        "ms": [1e3 * low, 1e3 * middle, 1e3 * high],
        "images_per_s": batch / middle,
        "peak_mib": torch.cuda.max_memory_allocated() / 2**20 if bench.device == "cuda" else None,
    }


class Repeated:
    """Go through a loader again and again, for a number of batches.

    Args:
        loader: the loader.
        number: of batches in an epoch.
    """

    def __init__(self, loader: Any, number: int) -> None:
        self.loader, self.number = loader, number

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[Any]:
        return islice(chain.from_iterable(iter(self.loader) for _ in count()), self.number)


@cache
def random_images(number: int, size: int, classes: int) -> TensorImages:
    """Draw images and labels, the same in each call."""
    generator = np.random.default_rng(0)
    images = torch.from_numpy(generator.integers(0, 256, (number, 3, size, size), dtype=np.uint8))
    labels = torch.from_numpy(generator.integers(0, classes, number))
    shift = size // 8 if size < 64 else 0
    return TensorImages(images, labels, IMAGENET_MEAN, IMAGENET_STD, pad=shift, mirror=True)


@cache
def peaks(device: str) -> tuple[float, float]:
    """Measure operations and bytes a second."""
    return measure_peaks(TorchRuntime(device), 4096 if device == "cuda" else 512)


def limit(bench: Bench, network: str) -> dict[str, Any]:
    """Count the operations and bytes of a training step, and the time that they take at best.

    Convolutions and matrix products run three times, forward and for both gradients. Each module
    without children reads its input and writes its output forward, and reads both and the output's
    gradient and writes the input's backward.
    """
    name, size, _, batch = SPEED[network]
    batch = bench.few(batch, 4)
    model, moved = build_model(name), 0
    example = torch.zeros(1, 3, size, size)

    def add(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        nonlocal moved
        moved += 3 * inputs[0].numel() + 3 * output.numel()

    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(add)
    with torch.no_grad():
        model.eval()(example)
    flops, bandwidth = peaks(bench.device)
    operations = 3 * 2 * count_macs(model, example) * batch
    transferred = 4 * moved * batch
    return {
        "batch": batch,
        "operations": operations,
        "bytes": transferred,
        "flops": flops,
        "bandwidth": bandwidth,
        "ms": 1e3 * max(operations / flops, transferred / bandwidth),
    }
