"""A run that goes on after HALOC: pruned, quantized; figures, folders, resuming, and commands."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from helpers.commands import haloc
from helpers.paths import DIGITS
from torch import nn

from nni_haloc.chain.exporting import OnnxNetwork
from nni_haloc.chain.pruning import zero_share
from nni_haloc.costs.counts import count_macs
from nni_haloc.inputs.config import load_config
from nni_haloc.inputs.data import digits
from nni_haloc.inputs.registries import PRUNERS, QUANTIZERS
from nni_haloc.results.html_report import html_report
from nni_haloc.runs.finished import Finished, apply_stage, stage_folder
from nni_haloc.runs.folder import RunFolder
from nni_haloc.runs.job import Job, logged
from nni_haloc.runs.run import run
from nni_haloc.runs.saved import load
from nni_haloc.runs.stages import stages_of
from nni_haloc.runs.stages.choose_ranks import ChooseRanks
from nni_haloc.runs.stages.prune import Prune
from nni_haloc.runs.stages.quantize import _int8
from nni_haloc.space.layers import Factorised
from nni_haloc.training.finetuning import accuracy
from nni_haloc.utils.errors import HalocError

SHORT = {
    "rule": "uniform",
    "finetune.epochs": 1,
    "data.share": 0.5,
    "recalibration_batches": 5,
    "cost.batch_size": 8,
}
PRUNE = {"epochs": 2, "sparsity": 0.3}
OF_NO_TIME = ("latency_ms", "speedup", "images_per_s")
OF_THE_TIMED_NETWORK = ("speedup", "images_per_s", "latency_ms", "original_latency_ms")


class Stopped(Exception):
    pass


def chain(folder, resume=False, until=99, **sections):
    """Return a run's metrics and reports.

    It is stopped by the report numbered ``until``, which is not counted.
    """
    reports = []

    def report(stage, metrics, place):
        if len(reports) == until:
            raise Stopped
        reports.append((stage, place, metrics))

    config = load_config(DIGITS, SHORT | sections)
    if until == 99:
        return run(config, folder, report, resume=resume), reports
    with pytest.raises(Stopped):
        run(config, folder, report, resume=resume)
    return {}, reports


def untimed(metrics):
    return {key: value for key, value in metrics.items() if not key.endswith(OF_NO_TIME)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("chain")


@pytest.fixture(scope="module")
def whole(folder):
    return chain(
        folder, prune=PRUNE, quantize={"epochs": 1, "quantizer": "qat", "calibration_images": 64}
    )


def test_every_stage_reports_flat_metrics_and_the_last_one_the_default(whole):
    metrics, reports = whole
    assert all(type(value) in (int, float) for value in metrics.values())
    assert list(metrics) == [
        "default", "original_top1", "original_test_top1", "original_macs", "original_params",
        "original_images", "original_chance", "original_latency_ms", "speedup",
        "macs_reduction", "params_reduction", "original_at_chance", "far_above_original",
        "top1", "test_top1", "macs", "params", "latency_ms", "images_per_s", "bytes",
        "pruned_top1", "pruned_test_top1", "pruned_macs", "pruned_params", "pruned_latency_ms",
        "pruned_speedup", "pruned_bytes", "quantized_top1", "quantized_test_top1", "int8_top1",
        "int8_test_top1", "onnx_latency_ms", "int8_latency_ms", "int8_bytes",
    ]  # fmt: skip
    assert metrics["default"] == metrics["int8_top1"]
    assert metrics["pruned_macs"] < metrics["macs"]
    assert metrics["pruned_bytes"] < metrics["bytes"]
    assert metrics["images_per_s"] == pytest.approx(8e3 / metrics["latency_ms"])
    assert metrics["speedup"] == metrics["original_latency_ms"] / metrics["latency_ms"]
    for key in ("macs", "params"):
        left = metrics[key] / metrics[f"original_{key}"]
        assert metrics[f"{key}_reduction"] == pytest.approx(1 - left)
    assert all(0.3 < metrics[key] <= 1 for key in metrics if key.endswith("top1"))
    epochs = {"finetune": 1, "prune": 2, "quantize": 1}
    curves = [(stage, place) for stage, number in epochs.items() for place in range(1 + number)]
    assert [(stage, place) for stage, place, _ in reports] == curves
    assert all(0 <= row["default"] <= 1 for *_, row in reports)


def test_each_stages_folder_gives_back_what_was_reported(folder, whole):
    metrics, _ = whole
    data = digits(0.2).shared(0.5)
    test = data.loader("test", 64)
    small = load(folder / "pruned")  # by its name: without NNI and without the original
    assert accuracy(small, test)[0] == pytest.approx(metrics["pruned_test_top1"])
    assert count_macs(small, data.images("test", 1)) == metrics["pruned_macs"]
    assert sum(p.numel() for p in small.parameters()) == metrics["pruned_params"]
    assert accuracy(load(folder), test)[0] == pytest.approx(metrics["test_top1"])
    quantized = load(folder / "quantized")
    assert str(quantized) == str(small)
    assert any(
        not torch.equal(a, b)
        for a, b in zip(quantized.parameters(), small.parameters(), strict=True)
    )  # trained once more
    assert accuracy(OnnxNetwork(folder / "quantized" / "int8.onnx"), test)[0] == pytest.approx(
        metrics["int8_test_top1"]
    )
    content = json.loads((folder / "quantized" / "quantization.json").read_text())
    assert content["quantizer"] == "qat"
    assert {name for name, _ in small.named_modules()} >= set(content["layers"])


def test_a_finished_chain_is_read_back_without_training_reporting_or_timing(folder, whole):
    again, reports = chain(
        folder,
        resume=True,
        prune=PRUNE,
        quantize={"epochs": 1, "quantizer": "qat", "calibration_images": 64},
    )
    assert reports == []
    assert {k: v for k, v in again.items() if k not in OF_THE_TIMED_NETWORK} == {
        k: v for k, v in whole[0].items() if k not in OF_THE_TIMED_NETWORK
    }


@pytest.mark.parametrize("quantizer", ["qat", "lsq"])
def test_a_chain_that_was_stopped_in_a_stage_goes_on_there_and_reports_nothing_twice(
    tmp_path, quantizer
):
    sections = {
        "prune": PRUNE | {"pruner": "taylor"},
        "quantize": {"quantizer": quantizer, "int8": False, "calibration_images": 64},
    }
    metrics, reports = chain(tmp_path / "undisturbed", **sections)
    assert len(reports) == 2 + 3 + 3
    _, first = chain(
        tmp_path / "stopped", until=4, **sections
    )  # before the second epoch of fine-tuning after pruning
    _, second = chain(
        tmp_path / "stopped", resume=True, until=3, **sections
    )  # and before the second of the quantizer's training
    found, third = chain(tmp_path / "stopped", resume=True, **sections)
    assert [*first, *second, *third] == reports
    assert untimed(found) == untimed(metrics)
    for stage in ("pruned", "quantized"):
        ours, theirs = (
            tmp_path / run / stage / "weights.safetensors" for run in ("stopped", "undisturbed")
        )
        assert ours.read_bytes() == theirs.read_bytes()


def test_a_stage_of_other_settings_is_made_anew(tmp_path):
    first, _ = chain(tmp_path, prune={"epochs": 0, "sparsity": 0.3, "pruner": "fpgm"})
    other, reports = chain(
        tmp_path, resume=True, prune={"epochs": 0, "sparsity": 0.6, "pruner": "fpgm"}
    )
    assert other["pruned_macs"] < first["pruned_macs"]
    assert len(reports) == 1  # of the pruned network


def test_without_the_sections_a_run_is_what_it_was(tmp_path):
    metrics, _ = chain(tmp_path)
    assert not any(key.startswith(("pruned_", "quantized_", "int8_")) for key in metrics)
    assert metrics["default"] == metrics["top1"]
    assert not (tmp_path / "pruned").exists()


def test_a_new_run_leaves_no_stage_of_an_earlier_one(tmp_path):
    for name in ("pruned", "quantized"):
        (tmp_path / name).mkdir()
    chain(tmp_path)
    assert not (tmp_path / "pruned").exists()
    assert not (tmp_path / "quantized").exists()


def test_the_commands_prune_and_quantize_a_finished_run(folder, whole, tmp_path):
    done = haloc(
        "prune",
        folder,
        "--sparsity",
        "0.5",
        "--pruner",
        "fpgm",
        "--epochs",
        "0",
        "--out",
        tmp_path / "half",
    )
    assert done.returncode == 0, done.stderr
    heads, *rows = [line for line in done.stdout.splitlines() if line[0] in "┃│"]
    assert "pruned" in [cell.strip() for cell in heads.split("┃")]
    assert any(row.startswith("│ MACs") for row in rows)
    half = json.loads((tmp_path / "half" / "metrics.json").read_text())
    assert half["stages"]["prune"]["macs"] < whole[0]["pruned_macs"]
    assert (
        half["config"]["prune"] | {"sparsity": 0.5, "pruner": "fpgm", "epochs": 0}
        == half["config"]["prune"]
    )
    done = haloc(
        "quantize",
        tmp_path / "half",
        "--quantizer",
        "ptq",
        "--set",
        "quantize.int8=false",
        "--out",
        tmp_path / "small",
    )
    assert done.returncode == 0, done.stderr
    assert str(load(tmp_path / "small")) == str(load(tmp_path / "half"))
    stages = json.loads((tmp_path / "small" / "metrics.json").read_text())["stages"]
    assert {name: set(figures) for name, figures in stages.items()} == {
        "quantize": {"top1", "test_top1", "bytes"}
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["prune", "FOLDER", "--sparsity", "1.5"],
            "--sparsity: input should be less than 1, found 1.5",
        ),
        (
            ["prune", "FOLDER", "--pruner", "l3"],
            "--pruner: expected one of l1, l2, fpgm, taylor, slim, movement, level, found 'l3'",
        ),
        (
            ["quantize", "FOLDER", "--quantizer", "binary"],
            "--quantizer: expected one of ptq, qat, lsq, lsq+, dorefa, bnn, found 'binary'",
        ),
        (["quantize", "FOLDER", "--set", "quantize.bits=4"], "quantize.bits: unknown key"),
        (["prune", "none"], "none: no such folder; expected that of a finished run"),
        (
            ["quantize", "none"],
            "none: no such folder; expected that of a finished run",
        ),
        (
            ["run", DIGITS, "--set", "prune.sparsity=1.5"],
            "prune.sparsity: input should be less than 1, found 1.5",
        ),
        (
            ["run", DIGITS, "--set", "prune={pruner: agp}"],
            "prune.pruner: expected one of l1, l2, fpgm, taylor, slim, movement, level, "
            "found 'agp'",
        ),
        (
            ["prune", "FOLDER", "--set", "prune.ranks=some"],
            "prune.ranks: input should be 'keep' or 'prune', found 'some'",
        ),
        (
            [*["prune", "FOLDER", "--pruner", "movement", "--set"], "prune.sparsity_schedule=agp"],
            "prune: sparsity_schedule: expected none with the pruner 'movement', which has one of"
            " its own, found 'agp'",
        ),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(folder, whole, arguments, message, tmp_path):
    before = {
        path: path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "log.txt"
    }
    done = haloc(*(folder if word == "FOLDER" else word for word in arguments), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("haloc: ")
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert before == {
        path: path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "log.txt"
    }
    assert list(tmp_path.iterdir()) == []


SMALL = {"quantize.quantizer": "ptq", "quantize.int8": False}
NO_TRAINING = {"finetune.epochs": 0, "recalibration_batches": 1, "data.share": 0.2}


def files(folder):
    return {
        path: path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "log.txt"
    }


@pytest.mark.parametrize(
    ("source", "out"), [(".", "."), ("pruned", "pruned"), ("pruned", "."), (".", "pruned/..")]
)
@pytest.mark.parametrize("stage", ["prune", "quantize"])
def test_a_stage_takes_no_folder_that_its_network_comes_from(folder, whole, stage, source, out):
    before = files(folder)
    with pytest.raises(HalocError, match="--out: expected another folder than the run's, found "):
        apply_stage(folder / source, stage, {}, folder / out)
    assert files(folder) == before


def test_a_stage_of_another_network_is_made_anew(folder, whole, tmp_path):
    first = apply_stage(folder, "quantize", SMALL, tmp_path / "here")
    assert apply_stage(folder, "quantize", SMALL, tmp_path / "here", resume=True) == first
    assert str(load(tmp_path / "here")) == str(load(folder))
    other = apply_stage(folder / "pruned", "quantize", SMALL, tmp_path / "here", resume=True)
    assert str(load(tmp_path / "here")) == str(load(folder / "pruned"))
    assert other == apply_stage(folder / "pruned", "quantize", SMALL, tmp_path / "there")


@pytest.mark.parametrize(("key", "value"), [("data.score", "test"), ("threads", 2)])
def test_a_stages_figures_are_of_their_settings_and_its_training_is_used_again(
    folder, whole, tmp_path, caplog, monkeypatch, key, value
):
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    settings = {"quantize.quantizer": "qat", "quantize.epochs": 1, "quantize.int8": False}
    apply_stage(folder, "quantize", settings, tmp_path)
    caplog.set_level("INFO", "nni_haloc")
    caplog.clear()
    apply_stage(folder, "quantize", settings | {key: value}, tmp_path, resume=True)
    assert "quantize: done" not in caplog.text
    assert "quantization-aware training: 1 of 1 epochs are done" in caplog.text
    assert "epoch 1: top-1" not in caplog.text
    top, *rest = key.split(".")
    config = json.loads((tmp_path / "metrics.json").read_text())["config"][top]
    assert (config[rest[0]] if rest else config) == value


@pytest.mark.parametrize("pruner", list(PRUNERS))
def test_every_pruner_is_a_setting_of_a_run(folder, whole, tmp_path, pruner):
    changes = {"pruner": pruner, "epochs": 1, "batches": 2, "sparsity": 0.4}
    if not PRUNERS[pruner].scheduled:
        changes["sparsity_schedule"] = "agp"
    changes = {f"prune.{key}": value for key, value in changes.items()}
    figures = apply_stage(folder, "prune", changes | {"data.share": 0.2}, tmp_path / pruner)
    assert 0 <= figures["pruned_top1"] <= 1
    small, before = load(tmp_path / pruner), load(folder)
    ranks = [
        {n: m.factors()[1].shape for n, m in network.named_modules() if isinstance(m, Factorised)}
        for network in (small, before)
    ]
    if pruner == "level":
        assert str(small) == str(before)
        assert figures["pruned_zero_share"] == pytest.approx(0.4, abs=0.01)
        assert zero_share(small) == figures["pruned_zero_share"]  # fine-tuning has kept them
    else:
        assert figures["pruned_params"] < sum(p.numel() for p in before.parameters())
        assert {n: shape[:2] for n, shape in ranks[0].items()} == {
            n: shape[:2] for n, shape in ranks[1].items()
        }


@pytest.mark.parametrize("quantizer", list(QUANTIZERS))
def test_every_quantizer_is_a_setting_of_a_run(folder, whole, tmp_path, quantizer):
    changes = {"quantize.quantizer": quantizer, "quantize.int8": False, "quantize.epochs": 1}
    changes |= {"data.share": 0.2, "quantize.calibration_images": 64}
    figures = apply_stage(folder, "quantize", changes, tmp_path / "q")
    assert set(figures) == {"quantized_top1", "quantized_test_top1"}
    assert 0 <= figures["quantized_top1"] <= 1
    content = json.loads((tmp_path / "q" / "quantization.json").read_text())
    assert content["quantizer"] == quantizer
    assert {name for name, _ in load(tmp_path / "q").named_modules()} >= set(content["layers"])


def test_a_network_quantized_from_a_stage_lies_where_report_and_bench_look(folder, whole, tmp_path):
    run_folder = shutil.copytree(folder, tmp_path / "run")
    before = RunFolder(run_folder).metrics()["quantize"]
    changes = SMALL | {"quantize.calibration_images": 8, "data.share": 0.2}
    figures = apply_stage(run_folder / "pruned", "quantize", changes)
    assert not (run_folder / "pruned" / "quantized").exists()
    run = RunFolder(run_folder)
    assert run.metrics()["quantize"]["top1"] == figures["quantized_top1"]
    assert set(run.metrics()["quantize"]) != set(before)  # no int8 this time
    assert f"{100 * figures['quantized_top1']:.2f} %" in html_report(run_folder)
    assert str(Finished(run_folder).networks()["quantized"]) == str(load(run_folder / "pruned"))


@pytest.mark.parametrize(
    ("source", "stage", "expected"),
    [
        (".", "prune", "pruned"),
        (".", "quantize", "quantized"),
        ("pruned", "quantize", "quantized"),
        ("quantized", "prune", "quantized/pruned"),
        ("quantized", "quantize", "quantized/quantized"),
        ("pruned", "prune", "pruned/pruned"),
    ],
)
def test_a_stage_of_a_stage_is_left_in_the_runs_folder_if_it_comes_later(
    folder, whole, monkeypatch, source, stage, expected
):
    monkeypatch.chdir(folder / source)
    for given in (folder / source, Path(".")):
        found = stage_folder(RunFolder(given), stage).path
        assert found.resolve() == (folder / expected).resolve()


def test_a_package_that_int8_needs_is_missed_before_anything_is_done(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setattr(ChooseRanks, "run", lambda *args: pytest.fail("ranks were chosen"))
    with pytest.raises(
        HalocError, match=r"^quantize.int8: .*needs the package onnx, which is not installed"
    ):
        chain(tmp_path, quantize={})
    job = Job(load_config(DIGITS, SHORT | {"quantize": {"int8": False}}), tmp_path)
    for stage in stages_of(job.config):
        stage.check(job)


def test_a_network_that_cannot_be_traced_is_refused_before_anything_is_done(tmp_path, monkeypatch):
    class Untraceable(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    monkeypatch.setattr(
        "nni_haloc.runs.job.build_model",
        lambda *args, **options: nn.Sequential(
            Untraceable(1, 1, 1), nn.Flatten(), nn.Linear(64, 10)
        ),
    )
    monkeypatch.setattr(ChooseRanks, "run", lambda *args: pytest.fail("ranks were chosen"))
    monkeypatch.setattr("nni_haloc.runs.job.load_weights", lambda *args: None)
    Untraceable.__module__ = __name__
    with pytest.raises(HalocError, match="^prune: torch.fx cannot trace Sequential"):
        chain(tmp_path, prune=PRUNE)


def test_a_stage_that_fails_leaves_the_runs_own_metrics(tmp_path, monkeypatch):
    def fail(*args, **options):
        raise HalocError("prune: failed")

    monkeypatch.setattr(Prune, "apply", fail)
    with pytest.raises(HalocError, match="prune: failed"):
        chain(tmp_path, prune=PRUNE, **NO_TRAINING)
    content = json.loads((tmp_path / "metrics.json").read_text())
    assert list(content["stages"]) == ["original", "search", "finetune"]
    figures = content["stages"]["finetune"]
    assert {"top1", "macs", "latency_ms"} <= set(figures)
    test = digits(0.2).shared(0.2).loader("test", 64)
    assert accuracy(Finished(tmp_path).network(), test)[0] == figures["test_top1"]


def test_resuming_a_rules_run_without_fine_tuning_keeps_its_stages(tmp_path):
    sections = NO_TRAINING | {"prune": {"epochs": 0}}
    first, _ = chain(tmp_path, **sections)
    found, reports = chain(tmp_path, resume=True, **sections)
    assert [place for _, place, _ in reports] == [0]  # of the network that is not fine-tuned
    assert found["pruned_latency_ms"] == first["pruned_latency_ms"]


def test_a_network_of_one_batch_size_has_no_int8_accuracy_and_the_log_says_so(tmp_path, caplog):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 2, 3), nn.Linear(72, 10)

        def forward(self, x):
            return self.head(self.conv(x).reshape(8, 72))

    job = Job(load_config(DIGITS, SHORT), tmp_path)
    metrics = _int8(job, Fixed().eval(), job.splits.images("plain", 16, 0), tmp_path)
    assert set(metrics) == {"onnx_latency_ms", "int8_latency_ms", "int8_bytes"}
    assert f"no int8_top1: {tmp_path / 'int8.onnx'} takes batches of 8 alone" in caplog.text


def test_ctrl_c_in_a_stage_promises_its_own_checkpoint_alone(tmp_path, capsys):
    run_folder = RunFolder(tmp_path)
    for stage in (None, RunFolder(tmp_path / "quantized")):
        run_folder.searching.path.mkdir(exist_ok=True)
        run_folder.searching.checkpoint.touch()
        with pytest.raises(SystemExit), logged(run_folder, stage):
            os.kill(os.getpid(), signal.SIGINT)
    assert capsys.readouterr().err.splitlines() == [
        f"haloc: stopped by Ctrl-C; {tmp_path} keeps the checkpoint; --resume goes on from it",
        "haloc: stopped by Ctrl-C; no epoch is done, and nothing is kept: "
        "the same command starts anew",
    ]


@pytest.mark.parametrize("stage", ["prune", "quantize"])
def test_the_scale_of_a_run_is_none_of_a_stage(folder, whole, tmp_path, stage):
    with pytest.raises(
        HalocError, match=f"^scale: only for a whole run; set {stage}.epochs instead$"
    ):
        apply_stage(folder, stage, {"scale": 0.1}, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_export_and_bench_calibrate_on_as_many_images_as_the_chain(folder, whole, tmp_path):
    assert len(Finished(folder).calibration_images()) == 64
    content = json.loads((folder / "metrics.json").read_text())
    content["config"]["quantize"], content["config"]["rank_space"]["calibration_images"] = None, 50
    for name in ("ranks.json", "weights.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "metrics.json").write_text(json.dumps(content))
    assert len(Finished(tmp_path).calibration_images()) == 50


def test_other_processes_wait_while_the_first_takes_the_time(tmp_path, monkeypatch):
    events = []
    measured = lambda models, *_, **__: events.append("timed") or dict.fromkeys(models, 1.0)  # noqa: E731
    monkeypatch.setattr("nni_haloc.runs.job.measure_latency", measured)
    for module in ("nni_haloc.runs.run", "nni_haloc.runs.stages.stage"):
        monkeypatch.setattr(f"{module}.wait_for_all", lambda: events.append("all are here"))
    meet = "all are here"  # after each stage, and before a stage leaves its files
    first = [meet, "timed", meet, "timed", meet, meet]
    for rank, expected in (("0", first), ("1", [meet] * 4)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        events.clear()
        chain(tmp_path / rank, prune={"epochs": 0}, **NO_TRAINING)
        assert events == expected


def test_the_settings_of_distillation_reach_the_trainings(tmp_path, monkeypatch):
    calls = []

    def finetune(network, *args, **options):
        calls.append(
            {key: options.get(key) for key in ("teacher", "distill", "layers", "feature_weight")}
        )
        return network.eval()

    monkeypatch.setattr("nni_haloc.runs.stages.training.finetune", finetune)
    sections = {
        "finetune.distill": 0.2,
        "finetune.distill_features": 0.5,
        "prune": {"epochs": 1, "distill": 0.4},
    }
    chain(
        tmp_path,
        **NO_TRAINING,
        **sections,
        quantize={"quantizer": "qat", "int8": False, "calibration_images": 8},
    )
    teachers = [row.pop("teacher") for row in calls]
    layers = list(json.loads((tmp_path / "ranks.json").read_text())["ranks"])
    assert calls == [
        {"distill": 0.2, "layers": layers, "feature_weight": 0.5},
        {"distill": 0.4, "layers": None, "feature_weight": None},
        {"distill": None, "layers": None, "feature_weight": None},
    ]
    assert teachers[0] is teachers[1] is not None
    assert teachers[2] is None
