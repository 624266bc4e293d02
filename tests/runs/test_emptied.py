"""What a power cut may leave: empty and cut-off files. With ``--resume`` none counts as there."""

import shutil

import pytest
import torch
from helpers.commands import haloc
from helpers.paths import DIGITS
from helpers.short_runs import SHORT
from safetensors.torch import load_file, save_file

from nni_haloc.chain.exporting import OnnxNetwork
from nni_haloc.inputs.config import load_config
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.runs.folder import RunFolder, tensor_shapes
from nni_haloc.runs.run import run, search_only
from nni_haloc.utils.errors import UnusableCheckpoint
from nni_haloc.utils.files import read_json

SEARCH = [*SHORT, "--set", "search.epochs=1", "--set", "search.start=uniform"]
CHAIN = {
    "rule": "uniform",
    "data.share": 0.25,
    "finetune.epochs": 0,
    "recalibration_batches": 1,
    "prune": {"epochs": 0},
    "quantize": {"calibration_images": 16},
}


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A finished search."""
    folder = tmp_path_factory.mktemp("searched")
    done = haloc("search", DIGITS, "--out", folder, *SEARCH)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run with both further stages, and its metrics."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, run(load_config(DIGITS, CHAIN), folder)


def cut(path, how):
    data = path.read_bytes()
    path.write_bytes(data[: {"empty": 0, "half": len(data) // 2}[how]])


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("weights.safetensors", "empty"),
        ("weights.safetensors", "half"),
        ("ranks.json", "empty"),
        ("search.json", "half"),
        ("costs.json", "empty"),
        ("model.json", "half"),
    ],
)
def test_a_file_of_a_finished_search_is_made_again(searched, tmp_path, name, how):
    folder = shutil.copytree(searched, tmp_path / "run")
    cut(folder / name, how)
    done = haloc("search", DIGITS, "--out", folder, *SEARCH, "--resume")
    assert done.returncode == 0, done.stderr
    if name == "weights.safetensors":
        there, made = (load_file(place / name) for place in (searched, folder))
        assert all(torch.equal(there[key], made[key]) for key in {**there, **made})
    else:
        assert (folder / name).read_bytes() == (searched / name).read_bytes()


@pytest.mark.parametrize("how", ["empty", "half"])
def test_a_checkpoint_that_is_cut_off_is_one_line(searched, tmp_path, how):
    """A search is not begun anew by itself: it may have taken days."""
    folder = shutil.copytree(searched, tmp_path / "run")
    cut(folder / "search" / "checkpoint.ckpt", how)
    done = haloc("search", DIGITS, "--out", folder, *SEARCH, "--resume")
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"haloc: {folder}/search/checkpoint.ckpt: not a checkpoint that can be")
    assert "start without --resume" in line


def test_weights_of_another_plan_do_not_count(searched, tmp_path):
    """What is left where the names of two new files reach the disk apart from each other."""
    folder = shutil.copytree(searched, tmp_path / "run")
    weights = load_file(folder / "weights.safetensors")
    smaller = {key: value.reshape(-1)[:1].clone() for key, value in weights.items()}
    save_file(smaller, folder / "weights.safetensors")
    done = haloc("search", DIGITS, "--out", folder, *SEARCH, "--resume")
    assert done.returncode == 0, done.stderr
    assert tensor_shapes(folder / "weights.safetensors") == {
        key: tuple(value.shape) for key, value in weights.items()
    }


@pytest.mark.parametrize(
    ("emptied", "stages"),
    [
        (["pruned/weights.safetensors"], "prune, quantize"),
        (["pruned/metrics.json", "quantized/ranks.json"], "prune, quantize"),
        (["pruned/model.json", "quantized/float32.onnx"], "prune, quantize"),
        (["quantized/int8.onnx"], "quantize"),
        (["quantized/quantization.json"], "quantize"),
        (["metrics.json", "weights.safetensors", "ranks.json"], ""),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_stage_with_an_empty_file_is_run_again(finished, tmp_path, caplog, emptied, stages):
    source, metrics = finished
    folder = shutil.copytree(source, tmp_path / "run")
    for name in emptied:
        cut(folder / name, "empty")
    again = run(load_config(DIGITS, CHAIN), folder, resume=True)
    for key in ("top1", "pruned_top1", "quantized_top1", "int8_top1", "pruned_macs"):
        assert again[key] == metrics[key], key
    for place in (folder, folder / "pruned", folder / "quantized"):
        files = RunFolder(place)
        assert files.holds_network
        assert read_json(files.model)["name"] == "digits_cnn"
        assert files.read_metrics()["stages"]
    for name in ("int8.onnx", "float32.onnx"):
        OnnxNetwork(folder / "quantized" / name)
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    if stages:
        first = stages.partition(",")[0]
        assert any(line.endswith(f"; the stage {first} is run again") for line in told)
        assert any(str(folder / emptied[0]) in line for line in told)


def test_nothing_is_run_again_where_all_is_there(finished, tmp_path, monkeypatch):
    source, metrics = finished
    folder = shutil.copytree(source, tmp_path / "run")
    for stage in ("prune.Prune", "quantize.Quantize"):
        monkeypatch.setattr(f"nni_haloc.runs.stages.{stage}.apply", None)
    again = run(load_config(DIGITS, CHAIN), folder, resume=True)
    assert again["int8_top1"] == metrics["int8_top1"]


@pytest.mark.parametrize(
    "facts", [{}, {"identity": {}}, {"identity": [], "costs": []}, {"identity": {}, "costs": "x"}]
)
def test_a_checkpoint_without_its_facts_is_one_line(searched, tmp_path, facts):
    folder = shutil.copytree(searched, tmp_path / "run")
    state = folder / "search" / "checkpoint.ckpt"
    content = torch.load(state, weights_only=True)
    content["nni_haloc"]["facts"] = facts
    torch.save(content, state)
    config = load_config(DIGITS, {"search.epochs": 1})
    with pytest.raises(UnusableCheckpoint, match=r"checkpoint.ckpt: not a checkpoint .*expected a"):
        search_only(config, folder, resume=True)


def test_a_network_is_in_a_folder_if_both_of_its_files_can_be_read(searched, tmp_path):
    assert RunFolder(searched).holds_network
    for name in ("ranks.json", "weights.safetensors"):
        for how in ("empty", "half"):
            folder = shutil.copytree(searched, tmp_path / f"{name}-{how}")
            cut(folder / name, how)
            assert not RunFolder(folder).holds_network
            with pytest.raises(ValueError, match=name):
                (RankPlan.load if name == "ranks.json" else tensor_shapes)(folder / name)
