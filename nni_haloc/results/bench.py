"""Time the original network and every stage of a run side by side, in every runtime at hand."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, cast

from torch import nn

from nni_haloc.costs.counts import count_macs, count_params
from nni_haloc.costs.device.clock import PassClock
from nni_haloc.costs.device.measure import time_together
from nni_haloc.costs.device.quality import spread
from nni_haloc.costs.device.runtime import Deployed, Run, Runtime, check_threads, make_runtime
from nni_haloc.inputs.registries import RUNTIMES, STAGES
from nni_haloc.inputs.schema.cost import Cost
from nni_haloc.inputs.schema.values import MOST
from nni_haloc.runs.finished import Finished
from nni_haloc.runs.folder import RunFolder, hold
from nni_haloc.runs.stages import further_stage
from nni_haloc.utils.errors import (
    HalocError,
    MissingPackage,
    SettingsError,
    as_one_line,
    brief,
    expected_one_of,
    first_line,
)
from nni_haloc.utils.files import read_json, write_json
from nni_haloc.utils.log import logger
from nni_haloc.utils.printing import percent, print_table
from nni_haloc.utils.quiet import quiet

SPLITS = ("val", "test")
VERSION = 1
TEXT = ("stage", "runtime", "precision", "why not")
"""Headings of the columns that hold text."""


def bench(
    folder: str | Path,
    batch_sizes: Sequence[int] | None = None,
    threads: int | None = None,
    split: str | None = None,
    *,
    runtimes: Sequence[str] | None = None,
    data: bool = True,
    factories: bool = False,
    rounds: int = 5,
    min_run_time: float = 0.1,
) -> dict[str, Any]:
    """Time a finished run's original network and every stage that its folder holds.

    For each batch size each stage has a row in each runtime, and one more there in int8 if the
    runtime has it. Their passes are timed in alternation. A row that can't be timed says why. A
    quantized stage has rows in int8 alone, and one of the simulation that has the accuracy of the
    run: in float32 it would be the network before it once more.

    Args:
        folder: the run's folder; it receives ``bench.json``.
        batch_sizes: images in a batch (None: the settings' one).
        threads: processor threads (None: the settings').
        split: images of the accuracies, ``val`` or ``test`` (None: the settings' ``data.score``).
        runtimes: names of `nni_haloc.inputs.registries.RUNTIMES` (None: those whose packages are
            installed here). A runtime that can't do what the settings' ``cost`` says, such as
            another device, runs on the processor.
        data: whether the data are at hand. Without them there are neither accuracies nor int8.
        factories: see `Finished`.
        rounds: medians that are taken of each row; the row has their median and their
            interquartile range.
        min_run_time: seconds of passes in each round.

    Returns:
        What ``bench.json`` says.

    Raises:
        SettingsError: if the folder is none of a finished run or an option is wrong; an earlier
            ``bench.json`` then stays.
        MissingPackage: if a runtime that is named lacks its package; likewise.
    """
    run = Finished(folder, data=data, factories=factories)
    cost, split = run.config.cost, split or run.config.data.score
    sizes = list(batch_sizes or [cost.batch_size])
    threads = cost.threads if threads is None else threads
    if min([*sizes, threads or 1]) < 1 or threads == 0:
        wrong = ("batch sizes", sizes) if min(sizes) < 1 else ("threads", threads)
        raise SettingsError(f"{wrong[0]}: expected numbers above 0, found {wrong[1]}")
    if max(sizes) > MOST:
        raise SettingsError(f"batch sizes: expected at most {MOST:,}, found {brief(max(sizes))}")
    with as_one_line():
        check_threads(threads)
    if split not in SPLITS:
        raise SettingsError(f"split: expected one of {', '.join(SPLITS)}, found {split!r}")
    clocks = _runtimes(runtimes, cost, threads)
    networks = run.networks()
    folders = run.folder.stages()
    rows: list[dict[str, Any]] = []
    surroundings = run.job.active() if data else quiet()  # data: as in the run itself
    with hold(run.folder), surroundings, TemporaryDirectory() as scratch, ExitStack() as pinned:
        for runtime in clocks.values():
            if not isinstance(runtime, HalocError):
                pinned.enter_context(runtime.pinned())
        forms = [
            form
            for stage, network in networks.items()
            for form in (
                *_simulated(folders.get(stage), stage, split == run.config.data.score, data),
                *_forms(run, stage, network, Path(scratch), clocks, data),
            )
            if form.reason or not _is_quantized(folders.get(stage)) or not form.in_float32
        ]
        for form in forms:
            name = form.facts["stage"]
            network = networks[name]
            form.facts |= {
                "stage": _title(name, folders.get(name)),
                "macs": count_macs(network, run.example(1)),
                "params": count_params(network),
            }
            if data and form.any_batch:
                form.facts["top1"] = run.job.accuracy(form.network, run.job.loader(split))["top1"]
            logger.info("%s", ", ".join(map(str, form.facts.values())))
        for size in sizes:
            rows += _timed(forms, run.example(size).shape, rounds, min_run_time)
        content = {
            "version": VERSION,
            "runtimes": {
                name: runtime.identity()
                for name, runtime in clocks.items()
                if not isinstance(runtime, HalocError)
            },
            "split": split if data else None,
            "rounds": rounds,
            "rows": rows,
        }
        write_json(run.folder.bench, content)
    return content


def print_bench(title: str, content: Mapping[str, Any]) -> None:
    """Print what ``bench.json`` says as a table."""
    heads, cells = _shown(content)
    print_table(title, heads, cells, text=TEXT)


def bench_table(path: Path) -> dict[str, Any]:
    """Return what a ``bench.json`` says, as text: ``heads``, ``rows``, ``rounds`` and ``device``.

    Raises:
        SettingsError: names a file that is damaged.
    """
    try:
        content = read_json(path, "bench", VERSION)
        heads, rows = _shown(content)
        identities = content.get("runtimes") or {"torch": content["torch"]}
        first = next(iter(identities.values()))
        versions = ", ".join(each["runtime"] for each in identities.values())
        device = f"{first['device']}, {versions}, threads: {first['threads']}"
        return {"heads": heads, "rows": rows, "rounds": content["rounds"], "device": device}
    except HalocError:
        raise
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise SettingsError(f"{path}: expected what haloc bench writes ({error!r})") from None


def _shown(content: Mapping[str, Any]) -> tuple[list[str], list[list[str | None]]]:
    """Return the headings of those columns that any row has, and the rows."""
    columns: dict[str, tuple[str, Callable[[Any], str]]] = {
        "stage": ("stage", str),
        "runtime": ("runtime", str),
        "precision": ("precision", str),
        "batch_size": ("batch", str),
        "latency_ms": ("latency, ms", "{:.3g}".format),
        "spread_ms": ("spread, ms", lambda n: f"{n:.2g}" if n < 100 else f"{n:.0f}"),
        "images_per_s": ("images/s", "{:,.0f}".format),
        "file_bytes": ("file, kB", lambda n: f"{n / 1e3:,.0f}"),
        "macs": ("MACs", lambda n: f"{n / 1e6:,.1f} M"),
        "params": ("parameters", "{:,}".format),
        "top1": (f"top-1 ({content['split']})", lambda share: percent(share, 2)),
        "reason": ("why not", str),
    }
    used = [key for key in columns if any(key in row for row in content["rows"])]
    cells = [
        [columns[key][1](row[key]) if key in row else None for key in used]
        for row in content["rows"]
    ]
    return [columns[key][0] for key in used], cells


def _runtimes(
    names: Sequence[str] | None, cost: Cost, threads: int | None
) -> dict[str, Runtime | HalocError]:
    """Make the runtimes of some names (None: those at hand), or the reasons why there are none."""
    made: dict[str, Runtime | HalocError] = {}
    for name in RUNTIMES.names() if names is None else names:
        if name not in RUNTIMES:
            raise SettingsError(f"runtimes: {expected_one_of(RUNTIMES.names(), name)}")
        try:
            made[name] = _runtime(name, cost, threads)
        except HalocError as error:
            if names is None:
                logger.info("without %s: %s", name, error)
            elif isinstance(error, MissingPackage):
                raise
            else:
                made[name] = error
    return made


def _runtime(name: str, cost: Cost, threads: int | None) -> Runtime:
    """Make a runtime as the settings say; if it can't do that, on the processor."""
    asked: dict[str, Any] = {
        "device": cost.device,
        "memory_format": cost.layout,
        "graph": cost.graph,
        "tf32": cost.tf32,
    }
    with as_one_line():
        try:
            return make_runtime(name, threads=threads, **asked)
        except MissingPackage:
            raise
        except ValueError:
            if name == "torch":  # what the run itself used
                raise
            return make_runtime(name, threads=threads)


@dataclass
class _Form:
    """A stage's network in one runtime and precision, or the ``reason`` why there is none."""

    facts: dict[str, Any]
    runtime: Runtime | None = None
    deployed: Deployed | None = None
    reason: str = ""

    @property
    def network(self) -> Any:
        return self.deployed and self.deployed.network

    @property
    def in_float32(self) -> bool:
        return self.facts["precision"] == "float32"

    @property
    def any_batch(self) -> bool:
        return self.network is not None and getattr(self.network, "batch", None) is None

    def ready(self, shape: Sequence[int]) -> Run:
        """Return a forward pass to time; raise ValueError with the reason if there is none."""
        if self.deployed is None:
            raise ValueError(self.reason)
        if self.deployed.batch not in (None, shape[0]):
            raise ValueError(f"takes batches of {self.deployed.batch} alone")
        return self.deployed.ready(tuple(shape))


def _is_quantized(folder: RunFolder | None) -> bool:
    return folder is not None and folder.calibration.is_file()


def _title(name: str, folder: RunFolder | None) -> str:
    """Return a network's name; for a stage in a folder of another name also its usual one."""
    stages = [] if folder is None else list(folder.read_metrics()["stages"])
    usual = further_stage(stages[0]).folder if stages and stages[0] in STAGES else name
    return name if name == usual else f"{name} ({usual})"


def _simulated(
    folder: RunFolder | None, stage: str, own_split: bool, data: bool
) -> Iterator[_Form]:
    """Return the row of a quantized stage's simulation, with the accuracy that the stage found."""
    if folder is not None and _is_quantized(folder):
        figures = folder.read_metrics()["stages"].get("quantize", {})
        facts = {"stage": stage, "runtime": "torch", "precision": "simulated"}
        if data and own_split and "top1" in figures:
            facts["top1"] = figures["top1"]
        yield _Form(facts, reason="int8 imitated in float32 has no speed of its own")


def _forms(
    run: Finished,
    stage: str,
    network: nn.Module,
    scratch: Path,
    runtimes: Mapping[str, Runtime | HalocError],
    data: bool,
) -> Iterator[_Form]:
    """Make a stage's network ready for each runtime, in each of its precisions."""
    for name, runtime in runtimes.items():
        facts = {"stage": stage, "runtime": name, "precision": "float32"}
        if isinstance(runtime, HalocError):
            yield _Form(facts, reason=str(runtime))
            continue
        for precision in runtime.precisions:
            form = _Form(facts | {"precision": precision}, runtime)
            if precision != "float32" and not data:
                continue
            start = time.perf_counter()
            try:
                images = None if precision == "float32" else run.calibration_images()
                form.deployed = runtime.deploy(network, run.example(2), scratch / stage, images)
                form.facts["file_bytes"] = sum(f.stat().st_size for f in form.deployed.files)
            except (ValueError, RuntimeError, OSError) as error:
                form.reason = first_line(error)
            form.facts["made_s"] = time.perf_counter() - start
            yield form
            if form.deployed is None:
                break  # the other precisions are made of this one


class Clocks:
    """Times each pass by its own runtime's clock, in the place of a runtime.

    Args:
        runtimes: the passes' runtimes, by the passes' ``id()``.
    """

    def __init__(self, runtimes: Mapping[int, Runtime]) -> None:
        self._clocks = {number: PassClock(runtime) for number, runtime in runtimes.items()}

    def identity(self) -> dict[str, Any]:
        """Say nothing: each runtime is asked for itself."""
        return {}

    def once(self, run: Run) -> float:
        return self._clocks[id(run)].once(run)


def _timed(
    forms: Sequence[_Form], shape: Sequence[int], rounds: int, min_run_time: float
) -> list[dict[str, Any]]:
    """Time all forms at one batch size; return their rows."""
    rows = []
    groups: dict[str, dict[str, Run]] = {}  # those of a device are timed in alternation
    clocks: dict[int, Runtime] = {}
    for i, form in enumerate(forms):
        row = {**form.facts, "batch_size": shape[0]}
        try:
            ready = form.ready(shape)
            assert form.runtime is not None
            clocks[id(ready)] = form.runtime
            groups.setdefault(form.runtime.identity()["device"], {})[str(i)] = ready
        except (ValueError, RuntimeError) as error:
            row["reason"] = first_line(error)
        rows.append(row)
    for group in groups.values():
        clock = cast(Runtime, Clocks(clocks))
        found = [time_together(group, clock, min_run_time) for _ in range(rounds)]
        for name in group:
            times = [1e3 * each[name] for each in found]
            latency = median(times)
            rows[int(name)] |= {
                "latency_ms": latency,
                "spread_ms": spread(times),
                "images_per_s": 1e3 * shape[0] / latency,
            }
    return rows
