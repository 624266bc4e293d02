"""The paper's Table 3 for one's own network: for each device at hand a plan that is made for it, its counts, and images a second."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch

from nni_haloc.costs.device.measuring import Timing, measure, time_together
from nni_haloc.costs.device.onnx_runtime import OnnxRuntime
from nni_haloc.costs.device.spec import Specification
from nni_haloc.costs.from_settings import latency_input, rules_of, runtime_of
from nni_haloc.costs.specification import specify
from nni_haloc.inputs.config import Config
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.runs.folder import RANKS_FILE
from nni_haloc.runs.job import Job
from nni_haloc.runs.run import run_job
from nni_haloc.utils.errors import HalocError, SettingsError, reason_of
from nni_haloc.utils.files import read_json, write_json
from nni_haloc.utils.log import logger
from nni_haloc.utils.printing import percent, print_table
from nni_haloc.utils.progress import progress

DEVICES = {"torch": None, "onnxruntime": "onnxruntime", "eyeriss": "zigzag", "cuda": None}
"""Names that ``--on`` takes, and the package that each needs."""
CLOCK = 200e6
"""Cycles a second of the Eyeriss chip (Chen et al., 2016)."""
_HEADINGS = {
    "budget_fraction": "budget", "batch_size": "batch",
    "baseline_top1": "top-1, original", "default": "top-1", "baseline_top5": "top-5, original", "top5": "top-5",
    "macs": "MACs", "macs_reduction": "less", "original_images_per_s": "images/s, original", "images_per_s": "images/s",
    "speedup": "times as fast", "reason": "why not",
}  # fmt: skip
THROUGHPUT_FILE, TABLE_FILE = "throughput.json", "table.json"
THROUGHPUT_VERSION = 1


def at_hand() -> list[str]:
    """The devices that this machine has."""
    found = [name for name, package in DEVICES.items() if package is None or find_spec(package)]
    return [name for name in found if name != "cuda" or torch.cuda.is_available()]


def throughput(
    config: Config, folder: str | Path, devices: Sequence[str], *, resume: bool = False
) -> list[dict[str, Any]]:
    """Compress the network of ``config`` once for each device, to the budget's fraction of what the original costs there.

    Each has a folder of its own in ``folder``, with its cost table and a run's results, and a row of ``throughput.json``: accuracies, MACs,
    and images a second of the original and the compressed network, by ``cost.batch_size`` (on the array one image). A device on which
    it cannot be done has the reason in its row, in the file only where it was not measured before. Rows of other devices that the file
    has are kept, and returned before those of ``devices``. ``resume``: as for `run`; cost tables go on where they were stopped in any case.
    `SettingsError` where nothing could be done on any, or the file is not of this form.
    """
    if config.budget.fraction is None:
        raise SettingsError(
            "budget.fraction: expected, because devices have different costs; found budget.absolute"
        )
    if config.trainer.devices * config.trainer.num_nodes > 1:
        raise SettingsError(
            "trainer.devices: expected 1, because devices come one after another here"
        )
    job, rows = Job(config, folder), []
    file = job.folder / THROUGHPUT_FILE
    earlier = _read(file)
    for device in devices:
        logger.info("%s:", device)
        try:
            rows.append(
                {
                    "device": device,
                    **_row(
                        job.at(_config_for(config, device), job.folder / device), device, resume
                    ),
                }
            )
            _keep(file, rows[-1:])
        except HalocError as error:
            logger.error("%s: %s", device, error)
            rows.append({"device": device, "reason": str(error)})
    if all("reason" in row for row in rows):
        raise SettingsError("; ".join(f"{row['device']}: {row['reason']}" for row in rows))
    _keep(file, [row for row in rows if "reason" in row])
    return [*(row for device, row in earlier.items() if device not in devices), *rows]


def _read(file: Path) -> dict[str, dict[str, Any]]:
    """The rows of a ``throughput.json`` by their devices; none where there is no file."""
    try:
        content = read_json(file, "table of devices", THROUGHPUT_VERSION)
        return {str(row["device"]): dict(row) for row in content["rows"]}
    except FileNotFoundError:
        return {}
    except (KeyError, TypeError):
        raise SettingsError(f"{file}: rows: expected a list, each with its device") from None
    except (OSError, ValueError) as error:
        raise SettingsError(str(error)) from None


def _keep(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Put rows into the file, in the place of those of the same devices; a reason does not replace what was measured."""
    known = _read(file)
    known |= {
        row["device"]: row
        for row in rows
        if "reason" not in row or "reason" in known.get(row["device"], row)
    }
    write_json(file, {"version": THROUGHPUT_VERSION, "rows": list(known.values())})


def print_throughput(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """The rows of `throughput` as a table; accuracies and reductions in percent, columns that no row has left out."""
    columns: dict[str, Callable[[Any], str]] = {
        "device": str, "budget_fraction": _percent, "batch_size": str,
        "baseline_top1": _percent, "default": _percent, "baseline_top5": _percent, "top5": _percent,
        "macs": lambda n: f"{n / 1e6:,.1f} M", "macs_reduction": _percent, "original_images_per_s": _speed,
        "images_per_s": _speed, "speedup": lambda n: f"{n:.2f}", "reason": str,
    }  # fmt: skip
    used = [key for key in columns if any(key in row for row in rows)]
    cells = [[columns[key](row[key]) if key in row else None for key in used] for row in rows]
    print_table(
        title,
        [_HEADINGS.get(key, key) for key in used],
        cells,
        text={"device", _HEADINGS["reason"]},
    )


def _percent(share: float) -> str:
    return percent(share, 2)


def _speed(images: float) -> str:
    return f"{images:,.0f}" if images >= 100 else f"{images:.3g}"


def _config_for(config: Config, device: str) -> Config:
    changes: dict[str, Any] = {
        "metric": "cycles" if device == "eyeriss" else "latency_ms",
        "table": None,
    }
    changes |= {"device": "cuda" if device == "cuda" else "cpu"}
    changes |= {"memory_format": "contiguous"} if device == "onnxruntime" else {}
    cost = config.cost.model_copy(update=changes)
    return config.model_copy(
        update={"cost": cost, "prune": None, "quantize": None}
    )  # the table is of HALOC's networks


def _row(job: Job, device: str, resume: bool) -> dict[str, Any]:
    if device != "eyeriss":
        spec = _measured(job, device)
    metrics = run_job(job, resume=resume)
    keys = ("baseline_top1", "default", "baseline_top5", "top5", "macs", "macs_reduction")
    row: dict[str, Any] = {key: metrics[key] for key in keys if key in metrics}
    plan, batch = RankPlan.load(job.folder / RANKS_FILE), job.config.cost.batch_size
    if device == "eyeriss":
        seconds = {
            name: plan.chosen_by[key] / CLOCK
            for name, key in (("original", "original_cost"), ("compressed", "cost"))
        }
        batch = 1
    elif device == "onnxruntime":
        runtime = OnnxRuntime(job.config.cost.threads)
        runs = {
            "original": runtime.network(spec, {}),
            "compressed": runtime.network(spec, plan.names),
        }
        times = [time_together(runs, runtime, 0.1) for _ in range(5)]
        seconds = {name: median(found[name] for found in times) for name in runs}
    else:
        seconds = {
            "original": metrics["baseline_latency_ms"] / 1e3,
            "compressed": metrics["latency_ms"] / 1e3,
        }
    speeds = {
        "original_images_per_s": batch / seconds["original"],
        "images_per_s": batch / seconds["compressed"],
    }
    return {
        "budget_fraction": job.config.budget.fraction,
        "batch_size": batch,
        **row,
        **speeds,
        "speedup": seconds["original"] / seconds["compressed"],
    }


def _measured(job: Job, device: str) -> Specification:
    """Measure the device's cost table, and have the job use it."""
    file, config = job.folder / TABLE_FILE, job.config
    try:
        spec = specify(
            job.model,
            latency_input(config, job.example),
            rules_of(config),
            config.model.name,
            program=False,
        )
        if device == "onnxruntime":
            from nni_haloc.costs.device.onnx_models import with_onnx

            spec = with_onnx(spec, job.model)
            measure(spec, OnnxRuntime(config.cost.threads), file, Timing(), progress("measured"))
        else:
            measure(spec, runtime_of(config, job.model), file, Timing(), progress("measured"))
    except (ValueError, OSError) as error:
        raise SettingsError(reason_of(error)) from None
    job.config = config.model_copy(
        update={"cost": config.cost.model_copy(update={"table": str(file)})}
    )
    return spec
