"""Training of a network that is not there yet, and how much is left to do."""

import shutil
from datetime import timedelta

import pytest
import torch
from helpers.commands import haloc
from helpers.paths import DIGITS

from nni_haloc.inputs.models import build_model
from nni_haloc.inputs.weights import load_weights
from nni_haloc.training.finetuning import Forecast, finetune
from nni_haloc.training.recipe import Recipe
from nni_haloc.utils.progress import TimeLeft


@pytest.fixture
def run_file(tmp_path):
    return shutil.copy(DIGITS, tmp_path / "run.yml")


def test_a_network_is_trained_and_then_compressed(run_file, tmp_path):
    refused = haloc("run", run_file, "--out", tmp_path / "out")
    assert (refused.returncode, "weights: no such file" in refused.stderr) == (2, True)
    trained = haloc("train", run_file, "--set", "train.epochs=12", "--set", "train.lr=0.1")
    assert trained.returncode == 0, trained.stderr
    assert "training: 12 epochs of 17 iterations, 204 in all" in trained.stderr
    assert "training: about 0:" in trained.stderr
    weights = run_file.parent / "digits.safetensors"
    load_weights(build_model("digits_cnn"), weights)
    top1 = float(trained.stderr.split("top1 ")[1].split(" %")[0])
    assert top1 > 85
    again = haloc("train", run_file)
    assert again.returncode == 2
    line = f"haloc: weights: {weights} already exists; delete it or name another file"
    assert again.stderr.splitlines()[-1] == line
    ran = haloc("run", run_file, "--out", tmp_path / "out", "--scale", "0.01")
    assert ran.returncode == 0, ran.stderr
    for what in ("search", "fine-tuning"):  # a tenth of the images and of ten epochs
        assert f"{what}: 1 epoch of 1 iteration, 1 in all" in ran.stderr


def test_a_network_is_not_written_as_something_else(run_file):
    done = haloc("train", run_file, "--set", "weights=digits.pth")
    assert done.returncode == 2
    assert "weights: expected the name of a .safetensors file" in done.stderr


@pytest.mark.parametrize("epochs", [1, 10])
def test_what_is_left_is_told_from_the_first_iteration_on(loaders, monkeypatch, epochs):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("nni_haloc.utils.progress.time.monotonic", lambda: next(clock))
    of = epochs * len(loaders[0])
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4))
    told = []
    monkeypatch.setattr(
        "nni_haloc.utils.log.logger.info", lambda text, *args: told.append(text % args)
    )
    finetune(model, loaders[0], Recipe(epochs=epochs), callbacks=[Forecast("training")])
    seconds = [10 * (of - 1)]  # a clock that is asked twice goes on by ten
    if epochs > 1:
        done = min(TimeLeft.LAST, of // 2)
        seconds.append(10 * (of - done) / (done - TimeLeft.FIRST))
    lines = [f"training: about {timedelta(seconds=round(s))} to go" for s in seconds]
    number = "1 epoch" if epochs == 1 else f"{epochs} epochs"
    size = len(loaders[0])
    assert told == [f"training: {number} of {size} iterations, {of} in all", *lines]


def test_a_training_that_diverged_leaves_no_weights(run_file):
    done = haloc(
        "train",
        run_file,
        "--set",
        "train.epochs=2",
        "--set",
        "train.lr=1000000",
        "--set",
        "train.schedule=constant",
    )
    assert done.returncode == 2
    assert "train: the training diverged" in done.stderr.splitlines()[-1]
    assert not (run_file.parent / "digits.safetensors").exists()
