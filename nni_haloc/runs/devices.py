"""Compress a network for each device at hand and compare the speed (the paper's Table 3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nni_haloc.costs.device.measure import measure
from nni_haloc.costs.device.runtime import Timing, make_runtime
from nni_haloc.costs.from_settings import allowed_ranks_of, latency_input, runtime_of
from nni_haloc.costs.specify import specify
from nni_haloc.inputs.config import Config
from nni_haloc.inputs.registries import RUNTIMES
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.runs.folder import THROUGHPUT_VERSION, hold
from nni_haloc.runs.job import Job
from nni_haloc.runs.run import run_job
from nni_haloc.runs.stages import further_stages
from nni_haloc.utils.errors import HalocError, SettingsError, as_one_line, needs, reason_of
from nni_haloc.utils.files import make_folder, read_json, write_json
from nni_haloc.utils.log import logger
from nni_haloc.utils.printing import percent, print_table
from nni_haloc.utils.progress import progress

_ARRAY = "eyeriss"
_CUDA = ("cuda", "tensorrt")
"""The devices that are a CUDA device, by torch and by a runtime that has no other."""
CLOCK = 200e6
"""Cycles a second of the Eyeriss chip (Chen et al., 2016)."""
_HEADINGS = {
    "device": "device",
    "budget_fraction": "budget",
    "batch_size": "batch",
    "original_top1": "top-1, original",
    "top1": "top-1",
    "original_top5": "top-5, original",
    "top5": "top-5",
    "macs": "MACs",
    "macs_reduction": "less",
    "original_images_per_s": "images/s, original",
    "images_per_s": "images/s",
    "speedup": "times as fast",
    "reason": "why not",
}
_RENAMED = {"baseline_top1": "original_top1", "baseline_top5": "original_top5", "default": "top1"}
"""Keys of rows of version 1, and their names today."""


def known_devices() -> list[str]:
    """Return the names of all devices: every runtime, the Eyeriss-like array, and ``cuda``."""
    return [*RUNTIMES.names(), _ARRAY, "cuda"]


def at_hand() -> list[str]:
    """Return the devices that this machine has; the log says why it has not the others."""
    found = []
    for name in known_devices():
        try:
            if name == _ARRAY:
                with needs("zigzag", what=_ARRAY, install="nni-haloc[accelerator]"):
                    pass
            else:
                make_runtime(_runtime_of(name), device=_place_of(name))
        except ValueError as error:
            logger.info("without %s: %s", name, reason_of(error))
        else:
            found.append(name)
    return found


def _runtime_of(device: str) -> str:
    return device if device in RUNTIMES else "torch"


def _place_of(device: str) -> str:
    return "cuda" if device in _CUDA else "cpu"


def throughput(
    config: Config, folder: str | Path, devices: Sequence[str], *, resume: bool = False
) -> list[dict[str, Any]]:
    """Compress the settings' network once for each device, to a fraction of its cost there.

    Each device has a folder of its own inside ``folder``, with its cost table and a run's results,
    and a row of ``throughput.json``: accuracies, MACs, and images a second of the original and the
    compressed network, by ``cost.batch_size`` (on the array by one image). A device that can't do
    it has the reason in its row; in the file, a reason does not replace an earlier measurement.

    Args:
        config: the settings; their budget must be a fraction.
        folder: receives ``throughput.json`` and the devices' folders.
        devices: names of `known_devices`.
        resume: whether to go on from earlier runs. Cost tables go on in any case.

    Returns:
        The rows that the file has for other devices, then those of ``devices``.

    Raises:
        SettingsError: if nothing could be done on any device, or the file is damaged.
    """
    if config.budget.fraction is None:
        why = "because devices have different costs"
        raise SettingsError(f"budget: expected a fraction, {why}; found budget.absolute")
    processes = config.trainer.devices * config.trainer.num_nodes
    if processes > 1:
        why = "because devices are tried one after another"
        raise SettingsError(f"trainer: expected one process, {why}; found {processes}")
    job = Job(config, folder)
    with hold(job.folder):
        earlier = _read(job.folder.throughput)
        rows = _rows(job, devices, resume)
    return [*(row for device, row in earlier.items() if device not in devices), *rows]


def _rows(job: Job, devices: Sequence[str], resume: bool) -> list[dict[str, Any]]:
    """Run the job on each device; return a row for each, and keep them in the folder's file."""
    rows, file = [], job.folder.throughput
    for device in devices:
        logger.info("%s:", device)
        try:
            own = job.at(_config_for(job.config, device), job.folder.path / device)
            rows.append({"device": device, **_row(own, device, resume)})
            _keep(file, rows[-1:])
        except HalocError as error:
            logger.error("%s: %s", device, error)
            rows.append({"device": device, "reason": str(error)})
    if all("reason" in row for row in rows):
        raise SettingsError("; ".join(f"{row['device']}: {row['reason']}" for row in rows))
    _keep(file, [row for row in rows if "reason" in row])
    return rows


def _read(file: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of a ``throughput.json`` by their devices; none if there is no file."""
    if not file.exists():
        return {}
    try:
        with as_one_line():
            content = read_json(file, "table of devices", THROUGHPUT_VERSION)
        rows = [{_RENAMED.get(key, key): v for key, v in row.items()} for row in content["rows"]]
        return {str(row["device"]): row for row in rows}
    except (KeyError, TypeError, AttributeError):
        raise SettingsError(f"{file}: rows: expected a list, each with its device") from None


def _keep(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Put rows into the file in place of those of the same devices."""
    known = _read(file)
    for row in rows:
        before = known.get(row["device"], row)
        if "reason" not in row or "reason" in before:
            known[row["device"]] = row
    make_folder(file.parent)
    write_json(file, {"version": THROUGHPUT_VERSION, "rows": list(known.values())})


def print_throughput(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the rows of `throughput` as a table, without the columns that no row has."""
    formats: dict[str, Callable[[Any], str]] = {
        **dict.fromkeys(("original_top1", "top1", "original_top5", "top5"), _percent),
        **dict.fromkeys(("budget_fraction", "macs_reduction"), _percent),
        **dict.fromkeys(("original_images_per_s", "images_per_s"), _speed),
        "macs": lambda n: f"{n / 1e6:,.1f} M",
        "speedup": lambda n: f"{n:.2f}",
    }
    used = [key for key in _HEADINGS if any(key in row for row in rows)]
    cells = [
        [formats.get(key, str)(row[key]) if key in row else None for key in used] for row in rows
    ]
    headings = [_HEADINGS[key] for key in used]
    print_table(title, headings, cells, text={"device", _HEADINGS["reason"]})


def _percent(share: float) -> str:
    return percent(share, 2)


def _speed(images: float) -> str:
    return f"{images:,.0f}" if images >= 100 else f"{images:.3g}"


def _config_for(config: Config, device: str) -> Config:
    """Return the settings with the device's cost, without stages after fine-tuning."""
    changes: dict[str, Any] = {"table": None, "predictor": None}
    changes["device"], changes["runtime"] = _place_of(device), _runtime_of(device)
    changes["graph"] = device == "cuda" and config.cost.graph
    changes["metric"] = "cycles" if device == _ARRAY else "latency_ms"
    if device == _ARRAY:
        changes["dtype"] = "float32"
    elif device not in ("torch", "torch-compile", "cuda") and device in RUNTIMES.own():
        changes["memory_format"] = "contiguous"  # they have one layout alone
    cost = config.cost.model_copy(update=changes)
    no_stages = dict.fromkeys(stage.section for stage in further_stages())
    return config.model_copy(update={"cost": cost, **no_stages})


def _row(job: Job, device: str, resume: bool) -> dict[str, Any]:
    """Run the job on the device and return its row of the table."""
    if device == _ARRAY:
        flat = run_job(job, resume=resume)
        plan, batch = RankPlan.load(job.folder.ranks), 1
        costs = plan.chosen_by["original_cost"], plan.chosen_by["cost"]
        original, compressed = (cost / CLOCK for cost in costs)
    else:
        flat = run_job(_with_measured_table(job), resume=resume)
        batch = job.config.cost.batch_size
        original, compressed = flat["original_latency_ms"] / 1e3, flat["latency_ms"] / 1e3
    keys = ("original_top1", "top1", "original_top5", "top5", "macs", "macs_reduction")
    return {
        "budget_fraction": job.config.budget.fraction,
        "batch_size": batch,
        **{key: flat[key] for key in keys if key in flat},
        "original_images_per_s": batch / original,
        "images_per_s": batch / compressed,
        "speedup": original / compressed,
    }


def _with_measured_table(job: Job) -> Job:
    """Measure the device's cost table, or what is missing of it; return a job that uses it."""
    file, config = job.folder.measured_table, job.config
    make_folder(file.parent)
    with as_one_line():
        batch, runtime = latency_input(config, job.example), runtime_of(config)
        name = config.model.name
        spec = specify(job.model, batch, allowed_ranks_of(config), name, program=False)
        measure(runtime.prepare(spec, job.model), runtime, file, Timing(), progress("measured"))
    cost = config.cost.model_copy(update={"table": str(file)})
    return job.at(config.model_copy(update={"cost": cost}), job.folder.path)
