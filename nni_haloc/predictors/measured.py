"""Latency measured on the machine at hand, one entry per distinct layer shape and rank."""

from __future__ import annotations

import copy
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from ..ranks import DENSE, Rank, RankRules, evaluating, find_layers
from .table import CostTable

MemoryFormat = Literal["contiguous", "channels_last"]


def latency_table(
    model: nn.Module,
    example_input: Tensor,
    rules: RankRules = RankRules(),
    *,
    memory_format: MemoryFormat = "contiguous",
    threads: int | None = None,
    min_run_time: float = 0.05,
    rounds: int = 3,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> CostTable:
    """Milliseconds that every candidate takes on this machine for the batch of ``example_input (N, ...)``.

    Each distinct (geometry, input shape, rank) is timed by itself: ``rounds`` passes over the whole list, so that a disturbance does not
    fall on one entry alone, and the median of their medians. ``fixed`` is the whole network's time less that of its searched layers, and
    not below zero: layers timed alone do not see each other's caches. ``threads``: torch's setting where None.
    """
    layers = find_layers(model, example_input, rules)
    candidates: dict[str, dict[str, Rank]] = {name: {DENSE: None, **row} for name, row in layers.candidates(rules).items()}
    keys = {
        (name, candidate): (replace(layers.specs[name], name=""), rank)
        for name, row in candidates.items()
        for candidate, rank in row.items()
    }
    distinct = list(dict.fromkeys(keys.values()))
    seconds: dict[Any, list[float]] = {key: [] for key in distinct}
    whole = []
    of, done = rounds * (len(distinct) + 1), 0
    with _threads(threads) as used:
        for _ in range(rounds):
            for spec, rank in distinct:
                layer = spec.build(rank).eval().to(example_input)
                calls = [torch.randn(shape).to(example_input) for shape in spec.input_shapes]
                seconds[spec, rank].append(sum(_time(layer, x, memory_format, min_run_time) for x in calls))
                done += 1
                progress(done, of)
            whole.append(_time(copy.deepcopy(model), example_input, memory_format, min_run_time))
            done += 1
            progress(done, of)
    costs = {name: {candidate: 1e3 * median(seconds[keys[name, candidate]]) for candidate in row} for name, row in candidates.items()}
    fixed = max(0.0, 1e3 * median(whole) - sum(row[DENSE] for row in costs.values()))
    identity = {
        "device": platform.processor() or platform.machine(),
        "input": list(example_input.shape),
        "dtype": str(example_input.dtype).removeprefix("torch."),
        "memory_format": memory_format,
        "threads": used,
        "torch": torch.__version__,
        "rounds": rounds,
    }
    return CostTable("latency_ms", costs, fixed, identity)


def measure_latency(
    models: Mapping[str, nn.Module],
    example_input: Tensor,
    *,
    memory_format: MemoryFormat = "contiguous",
    threads: int | None = None,
    min_run_time: float = 0.1,
    rounds: int = 5,
) -> dict[str, float]:
    """Milliseconds of a forward pass of each network: timed in alternation, the median of ``rounds`` medians."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    copies = {name: copy.deepcopy(model) for name, model in models.items()}
    with _threads(threads):
        for _ in range(rounds):
            for name, model in copies.items():
                seconds[name].append(_time(model, example_input, memory_format, min_run_time))
    return {name: 1e3 * median(values) for name, values in seconds.items()}


def _time(model: nn.Module, x: Tensor, memory_format: MemoryFormat, min_run_time: float) -> float:
    """Median seconds of ``model(x)`` in evaluation mode; the model is moved to the memory format."""
    if memory_format == "channels_last":
        model = model.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    with evaluating(model), torch.inference_mode():
        model(x)  # warm up: allocation, and the library's choice of algorithm
        timer = Timer("model(x)", globals={"model": model, "x": x}, num_threads=torch.get_num_threads())
        return timer.blocked_autorange(min_run_time=min_run_time).median


@contextmanager
def _threads(number: int | None) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
