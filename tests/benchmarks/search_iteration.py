"""How long one search iteration takes, beside an ordinary training step of the uncompressed network and stock NNI Proxyless.

Each contender runs in its own Lightning trainer in a thread of its own; they take turns at every batch, so that a disturbance of the
machine falls on all of them and their ratios hold. Images are random: only time is measured here.

    python tests/benchmarks/search_iteration.py --network resnet20 --batch 128 --candidates 2 --candidates 4 --candidates 8 --out raw.jsonl
"""

from __future__ import annotations

import copy
import json
import logging
import os
import platform
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated

import pytorch_lightning as pl
import torch
import typer
from nni.nas.space import RawFormatModelSpace
from nni.nas.strategy import Proxyless
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, TensorDataset

from nni_haloc import Haloc, RankRules, RankSpace, Recipe, classification, finetune, mac_table
from nni_haloc.models import build_model
from nni_haloc.nas.engine import InProcess, run_search
from nni_haloc.ranks import macs

WARM_UP = 3
SIZES = {"resnet20": (32, 10), "torchvision:resnet18": (224, 1000)}


@dataclass(frozen=True)
class Spread(RankRules):
    """``number`` candidates in every layer that has room for them: dense, and ranks spread evenly over those that save anything."""

    number: int = 8

    def candidates(self, spec):
        size = min(spec.in_channels, spec.out_channels)
        useful = [r for r in range(1, size + 1) if macs(spec, (r, r) if spec.kind == "conv" else (r,)) < macs(spec, None)]
        wanted = self.number - 1
        ranks = sorted({useful[int((i + 0.5) * len(useful) / wanted)] for i in range(wanted)}, reverse=True) if useful else []
        return [None, *((r, r) if spec.kind == "conv" else (r,) for r in ranks)]


class Clock(pl.Callback):
    """Seconds from a batch's start to its end; between batches the next contender's trainer runs one."""

    def __init__(self) -> None:
        self.ready, self.turn, self.seconds = threading.Event(), threading.Semaphore(0), []
        self.next = self

    def on_train_batch_start(self, *_) -> None:
        self.ready.set()
        self.turn.acquire()
        self.start = time.perf_counter()

    def on_train_batch_end(self, *_) -> None:
        self.seconds.append(time.perf_counter() - self.start)
        self.next.turn.release()


def race(jobs: dict[str, Callable[[Clock], object]]) -> dict[str, list[float]]:
    """Run jobs that train with a `Clock`, a batch of each in turn; seconds of every batch after the warm-up."""

    def guarded(job: Callable[[Clock], object], clock: Clock) -> None:
        try:
            job(clock)
        except BaseException:  # the others would wait for their turn for ever
            traceback.print_exc()
            os._exit(1)

    clocks = {name: Clock() for name in jobs}
    for clock, following in zip(clocks.values(), [*list(clocks.values())[1:], next(iter(clocks.values()))], strict=True):
        clock.next = following
    with ThreadPoolExecutor(len(jobs)) as pool:
        for name, job in jobs.items():  # set up one at a time: NNI's contexts are global
            pool.submit(guarded, job, clocks[name])
            clocks[name].ready.wait()
        next(iter(clocks.values())).turn.release()
    return {name: clock.seconds[WARM_UP:] for name, clock in clocks.items()}


def main(
    network: Annotated[str, typer.Option(help="resnet20 or torchvision:resnet18")] = "resnet20",
    batch: int = 128,
    candidates: Annotated[list[int], typer.Option()] = [2, 4, 8],  # noqa: B006
    iterations: Annotated[int, typer.Option(help="measured ones, after three to warm up")] = 15,
    threads: int = 1,
    precision: str = "32-true",
    memory_format: str = "contiguous",
    budget: Annotated[float, typer.Option(help="of the original's MACs, which the sampled networks cost on average")] = 0.5,
    stock: Annotated[bool, typer.Option(help="run NNI's own Proxyless too")] = True,
    out: Annotated[Path | None, typer.Option(help="append raw results to this file, a JSON line each")] = None,
) -> None:
    torch.set_num_threads(threads)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    size, classes = SIZES[network]
    generator = torch.Generator().manual_seed(0)
    count = batch * (iterations + WARM_UP)
    images = torch.randn(2 * batch, 3, size, size, generator=generator).repeat(-(-count // (2 * batch)), 1, 1, 1)[:count]
    data = TensorDataset(images, torch.randint(0, classes, (count,), generator=generator))
    torch.manual_seed(0)
    layout = torch.channels_last if memory_format == "channels_last" else torch.contiguous_format
    model, images = build_model(network).to(memory_format=layout), images.to(memory_format=layout)
    table = Table(
        title=f"{network}, batch {batch}, {threads} threads, {precision}, {memory_format}: ms an iteration, median of {iterations}"
    )
    for column in ("candidates", "ordinary step", "search iteration", "ratio", "stock Proxyless", "stock / ours"):
        table.add_column(column, justify="right")
    for number in candidates:
        rules = Spread(number=number)
        space = RankSpace(model, images[:1], mac_table(model, images[:1], rules), rules, decomposition="hosvd")
        times = _measure(model, space, data, batch, precision, stock, budget)
        record = {
            "network": network, "batch": batch, "threads": threads, "precision": precision, "memory_format": memory_format,
            "candidates": number, "budget": budget,
            "most": max(map(len, space.candidates.values())), "machine": platform.processor() or platform.machine(),
            "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "seconds": times,
        }  # fmt: skip
        if out:
            with out.open("a") as file:
                file.write(json.dumps(record) + "\n")
        table.add_row(*_row(number, times))
    Console(width=140).print(table)


def _measure(model, space, data, batch, precision, stock, budget) -> dict[str, list[float]]:
    options = {"precision": precision, "enable_progress_bar": False}
    recipe = Recipe(1, lr=0.01, schedule="constant")

    def loader() -> DataLoader:
        return DataLoader(data, batch)

    def evaluator(clock: Clock):
        return classification(loader(), loader(), recipe, callbacks=[clock], **options)

    strategy = Haloc(space.costs, budget * space.costs.original)
    jobs = {
        "ordinary": lambda clock: finetune(copy.deepcopy(model), loader(), recipe, callbacks=[clock], **options),
        "search": lambda clock: run_search(space, evaluator(clock), strategy),
    }
    if stock:
        jobs["stock"] = lambda clock: Proxyless()(RawFormatModelSpace.from_model(copy.deepcopy(space), evaluator(clock)), InProcess())
    return race(jobs)


def _row(number: int, times: dict[str, list[float]]) -> list[str]:
    def ms(name: str) -> str:
        low, _, high = quantiles(times[name], n=4)
        return f"{1e3 * median(times[name]):.0f} ({1e3 * low:.0f}-{1e3 * high:.0f})"

    def ratio(a: str, b: str) -> str:
        values = [x / y for x, y in zip(times[a], times[b], strict=True)]
        low, middle, high = quantiles(values, n=4)
        return f"{middle:.2f} ({low:.2f}-{high:.2f})"

    row = [str(number), ms("ordinary"), ms("search"), ratio("search", "ordinary")]
    return row + ([ms("stock"), ratio("stock", "search")] if "stock" in times else ["", ""])


if __name__ == "__main__":
    typer.run(main)
