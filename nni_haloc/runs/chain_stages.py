"""What follows HALOC, by NNI: a network that is pruned, then quantized, each with its training and its figures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from pytorch_lightning import seed_everything
from torch import nn

from nni_haloc.costs.device.measuring import time_together
from nni_haloc.costs.device.onnx_runtime import OnnxRuntime
from nni_haloc.costs.from_settings import latency_input, runtime_of
from nni_haloc.costs.measured import measure_latency
from nni_haloc.inputs.config import Config, parse_config, set_dotted
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.runs.finished import Finished
from nni_haloc.runs.folder import (
    CHECKPOINT_FILE,
    METRICS_FILE,
    PRUNED_FOLDER,
    QUANTIZED_FOLDER,
    RANKS_FILE,
    WEIGHTS_FILE,
)
from nni_haloc.runs.identity import finetuning_identity
from nni_haloc.runs.job import Job
from nni_haloc.runs.saved import load
from nni_haloc.runs.training import Report, place_of, trained
from nni_haloc.space.modules import evaluating
from nni_haloc.utils.errors import HalocError, SettingsError
from nni_haloc.utils.files import write_json
from nni_haloc.utils.log import logger
from nni_haloc.utils.processes import is_first, wait_for_all

CALIBRATION_FILE = "quantization.json"
INT8_FILES = ("float32.onnx", "int8.onnx")
FOLDERS = {"prune": PRUNED_FOLDER, "quantize": QUANTIZED_FOLDER}
"""Of each stage, by its section."""


def chain(
    job: Job,
    plan: RankPlan,
    network: nn.Module,
    metrics: dict[str, float],
    report: Report = lambda metrics, place: None,
    *,
    resume: bool = False,
) -> dict[str, float]:
    """The settings' further stages, in subfolders of the job's; ``metrics`` with theirs, and ``default``, the top-1 of the last one.

    ``network``: fine-tuned, of ``plan``, saved in the job's folder; ``metrics``: its. Without further stages they are returned as they are.
    """
    config = job.config
    if is_first() and (config.prune or config.quantize):
        metrics = {
            **metrics,
            "haloc_top1": metrics["default"],
            "haloc_bytes": (job.folder / WEIGHTS_FILE).stat().st_size,
        }
    if config.prune:
        network, found = prune_stage(
            job, plan, network, report, job.folder / PRUNED_FOLDER, resume=resume
        )
        metrics = metrics | found
    if config.quantize:
        metrics = metrics | quantize_stage(
            job, plan, network, report, job.folder / QUANTIZED_FOLDER, resume=resume
        )
    return metrics


def prune_stage(
    job: Job, plan: RankPlan, network: nn.Module, report: Report, out: Path, *, resume: bool = False
) -> tuple[nn.Module, dict[str, float]]:
    """Prune a copy of ``network`` by the settings' section ``prune``, speed it up and fine-tune it; the new network and its metrics.

    ``out`` receives what `load` takes, the state of the fine-tuning, and ``metrics.json``. ``resume``: read a finished stage of the same
    settings back, or go on with its fine-tuning.
    """
    from nni_haloc.chain.pruning import prune

    config, section = job.config, job.config.prune
    assert section is not None
    same = {**_identity(config, plan, network), "prune": section.model_dump()}
    if resume and (done := _finished(out, config, same)) is not None:
        logger.info("pruning: done: %s", out)
        return _laid_out(load(out, job.model), config), done
    seed_everything(config.seed, verbose=False)
    batches = islice(
        job.loader("train", shuffle=True), section.batches if section.pruner == "taylor" else 0
    )
    network = _or_one_line(
        "prune", lambda: prune(network, job.example, section.sparsity, section.pruner, batches)
    )
    what = "fine-tuning of the pruned network"
    network = trained(
        job,
        network,
        section,
        out / CHECKPOINT_FILE,
        same,
        report,
        place_of(config, "prune"),
        what=what,
        resume=resume,
    )
    if is_first():
        latency = measure_latency(
            {"pruned": network}, latency_input(config, job.example), runtime_of(config)
        )["pruned"]
    wait_for_all()
    if not is_first():
        return network, {}
    top1, *_ = job.accuracy(network, job.loader(config.data.score))
    macs, params = job.size(network)
    job.save(network, plan, out)
    size = (out / WEIGHTS_FILE).stat().st_size
    metrics = {
        "pruned_top1": top1,
        "pruned_macs": macs,
        "pruned_params": params,
        "pruned_latency_ms": latency,
        "pruned_bytes": size,
    }
    return network, _leave(out, {"default": top1, **metrics}, config, same)


def quantize_stage(
    job: Job, plan: RankPlan, network: nn.Module, report: Report, out: Path, *, resume: bool = False
) -> dict[str, float]:
    """Quantize a copy of ``network`` by the settings' section ``quantize``, as NNI simulates it and for ONNX Runtime; the metrics.

    ``out`` receives the weights, which training may have changed, in float32 and as `load` takes them; ``quantization.json``, by what each
    layer's weight and input is rounded; with ``int8`` the ONNX files; ``metrics.json``. ``resume`` as for `prune_stage`.
    """
    from nni_haloc.chain.quantizing import simulate

    config, section = job.config, job.config.quantize
    assert section is not None
    same = {**_identity(config, plan, network), "quantize": section.model_dump()}
    if resume and (done := _finished(out, config, same)) is not None:
        logger.info("quantizing: done: %s", out)
        return done
    seed_everything(config.seed, verbose=False)
    images = job.splits.images("plain", section.calibration_images, config.seed)

    def train(wrapped: nn.Module) -> None:
        state, what = out / CHECKPOINT_FILE, "quantization-aware training"
        trained(
            job,
            wrapped,
            section,
            state,
            same,
            report,
            place_of(config, "quantize"),
            what=what,
            recalibrated=False,
            resume=resume,
        )

    simulated = _or_one_line(
        "quantize", lambda: simulate(network, images, section.quantizer, train)
    )
    if section.quantizer == "ptq":
        report(
            {"default": job.accuracy(simulated.network, job.loader("val"))[0]},
            place_of(config, "quantize"),
        )
    if not is_first():
        return {}
    top1, *_ = job.accuracy(simulated.network, job.loader(config.data.score))
    out.mkdir(parents=True, exist_ok=True)
    write_json(
        out / CALIBRATION_FILE,
        {"version": 1, "quantizer": section.quantizer, "layers": simulated.calibration()},
    )
    network = simulated.unwrapped()
    job.save(network, plan, out)
    metrics: dict[str, float] = {"default": top1, "quantized_top1": top1}
    if section.int8:
        metrics |= _or_one_line("quantize.int8", lambda: _int8(job, network, images, out))
        metrics["default"] = metrics.get("int8_top1", top1)
    return _leave(out, metrics, config, same)


def _int8(job: Job, network: nn.Module, images: torch.Tensor, out: Path) -> dict[str, float]:
    """The network in ONNX Runtime, in float32 and in 8 bits; latencies are of the settings' batch, the two timed in alternation.

    Without a top-1 where the network takes that one batch size alone.
    """
    from nni_haloc.chain.exporting import OnnxNetwork, export_onnx, quantize_onnx

    config = job.config
    float32, int8 = (out / name for name in INT8_FILES)
    export_onnx(network, latency_input(config, job.example), float32)
    quantize_onnx(float32, images, int8)
    runtime = OnnxRuntime(config.cost.threads)
    runs = {
        name: runtime.ready(str(file), config.cost.batch_size)
        for name, file in (("onnx", float32), ("int8", int8))
    }
    times = [time_together(runs, runtime, 0.1) for _ in range(5)]
    latency = {f"{name}_latency_ms": 1e3 * median(found[name] for found in times) for name in runs}
    small = OnnxNetwork(int8, config.cost.threads)
    if small.batch is not None:
        logger.warning("no int8_top1: %s takes batches of %d alone", int8, small.batch)
        return {**latency, "int8_bytes": int8.stat().st_size}
    return {
        "int8_top1": job.accuracy(small, job.loader(config.data.score))[0],
        **latency,
        "int8_bytes": int8.stat().st_size,
    }


def stage_of(
    folder: Path,
    stage: str,
    settings: Mapping[str, Any],
    out: Path | None = None,
    *,
    factories: bool = False,
    resume: bool = False,
) -> dict[str, float]:
    """The stage ``prune`` or ``quantize`` of a finished run's folder, or of a stage's, with the run's settings; its metrics.

    ``settings``: dotted keys to values that take the place of the run's. ``out`` (None: in ``folder``, as in a run). ``factories``: see
    `Finished`. Raises `SettingsError`, also where ``out`` is a folder that the network comes from.
    """
    out = stage_folder(folder, stage, out)
    if "scale" in settings:
        raise SettingsError(f"scale: of a whole run, not of a stage; set {stage}.epochs")
    run = Finished(folder, factories=factories)
    content = run.config.model_dump(mode="json")
    content[stage] = content[stage] or {}
    for key, value in settings.items():
        set_dotted(content, key, value)
    run.config = parse_config(content, folder / METRICS_FILE)
    job, plan = run.job, RankPlan.load(folder / RANKS_FILE)
    check(job, stage)
    network = _laid_out(_or_one_line(str(folder), run.network), run.config)
    if stage == "prune":
        return prune_stage(job, plan, network, lambda metrics, place: None, out, resume=resume)[1]
    return quantize_stage(job, plan, network, lambda metrics, place: None, out, resume=resume)


def stage_folder(folder: Path, stage: str, out: Path | None = None) -> Path:
    """Where a stage of ``folder`` is left; `SettingsError` where that is the folder itself, or the run's that it is a stage of."""
    out = out or folder / FOLDERS[stage]
    if folder.resolve().is_relative_to(out.resolve()) and (out / RANKS_FILE).exists():
        raise SettingsError(f"--out: expected another folder than the run's, found {out}")
    return out


def check(job: Job, *stages: str) -> None:
    """`SettingsError` where one of the ``stages`` (none: those of the settings) is sure to fail: known before anything is trained."""
    stages, config = stages or tuple(FOLDERS), job.config
    if config.prune and "prune" in stages:
        from nni_haloc.chain.workarounds import traced

        with evaluating(job.model):
            _or_one_line("prune", lambda: traced(job.model))
    if config.quantize and config.quantize.int8 and "quantize" in stages:
        from nni_haloc.chain.exporting import needed

        def import_packages() -> None:
            with needed("ONNX Runtime"):
                pass

        _or_one_line("quantize.int8", import_packages)


def _laid_out(network: nn.Module, config: Config) -> nn.Module:
    return (
        network.to(memory_format=torch.channels_last)
        if config.cost.memory_format == "channels_last"
        else network
    )


def _identity(config: Config, plan: RankPlan, network: nn.Module) -> dict[str, Any]:
    """What the state of a stage's training depends on, beside its section: the network that it starts from, too."""
    digest = hashlib.sha256()
    for (
        name,
        value,
    ) in network.named_parameters():  # not the BatchNorm statistics: those are each process's own
        digest.update(name.encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return {
        **finetuning_identity(config),
        "ranks": plan.names,
        "network": f"sha256 {digest.hexdigest()}",
    }


def _figures(config: Config, identity: Mapping[str, Any]) -> dict[str, Any]:
    """What a stage's metrics depend on: more than the state of its training."""
    return {**identity, "data.score": config.data.score, "threads": config.threads}


def _finished(out: Path, config: Config, identity: Mapping[str, Any]) -> dict[str, float] | None:
    """The metrics of a stage that is finished in ``out``, if it is the same."""
    identity = _figures(config, identity)
    try:
        content = json.loads((out / METRICS_FILE).read_text(encoding="utf-8"))
        return (
            dict(content["metrics"])
            if content["identity"] == json.loads(json.dumps(identity))
            else None
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _leave(
    out: Path, metrics: dict[str, float], config: Config, identity: Mapping[str, Any]
) -> dict[str, float]:
    """Write a stage's ``metrics.json``, last of its files."""
    write_json(
        out / METRICS_FILE,
        {
            "metrics": metrics,
            "config": config.model_dump(mode="json"),
            "identity": _figures(config, identity),
        },
    )
    for name, value in metrics.items():
        logger.info("%s: %.6g", name, value)
    return metrics


def _or_one_line(section: str, do: Callable[[], Any]) -> Any:
    try:
        return do()
    except HalocError:
        raise
    except ValueError as error:
        raise SettingsError(f"{section}: {error}") from None
