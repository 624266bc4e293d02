"""The folder of a run: names, the order of stages, ``metrics.json`` in every version."""

import json

import pytest
import torch
from safetensors.torch import save

from nni_haloc.inputs.registries import STAGES
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.runs.folder import METRICS_VERSION, RunFolder
from nni_haloc.runs.stages import clear, further_stages
from nni_haloc.utils.errors import SettingsError

FIGURES = {"top1": 0.5, "macs": 10}


def network_in(path, **stages):
    """Make a folder that holds a network, as far as can be seen from outside."""
    path.mkdir(parents=True, exist_ok=True)
    RankPlan({"a": (2, 2)}).save(path / "ranks.json")
    (path / "weights.safetensors").write_bytes(save({"a.weight": torch.zeros(2, 2)}))
    folder = RunFolder(path)
    if stages:
        folder.write_metrics(stages)
    return folder


def test_naming_a_folder_makes_none(tmp_path):
    folder = RunFolder(tmp_path / "none")
    assert not folder.path.exists()
    assert not folder.holds_network
    assert folder.metrics() == {}
    assert str(folder) == str(tmp_path / "none")
    assert folder.finetuning.checkpoint == tmp_path / "none" / "finetuning" / "checkpoint.ckpt"
    assert folder.further_costs(1).name == "costs-also1.json"


@pytest.mark.parametrize("missing", ["ranks.json", "weights.safetensors"])
def test_a_folder_without_its_network_is_refused_by_the_missing_file(tmp_path, missing):
    folder = network_in(tmp_path)
    folder.check_holds_network()
    (tmp_path / missing).unlink()
    assert not folder.holds_network
    with pytest.raises(SettingsError, match=f"{missing}: no such file; expected the folder of a"):
        folder.check_holds_network()


def test_stages_are_in_the_order_of_the_pipeline_and_unknown_folders_are_last(tmp_path):
    """Whatever was made first, and whatever its name sorts like."""
    network_in(tmp_path / "a-run-of-its-own", original=FIGURES, finetune=FIGURES)
    network_in(tmp_path / "again", prune=FIGURES)
    network_in(tmp_path / "by-hand")
    network_in(tmp_path / "another", **{"of a package that is gone": FIGURES})
    network_in(tmp_path / "quantized", quantize=FIGURES)
    network_in(tmp_path / "pruned", prune=FIGURES)
    for name in ("export", "front"):  # these hold networks that are no stages
        network_in(tmp_path / name)
    for name in ("search", "finetuning"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").touch()
    stages = RunFolder(tmp_path).stages()
    unknown = ["a-run-of-its-own", "another", "by-hand"]
    assert list(stages) == ["again", "pruned", "quantized", *unknown]
    assert [folder.path for folder in stages.values()] == [tmp_path / name for name in stages]


def test_a_stage_of_another_package_has_its_place_after_ours(tmp_path, monkeypatch):
    from helpers.toy_stage import Round

    monkeypatch.setitem(STAGES._added, "round", Round)
    network_in(tmp_path / "by-hand")
    network_in(tmp_path / "a-rounded-one", round=FIGURES)
    network_in(tmp_path / "quantized", quantize=FIGURES)
    assert list(RunFolder(tmp_path).stages()) == ["quantized", "a-rounded-one", "by-hand"]


def test_clearing_leaves_what_is_not_a_runs(tmp_path):
    folder = network_in(tmp_path, original=FIGURES, finetune=FIGURES)
    kept = [tmp_path / "notes.txt", tmp_path / "data" / "image.png", folder.log, folder.costs]
    gone = [
        folder.model,
        folder.bench,
        folder.search_file,
        folder.layers,
        folder.plan_picture,
        folder.searching.checkpoint,
        folder.finetuning.history,
        folder.front / "front.json",
        folder.export / "model.onnx",
        *(tmp_path / stage.folder / "ranks.json" for stage in further_stages()),
    ]
    for file in (*kept, *gone):
        file.parent.mkdir(exist_ok=True)
        file.touch()
    clear(folder)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == set(kept)
    clear(RunFolder(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_another_process_clears_nothing(tmp_path, monkeypatch):
    folder = network_in(tmp_path)
    monkeypatch.setenv("LOCAL_RANK", "1")
    clear(folder)
    assert folder.holds_network


def test_metrics_are_read_as_they_are_written(tmp_path):
    folder = RunFolder(tmp_path)
    stages = {"original": FIGURES, "finetune": {"top1": 0.25}}
    folder.write_metrics(stages, config={"seed": 1}, versions={"torch": "2"})
    written = json.loads(folder.metrics_file.read_text())
    assert written == {
        "version": METRICS_VERSION,
        "stages": stages,
        "config": {"seed": 1},
        "versions": {"torch": "2"},
    }
    empty = {"parameters": {}, "identity": {}}
    assert folder.read_metrics() == written | empty
    assert folder.metrics() == stages
    assert list(folder.metrics()) == list(stages)


def test_metrics_of_stages_that_a_command_made_are_read_from_their_folders(tmp_path):
    """The folder of a stage's own name comes first, then the run's word, then other folders."""
    run = network_in(tmp_path, original=FIGURES, finetune=FIGURES, prune={"top1": 0.3})
    network_in(tmp_path / "quantized", quantize={"int8_top1": 0.2})
    network_in(tmp_path / "again", prune={"top1": 0.8})
    assert run.metrics()["prune"] == {"top1": 0.3}
    network_in(tmp_path / "pruned", prune={"top1": 0.9})
    assert run.metrics() == {
        "original": FIGURES,
        "finetune": FIGURES,
        "prune": {"top1": 0.9},
        "quantize": {"int8_top1": 0.2},
    }
    assert RunFolder(tmp_path / "pruned").metrics() == {"prune": {"top1": 0.9}}


def test_flat_metrics_of_version_1_are_sorted_by_stage(tmp_path):
    folder = RunFolder(tmp_path)
    flat = {
        "default": 0.5,
        "baseline_top1": 0.75,
        "baseline_top5": 0.9,
        "top5": 0.8,
        "latency_ms": 2.0,
        "baseline_latency_ms": 3.0,
        "speedup": 1.5,
        "images_per_s": 500.0,
        "macs": 30,
        "macs_reduction": 0.7,
    }
    folder.metrics_file.write_text(json.dumps({"metrics": flat, "config": {"seed": 0}}))
    assert folder.metrics() == {
        "original": {"top1": 0.75, "top5": 0.9, "latency_ms": 3.0, "macs": 100},
        "finetune": {
            "top1": 0.5,
            "top5": 0.8,
            "latency_ms": 2.0,
            "images_per_s": 500.0,
            "macs": 30,
        },
    }
    assert folder.read_metrics()["config"] == {"seed": 0}


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("macs", (float("inf"), 0.5)),
        ("macs", (10**400, 0.5)),
        ("macs", (float("nan"), 0.5)),
        ("macs", (5, 1.0)),
        ("macs", ("5", 0.5)),
        ("params", (5, None)),
        ("params", (True, 0.5)),
    ],
)
def test_numbers_of_version_1_that_give_no_original_give_none(tmp_path, key, values):
    folder = RunFolder(tmp_path)
    flat = dict(zip((key, f"{key}_reduction"), values, strict=True))
    folder.metrics_file.write_text(json.dumps({"metrics": flat}))
    assert "original" not in folder.metrics()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a JSON file"),
        ("[" * 10**5, "not a JSON file"),
        ("[]", "expected keys and values, found list"),
        ('{"version": 3, "stages": {}}', "expected metrics of version 2, found 3"),
        ('{"version": "2", "stages": {}}', "expected metrics of version 2, found '2'"),
        ('{"version": [], "stages": {}}', r"expected metrics of version 2, found \[\]"),
        ('{"version": 2, "stages": []}', "stages: expected keys and values, found list"),
        ('{"version": 2, "stages": {"prune": 1}}', "prune: expected figures, found int"),
        ('{"version": 2, "config": 1}', "config: expected keys and values, found int"),
        ('{"metrics": [1]}', "metrics: expected keys and values, found list"),
    ],
)
def test_damaged_metrics_are_named_on_one_line(tmp_path, content, message):
    folder = network_in(tmp_path)
    folder.metrics_file.write_text(content)
    for read in (folder.read_metrics, folder.metrics):
        with pytest.raises(SettingsError, match=f"metrics.json: {message}") as caught:
            read()
        assert "\n" not in str(caught.value)
    stage = network_in(tmp_path / "pruned")
    folder.write_metrics({"original": FIGURES})
    stage.metrics_file.write_text(content)
    with pytest.raises(SettingsError, match=f"pruned/metrics.json: {message}"):
        folder.metrics()
