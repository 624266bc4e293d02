"""README and tutorial as a reader goes through them: every block of code is run."""

import os
import re
import subprocess

import pytest
import torch
from helpers.nni_experiments import environment, free_port, nnictl, until_done
from helpers.paths import DIGITS, ROOT
from torch.utils.data import DataLoader

from nni_haloc import compress_model
from nni_haloc.chain.groups import rank_layers
from nni_haloc.costs.counts import count_params
from nni_haloc.inputs.data import digits
from nni_haloc.inputs.models import build_model
from nni_haloc.inputs.registries import RULES
from nni_haloc.inputs.weights import load_weights

BLOCK = re.compile(r'^```(\w*)(?: title="([^"]+)")?\n(.*?)^```', re.M | re.S)


def blocks(page):
    """The language, file name and text of each block of code."""
    return [match.groups() for match in BLOCK.finditer((ROOT / page).read_text())]


def test_the_readmes_python_runs_on_a_network_and_loaders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, data = build_model("digits_cnn"), digits()
    load_weights(model, DIGITS.with_name("digits.safetensors"))
    val_loader = data.loader("val", 64)
    names = {"model": model, "train_loader": data.loader("train", 64), "val_loader": val_loader}
    names = run_python("README.md", **names)
    assert names["network"](next(iter(val_loader))[0]).shape[1] == 10


def run_python(page, **names):
    """Run the blocks of Python of a page, one after another, and return all names."""
    programs = [text for language, _, text in blocks(page) if language == "python"]
    assert programs
    for text in programs:
        exec(compile(text, page, "exec"), names)
    return names


def test_the_page_on_other_tasks_runs_as_it_stands(capsys):
    torch.manual_seed(0)
    names = run_python("docs/how-to/other-tasks.md")
    costs = names["result"].metrics
    assert costs["compressed"]["macs"] <= 0.5 * costs["original"]["macs"]
    assert 0 < names["moved"] < names["model"](names["images"]).std()
    outputs = names["small_detector"](names["images"])
    assert [*outputs["boxes"].shape] == [64, 4, 8, 8]
    assert [*names["small_detector"].body[2].factor_in.weight.shape] == [16, 64, 1, 1]


def test_the_page_without_labels_runs_on_a_network_and_images(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model, data = build_model("digits_cnn").eval(), digits()
    load_weights(model, DIGITS.with_name("digits.safetensors"))
    images = next(iter(data.loader("train", 128)))[0]
    others = next(iter(data.loader("val", 128)))[0]
    loaders = {
        "images_loader": DataLoader(images, 64),
        "other_images_loader": DataLoader(others, 64),
    }
    names = run_python("docs/how-to/no-labels.md", model=model, **loaders)
    assert names["same"] > 0.8
    assert "of the images" in capsys.readouterr().out


@pytest.fixture
def home(tmp_path):
    yield tmp_path
    nnictl(tmp_path, "stop", "--all", check=False)


def test_the_tutorial_runs_from_beginning_to_end(home):
    folder = home / "work"
    folder.mkdir()
    port, number, lines = free_port(), None, 0
    changed = environment(home) | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])}
    for language, name, text in blocks("docs/tutorial.md"):
        if name:
            (folder / name).write_text(text)
        if language != "console":
            continue
        for line in text.splitlines():
            if line.startswith("pip "):
                continue
            line = line.replace("ID", number or "ID")
            creates = line.startswith("nnictl create")
            if creates:  # the same with patience: nnictl gives a busy machine three seconds
                line = f"haloc create haloc.yml --port {port}"
            done = subprocess.run(
                ["bash", "-c", line], cwd=folder, env=changed, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
            lines += 1
            if creates:
                number = re.search(r"experiment (\w+):", done.stdout)[1]
                until_done(port)
    assert lines >= 10
    assert {file.name for file in folder.iterdir()} >= {"first", "front.png"}
    assert (folder / "first" / "export" / "model.onnx").is_file()


def test_the_rule_of_the_page_on_extending_keeps_the_budget(monkeypatch):
    (text,) = [text for _, _, text in blocks("docs/how-to/extend.md") if "high-ranks" in text]
    monkeypatch.setattr(RULES, "_added", dict(RULES._added))
    exec(compile(text, "extend.md", "exec"), {})
    data, model = digits(), build_model("digits_cnn")
    loaders = data.loader("train", 64), data.loader("val", 64)
    result = compress_model(model, *loaders, budget=0.3, metric="macs", epochs=0, rule="high-ranks")
    assert 0.28 < result.plan.chosen_by["cost"] / result.plan.chosen_by["original_cost"] <= 0.3


def test_the_page_on_nni_uses_nnis_own_classes_on_a_compressed_network():
    data, model = digits(), build_model("digits_cnn")
    load_weights(model, DIGITS.with_name("digits.safetensors"))
    loaders = data.loader("train", 64), data.loader("val", 64)
    result = compress_model(model, *loaders, budget=0.5, metric="macs", epochs=0)
    batches, example = list(loaders[0])[:4], data.images("val", 8)
    names = {"network": result.model, "example": example, "batches": batches}
    programs = [t for language, _, t in blocks("docs/explanation/nni.md") if language == "python"]
    assert len(programs) == 3
    sizes, ranks = [count_params(result.model)], rank_layers(result.model)
    kept = {name: result.model.get_submodule(name).out_channels for name in ranks}
    for text in programs:
        exec(compile(text, "nni.md", "exec"), names)
        sizes.append(count_params(names["network"]))
        network = names["network"]
        assert {name: network.get_submodule(name).out_channels for name in ranks} == kept
    assert sizes[0] > sizes[1] > sizes[2]
    assert names["scales"].keys() >= ranks
    with torch.no_grad():
        rounded = names["network"](example)
        names["quantizer"].unwrap_model()
        assert 0 < (rounded - names["network"](example)).abs().max() < 0.1 * rounded.abs().max()
