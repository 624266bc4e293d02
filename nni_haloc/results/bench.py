"""Time the original network and every stage of a run side by side, in torch and ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import save_model
from torch import nn

from nni_haloc.chain.exporting import OnnxNetwork, export_onnx, quantize_onnx
from nni_haloc.costs.counts import count_macs, count_params
from nni_haloc.costs.device.measure import time_together
from nni_haloc.costs.device.onnx_runtime import OnnxRuntime
from nni_haloc.costs.device.quality import spread
from nni_haloc.costs.device.runtime import Run, Runtime, check_threads
from nni_haloc.costs.device.torch_runtime import TorchRuntime
from nni_haloc.inputs.schema.values import MOST
from nni_haloc.runs.finished import Finished
from nni_haloc.runs.folder import hold
from nni_haloc.utils.errors import HalocError, SettingsError, as_one_line, brief
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
    data: bool = True,
    factories: bool = False,
    rounds: int = 5,
    min_run_time: float = 0.1,
) -> dict[str, Any]:
    """Time a finished run's original network and every stage that its folder holds.

    For each batch size each stage has a row in torch, one in ONNX Runtime and one there in int8.
    Their passes are timed in alternation. A row that can't be timed says why.

    Args:
        folder: the run's folder; it receives ``bench.json``.
        batch_sizes: images in a batch (None: the settings' one).
        threads: processor threads (None: the settings').
        split: images of the accuracies, ``val`` or ``test`` (None: the settings' ``data.score``).
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
    """
    run = Finished(folder, data=data, factories=factories)
    cost, split = run.config.cost, split or run.config.data.score
    sizes = list(batch_sizes or [cost.batch_size])
    threads = cost.threads if threads is None else threads
    if min([*sizes, threads or 1]) < 1 or threads == 0:
        expected = "batch sizes, threads: expected numbers above 0"
        raise SettingsError(f"{expected}, found {sizes}, {threads}")
    if max(sizes) > MOST:
        raise SettingsError(f"batch sizes: expected at most {MOST:,}, found {brief(max(sizes))}")
    with as_one_line():
        check_threads(threads)
    if split not in SPLITS:
        raise SettingsError(f"split: expected one of {', '.join(SPLITS)}, found {split!r}")
    networks = run.networks()
    with as_one_line():
        runtime = TorchRuntime(
            cost.device,
            memory_format=cost.memory_format,
            threads=threads,
            graph=cost.graph,
            tf32=cost.tf32,
        )
    onnx, rows = OnnxRuntime(threads), []
    surroundings = run.job.active() if data else quiet()  # data: as in the run itself
    with hold(run.folder), surroundings, TemporaryDirectory() as scratch, runtime.pinned():
        forms = [
            form
            for stage, network in networks.items()
            for form in _forms(run, stage, network, Path(scratch), threads, data)
        ]
        for form in forms:
            network = networks[form.facts["stage"]]
            form.facts |= {
                "macs": count_macs(network, run.example(1)),
                "params": count_params(network),
            }
            if data and form.any_batch:
                form.facts["top1"] = run.job.accuracy(form.network, run.job.loader(split))["top1"]
            logger.info("%s", ", ".join(map(str, form.facts.values())))
        for size in sizes:
            rows += _timed(forms, run.example(size).shape, runtime, onnx, rounds, min_run_time)
        identities = {
            "torch": runtime.identity(),
            "onnxruntime": onnx.identity() if find_spec("onnxruntime") else None,
        }
        content = {
            "version": VERSION,
            **identities,
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
        torch = content["torch"]
        device = f"{torch['device']}, {torch['runtime']}, threads: {torch['threads']}"
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


@dataclass
class _Form:
    """A stage's network in one runtime and precision, or the ``reason`` why there is none."""

    facts: dict[str, Any]
    file: Path
    network: Any = None
    reason: str = ""

    @property
    def any_batch(self) -> bool:
        return self.network is not None and getattr(self.network, "batch", None) is None

    def ready(self, shape: Sequence[int], runtime: TorchRuntime, onnx: OnnxRuntime) -> Run:
        """Return a forward pass to time; raise ValueError with the reason if there is none."""
        if self.network is None:
            raise ValueError(self.reason)
        if not isinstance(self.network, OnnxNetwork):
            return runtime.ready(self.network, tuple(shape), copied=False)
        if self.network.batch not in (None, shape[0]):
            raise ValueError(f"takes batches of {self.network.batch} alone")
        return onnx.ready(str(self.file), shape[0])


def _forms(
    run: Finished, stage: str, network: nn.Module, scratch: Path, threads: int | None, data: bool
) -> Iterator[_Form]:
    weights, plain, small = (
        scratch / f"{stage}{ending}" for ending in (".safetensors", ".onnx", "-int8.onnx")
    )

    def form(runtime: str, precision: str, file: Path, write: Callable[[], Any]) -> _Form:
        made = _Form({"stage": stage, "runtime": runtime, "precision": precision}, file)
        try:
            write()
            made.network = network if runtime == "torch" else OnnxNetwork(file, threads)
            made.facts["file_bytes"] = file.stat().st_size
        except (ValueError, OSError) as error:
            made.reason = str(error)
        return made

    yield form("torch", "float32", weights, lambda: save_model(network, str(weights)))
    found = form(
        "onnxruntime", "float32", plain, lambda: export_onnx(network, run.example(2), plain)
    )
    yield found
    if data and found.network is not None:
        yield form(
            "onnxruntime",
            "int8",
            small,
            lambda: quantize_onnx(plain, run.calibration_images(), small),
        )


def _timed(
    forms: Sequence[_Form],
    shape: Sequence[int],
    runtime: TorchRuntime,
    onnx: OnnxRuntime,
    rounds: int,
    min_run_time: float,
) -> list[dict[str, Any]]:
    """Time all forms at one batch size; return their rows."""
    runs: dict[str, Run] = {}
    rows = []
    for i, form in enumerate(forms):
        row = {**form.facts, "batch_size": shape[0]}
        try:
            runs[str(i)] = form.ready(shape, runtime, onnx)
        except (ValueError, RuntimeError) as error:
            row["reason"] = str(error)
        rows.append(row)
    clocks: list[tuple[Runtime, dict[str, Run]]] = [(runtime, runs)]
    if runtime.device != "cpu":  # another device is timed by its own clock
        onnx_runs = {i: run for i, run in runs.items() if rows[int(i)]["runtime"] != "torch"}
        clocks = [
            (runtime, {i: run for i, run in runs.items() if i not in onnx_runs}),
            (onnx, onnx_runs),
        ]
    for clock, group in clocks:
        found = [time_together(group, clock, min_run_time) for _ in range(rounds)] if group else []
        for name in group:
            times = [1e3 * each[name] for each in found]
            latency = median(times)
            rows[int(name)] |= {
                "latency_ms": latency,
                "spread_ms": spread(times),
                "images_per_s": 1e3 * shape[0] / latency,
            }
    return rows
