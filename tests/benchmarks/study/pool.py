"""Make rows in several processes that share a device, on CIFAR-10 that is unpacked once."""

from __future__ import annotations

import io
import os
import re
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.on_cuda.bench import Bench
from PIL import Image

from nni_haloc.inputs.data import Splits
from nni_haloc.inputs.normalisation import IMAGENET_MEAN, IMAGENET_STD
from nni_haloc.inputs.registries import DATA
from nni_haloc.inputs.tensor_images import TensorImages


@contextmanager
def processes(bench: Bench) -> Iterator[ProcessPoolExecutor]:
    """Start the processes; they are killed in the end, since the minutes may be over."""
    pool = ProcessPoolExecutor(bench.jobs, get_context("spawn"), start, (bench,))
    try:
        yield pool
    finally:
        for process in list((pool._processes or {}).values()):
            process.kill()
        pool.shutdown(wait=False, cancel_futures=True)


def run(bench: Bench, pool: ProcessPoolExecutor, keys: list[dict], make: Any, *rest: Any) -> None:
    """Have the processes make rows; each is appended when it is there."""
    futures = {
        pool.submit(timed, make, bench, key, *rest): key for key in keys if not bench.has(key)
    }
    for future in as_completed(futures):
        facts, seconds = future.result()
        bench.append(futures[future], facts, seconds)


def timed(make: Any, bench: Bench, key: dict[str, Any], *rest: Any) -> tuple[dict, float]:
    """Make a row; one that fails is a row with its error."""
    started = time.monotonic()
    facts = bench.facts(lambda: make(bench, key, *rest))
    return facts, time.monotonic() - started


def start(bench: Bench) -> None:
    """Prepare a process."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // bench.jobs))
    DATA.register("benchmark")(lambda settings: cached(bench))


def cache(bench: Bench) -> None:
    """Unpack CIFAR-10 once, for all processes."""
    file = bench.work / "cifar10.npz"
    if not file.exists():
        bench.work.mkdir(parents=True, exist_ok=True)
        splits, parts = packed(bench), {}
        for name in ("train", "val", "test"):
            split = getattr(splits, name)
            parts |= {f"{name}_images": split.images, f"{name}_labels": split.labels}
        np.savez(file, classes=splits.classes, **{k: v.numpy() for k, v in parts.items()})


def cached(bench: Bench) -> Splits:
    """Read CIFAR-10."""
    with np.load(bench.work / "cifar10.npz") as held:
        values = {name: held[name] for name in held.files}
    few = slice(None, None, max(1, round(0.5 / bench.scale)))

    def split(name: str, **augmentation: Any) -> TensorImages:
        images, labels = (
            torch.from_numpy(values[f"{name}_{x}"][few]) for x in ("images", "labels")
        )
        return TensorImages(images, labels, IMAGENET_MEAN, IMAGENET_STD, **augmentation)

    train = split("train", pad=4, mirror=True)
    parts = (train, split("train"), split("val"), split("test"))
    return Splits(*parts, [str(name) for name in values["classes"]]).on_device()


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
