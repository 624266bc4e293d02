"""The paper's Table 3 for one's own network: for each device at hand a plan that is made for it, its counts, and images a second."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch

from .compression import RANKS_FILE
from .config import Config
from .device.files import write_json
from .device.measuring import Timing, measure, time_together
from .device.onnx_runtime import OnnxRuntime
from .device.spec import Specification
from .job import Job
from .log import logger
from .measure import progress
from .predictors import specify
from .printing import percent, print_table
from .ranks import RankPlan
from .run import run_job
from .tables import latency_input, rules_of, runtime_of
from .yaml_files import ConfigError

DEVICES = {"torch": None, "onnxruntime": "onnxruntime", "eyeriss": "zigzag", "cuda": None}
"""Names that ``--on`` takes, and the package that each needs."""
CLOCK = 200e6
"""Cycles a second of the Eyeriss chip (Chen et al., 2016)."""
_HEADINGS = {
    "batch_size": "batch", "baseline_top1": "top-1, original", "default": "top-1", "baseline_top5": "top-5, original", "top5": "top-5",
    "macs": "MACs", "macs_reduction": "less", "original_images_per_s": "images/s, original", "images_per_s": "images/s",
    "speedup": "times as fast", "reason": "why not",
}  # fmt: skip
THROUGHPUT_FILE, TABLE_FILE = "throughput.json", "table.json"


def at_hand() -> list[str]:
    """The devices that this machine has."""
    found = [name for name, package in DEVICES.items() if package is None or find_spec(package)]
    return [name for name in found if name != "cuda" or torch.cuda.is_available()]


def throughput(config: Config, folder: str | Path, devices: Sequence[str], *, resume: bool = False) -> list[dict[str, Any]]:
    """Compress the network of ``config`` once for each device, to the budget's fraction of what the original costs there.

    Each has a folder of its own in ``folder``, with its cost table and a run's results, and a row of ``throughput.json``: accuracies, MACs,
    and images a second of the original and the compressed network, by ``cost.batch_size`` (on the array one image). A device on which
    it cannot be done has the reason in its row. ``resume``: as for `run`; cost tables go on where they were stopped in any case.
    `ConfigError` where nothing could be done on any.
    """
    if config.budget.fraction is None:
        raise ConfigError("budget.fraction: expected, because devices have different costs; found budget.absolute")
    if config.trainer.devices * config.trainer.num_nodes > 1:
        raise ConfigError("trainer.devices: expected 1, because devices come one after another here")
    job, rows = Job(config, folder), []
    for device in devices:
        logger.info("%s:", device)
        try:
            rows.append({"device": device, **_row(job.at(_config_for(config, device), job.folder / device), device, resume)})
        except ConfigError as error:
            logger.error("%s: %s", device, error)
            rows.append({"device": device, "reason": str(error)})
    if all("reason" in row for row in rows):
        raise ConfigError("; ".join(f"{row['device']}: {row['reason']}" for row in rows))
    write_json(job.folder / THROUGHPUT_FILE, {"version": 1, "rows": rows})
    return rows


def print_throughput(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """The rows of `throughput` as a table; accuracies and reductions in percent, columns that no row has left out."""
    columns: dict[str, Callable[[Any], str]] = {
        "device": str, "batch_size": str, "baseline_top1": _percent, "default": _percent, "baseline_top5": _percent, "top5": _percent,
        "macs": lambda n: f"{n / 1e6:,.1f} M", "macs_reduction": _percent, "original_images_per_s": _speed,
        "images_per_s": _speed, "speedup": lambda n: f"{n:.2f}", "reason": str,
    }  # fmt: skip
    used = [key for key in columns if any(key in row for row in rows)]
    cells = [[columns[key](row[key]) if key in row else None for key in used] for row in rows]
    print_table(title, [_HEADINGS.get(key, key) for key in used], cells, text={"device", _HEADINGS["reason"]})


def _percent(share: float) -> str:
    return percent(share, 2)


def _speed(images: float) -> str:
    return f"{images:,.0f}" if images >= 100 else f"{images:.3g}"


def _config_for(config: Config, device: str) -> Config:
    changes: dict[str, Any] = {"metric": "cycles" if device == "eyeriss" else "latency_ms", "table": None}
    changes |= {"device": "cuda" if device == "cuda" else "cpu"}
    changes |= {"memory_format": "contiguous"} if device == "onnxruntime" else {}
    return config.model_copy(update={"cost": config.cost.model_copy(update=changes)})


def _row(job: Job, device: str, resume: bool) -> dict[str, Any]:
    if device != "eyeriss":
        spec = _measured(job, device)
    metrics = run_job(job, resume=resume)
    keys = ("baseline_top1", "default", "baseline_top5", "top5", "macs", "macs_reduction")
    row: dict[str, Any] = {key: metrics[key] for key in keys if key in metrics}
    plan, batch = RankPlan.load(job.folder / RANKS_FILE), job.config.cost.batch_size
    if device == "eyeriss":
        seconds = {name: plan.chosen_by[key] / CLOCK for name, key in (("original", "original_cost"), ("compressed", "cost"))}
        batch = 1
    elif device == "onnxruntime":
        runtime = OnnxRuntime(job.config.cost.threads)
        runs = {"original": runtime.network(spec, {}), "compressed": runtime.network(spec, plan.names)}
        times = [time_together(runs, runtime, 0.1) for _ in range(5)]
        seconds = {name: median(found[name] for found in times) for name in runs}
    else:
        seconds = {"original": metrics["baseline_latency_ms"] / 1e3, "compressed": metrics["latency_ms"] / 1e3}
    speeds = {"original_images_per_s": batch / seconds["original"], "images_per_s": batch / seconds["compressed"]}
    return {"batch_size": batch, **row, **speeds, "speedup": seconds["original"] / seconds["compressed"]}


def _measured(job: Job, device: str) -> Specification:
    """Measure the device's cost table, and have the job use it."""
    file, config = job.folder / TABLE_FILE, job.config
    try:
        spec = specify(job.model, latency_input(config, job.example), rules_of(config), config.model.name, program=False)
        if device == "onnxruntime":
            from .device.onnx_models import with_onnx

            spec = with_onnx(spec, job.model)
            measure(spec, OnnxRuntime(config.cost.threads), file, Timing(), progress("measured"))
        else:
            measure(spec, runtime_of(config, job.model), file, Timing(), progress("measured"))
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from None
    job.config = config.model_copy(update={"cost": config.cost.model_copy(update={"table": str(file)})})
    return spec
