"""The stage ``quantize``: few bits, as a quantizer of NNI's simulates them and in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import torch
from torch import nn

from nni_haloc.costs.device.measure import time_together
from nni_haloc.costs.device.onnx_runtime import OnnxRuntime
from nni_haloc.costs.from_settings import latency_input
from nni_haloc.inputs.registries import QUANTIZERS
from nni_haloc.inputs.schema.chain import Quantize as Settings
from nni_haloc.runs.folder import METRICS_VERSION, Figures, RunFolder
from nni_haloc.runs.job import Job
from nni_haloc.runs.stages.stage import NetworkStage, Outcome, Report
from nni_haloc.runs.stages.training import train
from nni_haloc.runs.summary import ACCURACIES
from nni_haloc.utils.errors import SettingsError, as_one_line
from nni_haloc.utils.files import make_folder, read_json, write_json
from nni_haloc.utils.log import logger
from nni_haloc.utils.processes import is_first

FLOAT32_FILE, INT8_FILE = "float32.onnx", "int8.onnx"


class Quantize(NetworkStage):
    """Quantize a copy of the network.

    The folder receives the weights in float32 (training may have changed them),
    ``quantization.json`` (the scales by which each layer's weight and input are rounded) and, with
    ``int8``, the ONNX files.
    """

    name = "quantize"
    settings = Settings
    folder = title = "quantized"
    training_title = "quantization-aware training"

    def check(self, job: Job) -> None:
        """Check that the packages for int8 are installed, where the settings ask for it."""
        from nni_haloc.chain.exporting import needed

        if self.settings_of(job.config).int8:
            with needed("quantize.int8"):
                pass

    def apply(
        self, job: Job, before: Outcome, folder: RunFolder, report: Report, resume: bool
    ) -> tuple[nn.Module, Figures]:
        """Quantize by the settings' section ``quantize``."""
        from nni_haloc.chain.quantizing import quantize

        section = self.settings_of(job.config)
        kind = QUANTIZERS[section.quantizer]
        images = job.splits.images("plain", section.calibration_images, job.config.seed)

        def train_rounded(wrapped: nn.Module) -> None:
            train(
                job,
                wrapped,
                section,
                folder.training,
                self.identity(job, before),
                report,
                title=self.training_title,
                recalibrated=kind.replaces is not None,
                resume=resume,
            )

        with as_one_line(SettingsError, self.name):
            simulated = quantize(before.network, images, section.quantizer, train_rounded)
        if not kind.trains:
            report({"default": job.accuracy(simulated.network, job.loader("val"))["top1"]}, 0)
        if not is_first():
            return simulated.unwrapped(), {}
        figures = job.score(simulated.network)
        make_folder(folder.path)
        scales = {"version": 1, "quantizer": section.quantizer, "layers": simulated.calibration()}
        write_json(folder.calibration, scales)
        network = simulated.unwrapped()
        if section.int8:
            with as_one_line(SettingsError, "quantize.int8"):
                figures |= _int8(job, network, images, folder.path)
        return network, figures

    def check_files(self, job: Job, folder: RunFolder) -> None:
        """Open the file of scales, and the ONNX files where the settings ask for them."""
        from nni_haloc.chain.exporting import OnnxNetwork

        read_json(folder.calibration)
        today = folder.read_metrics().get("version") == METRICS_VERSION
        for name in (FLOAT32_FILE, INT8_FILE) if self.settings_of(job.config).int8 else ():
            if today or (folder.path / name).exists():  # folders of 0.1 may have lost theirs
                OnnxNetwork(folder.path / name)

    def measure(self, job: Job, network: nn.Module) -> Figures:
        """Measure nothing more: in float32 the network is not what the stage is for."""
        return {}

    def rows(self, figures: Figures) -> dict[str, Figures]:
        """Return a row for the simulation, and one for each file of ONNX Runtime."""
        titles = {"onnx_": "float32 in ONNX Runtime", "int8_": "int8 in ONNX Runtime"}
        rows = {
            "quantized (simulated)": {key: v for key, v in figures.items() if key in ACCURACIES}
        }
        for start, title in titles.items():
            found = {
                key.removeprefix(start): v for key, v in figures.items() if key.startswith(start)
            }
            rows[title] = found
        return {title: row for title, row in rows.items() if row}

    def headline(self, figures: Figures) -> float | None:
        """Return the top-1 in int8, or that of the simulation where there is none."""
        return figures.get("int8_top1", figures.get("top1"))

    def flatten(self, figures: Figures) -> Figures:
        """Return ``quantized_top1``, and ONNX Runtime's figures, which have names of their own."""
        own = ("onnx_", "int8_")
        others = {key: value for key, value in figures.items() if not key.startswith(own)}
        others.pop("bytes", None)  # of the weights in float32
        return super().flatten(others) | {
            key: value for key, value in figures.items() if key.startswith(own)
        }


def _int8(job: Job, network: nn.Module, images: torch.Tensor, out: Path) -> Figures:
    """Write the network for ONNX Runtime in float32 and in 8 bits; time both in alternation."""
    from nni_haloc.chain.exporting import OnnxNetwork, export_onnx, quantize_onnx

    cost = job.config.cost
    float32, int8 = out / FLOAT32_FILE, out / INT8_FILE
    export_onnx(network, latency_input(job.config, job.example), float32)
    quantize_onnx(float32, images, int8)
    runtime = OnnxRuntime(cost.threads)
    runs = {
        name: runtime.ready(str(file), cost.batch_size)
        for name, file in (("onnx", float32), ("int8", int8))
    }
    times = [time_together(runs, runtime, 0.1) for _ in range(5)]
    figures = {f"{name}_latency_ms": 1e3 * median(each[name] for each in times) for name in runs}
    figures["int8_bytes"] = int8.stat().st_size
    small = OnnxNetwork(int8, cost.threads)
    if small.batch is not None:
        logger.warning("no int8_top1: %s takes batches of %d alone", int8, small.batch)
        return figures
    top1 = {f"int8_{key}": value for key, value in job.score(small).items() if "top1" in key}
    return {**top1, **figures}
