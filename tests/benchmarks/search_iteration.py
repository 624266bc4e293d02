"""Time a search iteration beside a training step of the original and stock NNI Proxyless.

    python tests/benchmarks/search_iteration.py --network resnet20 --batch 128 \\
        --candidates 2 --candidates 4 --candidates 8 --out raw.jsonl

The search is that of the defaults, from a start that is at the budget: alpha moves in every eighth
iteration, so times are sums of eight. Each contender runs in its own Lightning trainer, in a thread
of its own. They take turns at every batch, so that a disturbance of the machine affects all of them
alike and their ratios hold; on one processor thread it is that thread's time that counts. The
images are random: only time is measured here. ``--candidates 0`` is every pair of ranks.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import platform
import re
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Annotated

import pytorch_lightning as pl
import torch
import typer
from nni.nas.space import RawFormatModelSpace
from nni.nas.strategy import Proxyless
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from nni_haloc.inputs.models import build_model
from nni_haloc.search.evaluator import Classification
from nni_haloc.search.space import RankSpace
from nni_haloc.search.strategy import Haloc, InProcess, run_search
from nni_haloc.space.ranks import AllowedRanks, macs
from nni_haloc.training.finetuning import finetune
from nni_haloc.training.recipe import Recipe

CANDIDATES = [2, 4, 8]
SIZES = {"resnet20": (32, 10), "torchvision:resnet18": (224, 1000)}


@dataclass(frozen=True)
class Spread(AllowedRanks):
    """Allow ``number`` candidates in every layer that has room for them.

    They are dense, and ranks spread evenly over those that save anything. 0 allows every pair of
    the ranks that a search has by default.
    """

    number: int = 8

    def candidates(self, spec):
        if not self.number:
            return AllowedRanks(equal=False).candidates(spec)
        size = min(spec.in_channels, spec.out_channels)
        useful = [
            r
            for r in range(1, size + 1)
            if macs(spec, (r, r) if spec.kind == "conv" else (r,)) < macs(spec, None)
        ]
        wanted = self.number - 1
        ranks = (
            sorted(
                {useful[int((i + 0.5) * len(useful) / wanted)] for i in range(wanted)}, reverse=True
            )
            if useful
            else []
        )
        return [None, *((r, r) if spec.kind == "conv" else (r,) for r in ranks)]


class Clock(pl.Callback):
    """Time each batch from its start to its end, and let the next contender run one in between."""

    def __init__(self) -> None:
        self.ready, self.turn, self.seconds = threading.Event(), threading.Semaphore(0), []
        self.next = self

    def on_train_batch_start(self, *_) -> None:
        self.ready.set()
        self.turn.acquire()
        self.start = self.now()

    @staticmethod
    def now() -> float:
        """Return the thread's processor time; the clock's, where work is shared by threads."""
        return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()

    def on_train_batch_end(self, *_) -> None:
        self.seconds.append(self.now() - self.start)
        self.next.turn.release()


def race(
    jobs: dict[str, Callable[[Clock], object]], names: list[str], last: int
) -> dict[str, list[float]]:
    """Run jobs that train with a `Clock`, a batch of each in turn.

    Returns:
        By job, the seconds of its ``last`` batches.
    """

    def guarded(name: str) -> None:
        try:
            jobs[name](clocks[name])
        except BaseException:  # the others would wait for their turn for ever
            traceback.print_exc()
            os._exit(1)

    clocks = {name: Clock() for name in names}
    for clock, following in zip(
        clocks.values(), [*list(clocks.values())[1:], clocks[names[0]]], strict=True
    ):
        clock.next = following
    with ThreadPoolExecutor(len(names)) as pool:
        for name in names:  # set up one at a time: NNI's contexts are global
            pool.submit(guarded, name)
            clocks[name].ready.wait()
        clocks[names[0]].turn.release()
    return {name: clock.seconds[-last:] for name, clock in clocks.items()}


def main(
    network: Annotated[str, typer.Option(help="resnet20 or torchvision:resnet18")] = "resnet20",
    batch: int = 128,
    candidates: Annotated[list[int], typer.Option()] = CANDIDATES,
    iterations: Annotated[
        int, typer.Option(help="measured ones, a multiple of 4; as many come before them")
    ] = 32,
    threads: int = 1,
    precision: str = "32-true",
    memory_format: str = "contiguous",
    budget: Annotated[
        float,
        typer.Option(help="of the original's MACs: what the sampled networks cost on average"),
    ] = 0.5,
    supernet: Annotated[str, typer.Option(help="nested or separate")] = "nested",
    stock: Annotated[bool, typer.Option(help="run NNI's own Proxyless too")] = True,
    memory: Annotated[
        bool, typer.Option(help="then measure peak memory, each contender in a process of its own")
    ] = True,
    only: Annotated[
        str | None, typer.Option(help="run one contender alone and print its peak memory in MiB")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="append raw results to this file, a JSON line each")
    ] = None,
) -> None:
    torch.set_num_threads(threads)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    table = Table(
        title=f"{network}, batch {batch}, {threads} threads, {precision}, {memory_format}, "
        f"{budget:g} of the MACs"
    )
    columns = [
        "candidates",
        "ordinary step, ms",
        "search iteration",
        "ratio",
        "stock Proxyless",
        "stock / ours",
    ]
    for column in [*columns, "peak MiB: ordinary, search, stock"]:
        table.add_column(column, justify="right")
    for number in candidates:
        setting = Setting(
            network,
            batch,
            number,
            4 if only else iterations,
            precision,
            memory_format,
            budget,
            supernet,
        )
        if only:
            setting.jobs()[only](Free())
            print(_status("VmHWM"))
            return
        times = race(
            setting.jobs(), ["ordinary", "search", *(["stock"] if stock else [])], iterations
        )
        peaks = {name: _peak(name, setting, threads) for name in times} if memory else {}
        record = {
            **vars(setting),
            "threads": threads,
            "machine": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
            "seconds": times,
            "peak_mib": peaks,
        }
        if out:
            with out.open("a") as file:
                file.write(json.dumps(record) + "\n")
        table.add_row(*_row(record))
    Console(width=170).print(table)


@dataclass
class Setting:
    """Describe what is trained: a network, its rank space, batches of random images."""

    network: str
    batch: int
    candidates: int
    iterations: int
    precision: str
    memory_format: str
    budget: float
    supernet: str

    def jobs(self) -> dict[str, Callable[[pl.Callback], object]]:
        size, classes = SIZES[self.network]
        layout = (
            torch.channels_last
            if self.memory_format == "channels_last"
            else torch.contiguous_format
        )
        torch.manual_seed(0)
        model = build_model(self.network).to(memory_format=layout)
        batches = [
            (torch.randn(self.batch, 3, size, size), torch.randint(0, classes, (self.batch,)))
            for _ in range(2)
        ]
        batches = [(images.to(memory_format=layout), labels) for images, labels in batches]
        count = 2 * self.iterations
        allowed = Spread(number=self.candidates)
        nested = self.supernet == "nested"
        space = RankSpace(
            model, batches[0][0][:1], allowed=allowed, decomposition="hosvd", nested=nested
        )
        start = {layer: dict.fromkeys(row, 0.0) for layer, row in space.candidates.items()}
        options = {"precision": self.precision, "enable_progress_bar": False}
        recipe = Recipe(1, lr=0.01, schedule="constant")

        def loader() -> DataLoader:
            return DataLoader([batches[i % 2] for i in range(count)], batch_size=None)

        def evaluator(clock: pl.Callback):
            return Classification(loader(), loader(), recipe, callbacks=[clock], **options)

        strategy = Haloc(space.costs, self.budget, start=start)
        return {
            "ordinary": lambda clock: finetune(
                copy.deepcopy(model), loader(), recipe, callbacks=[clock], **options
            ),
            "search": lambda clock: run_search(space, evaluator(clock), strategy),
            "stock": lambda clock: Proxyless()(
                RawFormatModelSpace.from_model(copy.deepcopy(space), evaluator(clock)), InProcess()
            ),
        }


class Free(pl.Callback):
    """Stand in for a `Clock`: a contender that runs alone waits for nobody."""


def _peak(name: str, setting: Setting, threads: int) -> float:
    options = [f"--{key.replace('_', '-')}={value}" for key, value in vars(setting).items()]
    command = [
        sys.executable,
        "-W",
        "ignore",
        __file__,
        *options,
        f"--threads={threads}",
        f"--only={name}",
    ]
    return float(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
    )


def _status(key: str) -> float:
    """Return a figure of this process in MiB; getrusage would count the parent before exec."""
    return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def _row(record: dict) -> list[str]:
    times, peaks = record["seconds"], record["peak_mib"]

    times = {
        name: [sum(seconds[i : i + 8]) / 8 for i in range(0, len(seconds), 8)]
        for name, seconds in times.items()
    }

    def ms(name: str) -> str:
        low, middle, high = quantiles(times[name], n=4)
        return f"{1e3 * middle:.0f} ({1e3 * low:.0f}-{1e3 * high:.0f})"

    def ratio(a: str, b: str) -> str:
        low, middle, high = quantiles([x / y for x, y in zip(times[a], times[b], strict=True)], n=4)
        return f"{middle:.2f} ({low:.2f}-{high:.2f})"

    row = [
        str(record["candidates"]),
        ms("ordinary"),
        ms("search"),
        ratio("search", "ordinary"),
    ]
    row += [ms("stock"), ratio("stock", "search")] if "stock" in times else ["", ""]
    return [*row, ", ".join(f"{peak:.0f}" for peak in peaks.values())]


if __name__ == "__main__":
    typer.run(main)
