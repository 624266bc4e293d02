"""A run's folder that version 0.1 wrote, with flat metrics, serves every command as a new one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.pages import Page
from helpers.paths import DIGITS
from onnxruntime import InferenceSession

import nni_haloc
from nni_haloc.costs.counts import count_macs, count_params
from nni_haloc.inputs.data import digits
from nni_haloc.inputs.registries import STAGES as KNOWN
from nni_haloc.results.bench import bench
from nni_haloc.results.export import DEFAULT, export
from nni_haloc.results.html_report import html_report
from nni_haloc.runs.finished import Finished, apply_stage
from nni_haloc.runs.folder import RunFolder
from nni_haloc.runs.run import flatten
from nni_haloc.training.finetuning import accuracy

OLD = Path(__file__).with_name("old_run")
FLAT = json.loads((OLD / "metrics.json").read_text())["metrics"]
STAGES = {
    "original": {
        "top1": FLAT["baseline_top1"],
        "latency_ms": FLAT["baseline_latency_ms"],
        "macs": 1_493_632,  # counted back from macs and macs_reduction
        "params": 65_834,
    },
    "finetune": {
        "latency_ms": FLAT["latency_ms"],
        "images_per_s": FLAT["images_per_s"],
        "macs": 443_008,
        "params": 11_642,
        "top1": FLAT["haloc_top1"],
        "bytes": 50_800,
    },
    "prune": {
        "top1": FLAT["pruned_top1"],
        "macs": 228_674,
        "params": 6_323,
        "latency_ms": FLAT["pruned_latency_ms"],
        "bytes": 29_076,
    },
    "quantize": {
        "top1": FLAT["quantized_top1"],
        "int8_top1": FLAT["int8_top1"],
        "onnx_latency_ms": FLAT["onnx_latency_ms"],
        "int8_latency_ms": FLAT["int8_latency_ms"],
        "int8_bytes": 42_778,
    },
}


@pytest.fixture
def folder(tmp_path):
    """Return a copy whose settings find the weights from any current folder."""
    folder = shutil.copytree(OLD, tmp_path / "run")
    for file in folder.rglob("metrics.json"):
        content = json.loads(file.read_text())
        content["config"]["weights"] = str(DIGITS.with_name("digits.safetensors"))
        file.write_text(json.dumps(content))
    return folder


def test_its_figures_are_nested_by_stage_and_the_originals_are_counted_back(folder):
    stages = RunFolder(folder).metrics()
    assert stages == STAGES
    assert list(stages) == list(STAGES)
    original = Finished(folder).job.model
    image = torch.zeros(1, 1, 8, 8)
    assert stages["original"]["macs"] == count_macs(original, image)
    assert stages["original"]["params"] == count_params(original)


def test_its_figures_without_those_of_the_stages_are_read_from_their_folders(folder):
    content = json.loads((folder / "metrics.json").read_text())
    mine = ("pruned_", "quantized_", "onnx_", "int8_")
    content["metrics"] = {k: v for k, v in FLAT.items() if not k.startswith(mine)}
    (folder / "metrics.json").write_text(json.dumps(content))
    assert RunFolder(folder).metrics() == STAGES


def test_its_flat_result_is_what_it_was_by_todays_names(folder):
    flat = flatten(RunFolder(folder).metrics())
    today = {
        key.replace("baseline_", "original_").replace("haloc_", ""): value
        for key, value in FLAT.items()
    }
    counted = {"original_macs": 1_493_632, "original_params": 65_834}
    assert flat == pytest.approx(today | counted, rel=1e-12)
    assert flat["default"] == FLAT["int8_top1"]


@pytest.mark.parametrize("stage", ["", "pruned", "quantized"])
def test_its_networks_load_and_have_their_accuracy(folder, stage):
    network = nni_haloc.load(folder / stage)
    name = {"": "finetune", "pruned": "prune"}.get(stage)
    data = digits(0.2)
    if name:  # what quantize reports is of the network that is rounded
        assert accuracy(network, data.loader("test", 64))[0] == pytest.approx(STAGES[name]["top1"])
    counted = STAGES[name or "prune"]
    assert count_macs(network, data.images("test", 1)) == counted["macs"]
    assert count_params(network) == counted["params"]


def test_its_page_has_every_row_and_curve(folder):
    page = Page(html_report(folder))
    rows = {row[0]: row[1:] for row in reversed(page.rows) if row}  # the first table's count
    assert rows["original"] == ["96.39 %", "0.1598", "1,493,632", "65,834"]
    assert rows["compressed"] == ["96.94 %", "0.1662", "443,008", "11,642", "50.8 kB"]
    assert rows["pruned"] == ["79.44 %", "0.1572", "228,674", "6,323", "29.1 kB"]
    assert rows["quantized (simulated)"] == ["79.17 %"]
    assert rows["float32 in ONNX Runtime"] == ["0.03772"]
    assert rows["int8 in ONNX Runtime"] == ["80.28 %", "0.04699", "42.8 kB"]
    cards = "top-1 96.94 % original 96.39 % latency 0.1662 ms 4.0 % slower MACs 443 k"
    assert cards in page.text
    assert page.tags.count("img") == 5  # ranks, two of the search, fine-tuning, pruning
    assert "the median of 5 medians" in page.text  # its bench.json


def test_it_is_exported_in_every_format(folder):
    before = (folder / "weights.safetensors").read_bytes()
    images, labels = next(iter(digits(0.2).loader("test", 360)))
    for name, file, _ in export(folder):
        assert file.is_file()
        if file.suffix == ".onnx":
            session = InferenceSession(file)
            (inputs,) = session.get_inputs()
            logits = torch.from_numpy(session.run(None, {inputs.name: images.numpy()})[0])
            top1 = float((logits.argmax(1) == labels).float().mean())
            assert top1 == pytest.approx(FLAT["haloc_top1"], abs=0.01 if name == "int8" else 1e-6)
    assert len(list((folder / "export").iterdir())) == len(DEFAULT) + 2  # with ranks and model
    assert (folder / "weights.safetensors").read_bytes() == before


def test_it_is_benched_anew(folder):
    rows = bench(folder, [2], runtimes=["torch", "onnxruntime"], rounds=1, min_run_time=0.001)[
        "rows"
    ]
    forms = [("torch", "float32"), ("onnxruntime", "float32"), ("onnxruntime", "int8")]
    quantized = [("torch", "simulated"), ("onnxruntime", "int8")]  # no float32: that is "pruned"
    stages = {**dict.fromkeys(["original", "compressed", "pruned"], forms), "quantized": quantized}
    keys = [(stage, *form) for stage, known in stages.items() for form in known]
    assert [(row["stage"], row["runtime"], row["precision"]) for row in rows] == keys
    old = {
        (row["stage"].replace("haloc", "compressed"), row["runtime"], row["precision"]): row
        for row in json.loads((OLD / "bench.json").read_text())["rows"]
    }
    for key, row in zip(keys, rows, strict=True):
        if row["precision"] == "simulated":
            assert "imitated in float32" in row["reason"]
            continue
        before = old[key]
        assert (row["macs"], row["params"]) == (before["macs"], before["params"])
        close = 0.02 if row["precision"] == "int8" else 1e-6
        assert row["top1"] == pytest.approx(before["top1"], abs=close)
        assert row["images_per_s"] > 0
    assert json.loads((folder / "bench.json").read_text())["rows"] == rows


@pytest.mark.parametrize(("stage", "name"), [("prune", "pruned"), ("quantize", "quantized")])
def test_a_stage_that_it_has_is_read_back(folder, stage, name, caplog):
    caplog.set_level("INFO", "nni_haloc")
    before = (folder / name / "weights.safetensors").read_bytes()
    source = folder if stage == "prune" else folder / "pruned"
    flat = apply_stage(source, stage, {}, folder / name, resume=True)
    assert f"{stage}: done: {folder / name}" in caplog.text
    assert {key: value for key, value in FLAT.items() if key in flat} == flat
    assert (folder / name / "weights.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("saved", "changes", "ranks"),
    [
        ({"sparsity": 0.3}, {}, "prune"),  # as it did
        ({"sparsity": 0.3}, {"prune.ranks": "keep"}, "keep"),
        ({"sparsity": 0.3, "ranks": "keep"}, {}, "keep"),
        (None, {}, "keep"),
        (None, {"prune.sparsity": 0.4}, "keep"),
        (None, {"prune": {"sparsity": 0.4}}, "keep"),
        ({"sparsity": 0.3}, {"prune": {"sparsity": 0.4}}, "keep"),
    ],
)
def test_ranks_are_pruned_as_in_its_run_and_kept_where_that_did_not_prune(
    folder, saved, changes, ranks
):
    file = folder / "metrics.json"
    content = json.loads(file.read_text())
    content["config"]["prune"] = saved
    file.write_text(json.dumps(content))
    section = Finished(folder, stage=KNOWN["prune"](), changes=changes).config.prune
    assert (section.ranks, section.sparsity_schedule) == (ranks, "none")


def test_a_stage_is_applied_to_it(folder, tmp_path):
    figures = apply_stage(
        folder, "prune", {"prune.epochs": 0, "prune.sparsity": 0.6}, tmp_path / "out"
    )
    assert figures["pruned_macs"] < FLAT["pruned_macs"]
    content = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (content["version"], list(content["stages"])) == (2, ["prune"])
