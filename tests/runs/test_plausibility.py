"""An original that guesses, and a compressed network far above its original, are told."""

import json
import logging

import pytest
import torch
from helpers.pages import Page
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nni_haloc import compress_model
from nni_haloc.inputs.config import load_config
from nni_haloc.inputs.registries import MODELS
from nni_haloc.inputs.schema.data import Data
from nni_haloc.results.html_report import html_report
from nni_haloc.runs.plausibility import doubt_figures, doubts, guessing
from nni_haloc.runs.run import flatten, log_normalisation, run, search_only
from nni_haloc.runs.stages.pretrain import train_original
from nni_haloc.runs.stages.training import _warn_of_loss

AT_CHANCE, FAR_ABOVE = "original_at_chance", "far_above_original"


def stages(original, compressed=None, images=1000, classes=10, **others):
    found = {"original": {"top1": original, "images": images, "chance": 1 / classes}}
    if compressed is not None:
        found["finetune"] = {"top1": compressed}
    return found | {name: {"top1": top1} for name, top1 in others.items()}


@pytest.mark.parametrize(
    ("original", "images", "classes", "doubted"),
    [
        (0.0, 1000, 10, True),
        (0.10, 1000, 10, True),
        (0.118, 1000, 10, True),  # a standard error is 0.0095
        (0.12, 1000, 10, False),
        (0.12, 100, 10, True),
        (0.9, 1000, 10, False),
        (0.5, 10_000, 2, True),
        (0.52, 10_000, 2, False),
        (0.002, 50_000, 1000, False),
        (0.001, 50_000, 1000, True),
        (1.0, 2, 2, True),  # two images say nothing
        (1.0, 100, 1, True),  # nor does a single class
        (0.8, 100, 3, False),
    ],
)
def test_an_original_that_is_not_above_chance_is_doubted(original, images, classes, doubted):
    found = stages(original, images=images, classes=classes)
    assert list(doubts(found)) == [AT_CHANCE] * doubted
    assert doubt_figures(found) == {AT_CHANCE: float(doubted), FAR_ABOVE: 0.0}


@given(st.integers(30, 3000), st.sampled_from([2, 3, 5, 10]), st.integers(0, 2**32 - 1))
def test_a_network_that_guesses_is_nearly_always_doubted(images, classes, seed):
    """The threshold is about the 97.7th percentile of the exact distribution of guesses."""
    least = next(
        right
        for right in range(images + 1)
        if not doubts(stages(right / images, images=images, classes=classes))
    )
    assert binom.sf(least - 1, images, 1 / classes) < 0.06
    assert least > images / classes


@pytest.mark.parametrize(
    ("original", "compressed", "images", "doubted"),
    [
        (0.90, 0.96, 10_000, True),
        (0.90, 0.94, 10_000, False),
        (0.90, 0.96, 100, False),  # a standard error of the difference is 0.036
        (0.30, 0.60, 100, True),
        (0.95, 0.90, 10_000, False),
        (0.60, 0.60, 10_000, False),
    ],
)
def test_a_network_far_above_its_original_is_doubted(original, compressed, images, doubted):
    found = stages(original, compressed, images)
    assert list(doubts(found)) == [FAR_ABOVE] * doubted
    assert doubt_figures(found) == {AT_CHANCE: 0.0, FAR_ABOVE: float(doubted)}
    later = stages(original, original, images, prune=compressed)
    assert list(doubts(later)) == [FAR_ABOVE] * doubted


@pytest.mark.parametrize(
    ("original", "compressed", "images", "classes", "doubted"),
    [
        (1.0, 0.3667, 250, 5, True),
        (1.0, 0.61, 250, 5, False),  # less than half of the way from 1 to 0.2
        (1.0, 0.59, 250, 5, True),
        (0.9, 0.1, 10_000, 10, True),
        (0.9, 0.4, 8, 10, False),  # three standard errors of the difference are 0.61
        (0.1, 0.1, 10_000, 10, False),
    ],
)
def test_a_network_that_has_lost_most_is_told(original, compressed, images, classes, doubted):
    found = doubts(stages(original, compressed, images, classes))
    assert ("far_below_original" in found) == doubted


def test_the_line_of_what_is_lost_has_the_numbers():
    assert doubts(stages(1.0, 0.3667, 250, 5))["far_below_original"] == (
        "finetune: top-1 is 63.33 points below the original's 100.00 %, more than half of the way "
        "to chance, 20.00 %; raise the budget, or train for more epochs"
    )


def test_the_lines_say_how_much():
    found = doubts(stages(0.1, 0.8, 5000, prune=0.9, quantize=0.7))
    assert found[AT_CHANCE].startswith(
        "the original's top-1, 10.00 % of 5000 images, is not above chance, 10.00 %; check"
    )
    assert found[FAR_ABOVE].startswith(
        "prune: top-1 is 80.00 points above the original's 10.00 %; check"
    )


@pytest.mark.parametrize(
    "found",
    [
        {},
        {"original": {}},
        {"original": {"top1": 0.0}},  # an earlier version's
        {"original": {"top1": 0.0, "images": 0, "chance": 0.5}},
        {"original": {"macs": 1.0}, "finetune": {"top1": 0.9}},
    ],
)
def test_what_was_not_measured_is_not_doubted(found):
    assert doubts(found) == {}


def test_chance_is_that_among_the_classes_that_are_there():
    assert guessing(torch.tensor([1, 3, 3, 5])) == {"images": 4, "chance": pytest.approx(1 / 3)}
    positions = torch.tensor([[1, -100], [3, 3], [-100, -100], [5, 1]])
    assert guessing(positions) == {"images": 3, "chance": pytest.approx(1 / 3)}
    assert guessing(torch.full((2, 2), -100)) == {"images": 0, "chance": 1.0}
    assert guessing(torch.empty(0, dtype=torch.long)) == {"images": 0, "chance": 1.0}


def test_nni_gets_the_doubts_as_numbers():
    flat = flatten(stages(0.1, 0.9))
    assert (flat[AT_CHANCE], flat[FAR_ABOVE]) == (1.0, 1.0)
    assert (flat["original_images"], flat["original_chance"]) == (1000, 0.1)
    assert not {AT_CHANCE, FAR_ABOVE} & flatten({"original": {"top1": 0.1}}).keys()


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Settings of a network that was never trained."""

    def small():
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))

    monkeypatch.setitem(MODELS._added, "small", small)
    torch.save(small().state_dict(), tmp_path / "w.pt")
    (tmp_path / "run.yml").write_text(
        "{model: {name: small}, weights: w.pt, budget: 0.7, data: {name: digits, share: 0.2},"
        " rank_space: {calibration_images: 8, step: 8}, search: {epochs: 0.1}, rule: uniform,"
        " finetune: {epochs: 0}, recalibration_batches: 1, train: {epochs: 1, lr: 1.0e-9}}"
    )
    return tmp_path / "run.yml"


def test_a_run_tells_it_in_log_figures_and_report(settings, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "nni_haloc"):
        flat = run(load_config(settings), tmp_path / "out")
    lines = [line for line in caplog.messages if "is not above chance" in line]
    assert len(lines) == 1
    assert f"of {flat['original_images']:.0f} images" in lines[0]
    assert flat[AT_CHANCE] == 1.0
    assert flat["original_images"] == 29  # a fifth of the validation images
    assert f"{lines[0]}." in Page(html_report(tmp_path / "out")).texts
    content = json.loads((tmp_path / "out" / "metrics.json").read_text())
    content["stages"]["original"]["top1"] = content["stages"]["finetune"]["top1"] = 0.9
    (tmp_path / "out" / "metrics.json").write_text(json.dumps(content))
    assert "Doubtful" not in html_report(tmp_path / "out")


def test_a_search_and_a_training_tell_it_too(settings, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "nni_haloc"):
        search_only(load_config(settings, {"rule": "search"}), tmp_path / "out")
        changes = {"weights": str(tmp_path / "new.safetensors")}
        train_original(load_config(settings, changes, training=True))
    assert sum("is not above chance" in line for line in caplog.messages) == 2


@pytest.mark.parametrize("shifted", [True, False])
def test_compress_model_tells_it_too(caplog, shifted):
    """Labels in another order than the outputs; training then learns the new order."""
    torch.manual_seed(0)
    labels = torch.arange(256) % 4
    images = torch.randn(256, 3, 8, 8) * 0.1
    images[torch.arange(256), labels % 3] += 1 + (labels > 2).float()[:, None, None]
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(60):
        loss = nn.functional.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    data = TensorDataset(images, (labels + shifted) % 4)
    train, val = DataLoader(data, 32, shuffle=True), DataLoader(data, 64)
    options = {"budget": 0.8, "metric": "macs", "epochs": 6, "rule": "uniform"}
    with caplog.at_level(logging.WARNING, "nni_haloc"):
        result = compress_model(net, train, val, **options)
    told = [
        key
        for key, words in ((AT_CHANCE, "not above chance"), (FAR_ABOVE, "points above"))
        if any(words in line for line in caplog.messages)
    ]
    assert told == [AT_CHANCE, FAR_ABOVE] * shifted
    original = result.metrics["original"]
    assert original["top1"] == pytest.approx(1 - shifted, abs=0.1)
    assert (original["images"], original["chance"]) == (256, 0.25)
    report = {name: dict(row) for name, row in result.metrics.items()}
    report["finetune"] = report.pop("compressed")
    assert list(doubts(report)) == told


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, ["images normalised by ImageNet's mean and std (data.mean, data.std)"]),
        ({"mean": [0.5, 0.5, 0.5]}, ["images normalised by ImageNet's std (data.std)"]),
        ({"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}, []),
    ],
)
def test_a_normalisation_that_is_assumed_is_logged(tmp_path, caplog, given, told):
    data = Data.model_construct(name="folder", **{"mean": None, "std": None, **given})
    with caplog.at_level("INFO", "nni_haloc"):
        log_normalisation(data)
        log_normalisation(data.model_copy(update={"name": "cifar10"}))
    assert caplog.messages == told


@pytest.mark.parametrize(
    ("curve", "told"),
    [
        ([0.875, 0.7708], True),
        ([0.875, 0.8333], False),  # two images of 48 are chance
        ([0.875, 0.7, 0.87], False),
        ([0.875], False),
    ],
)
def test_a_training_that_costs_accuracy_is_warned_of(curve, told, caplog):
    _warn_of_loss("fine-tuning", "finetune", curve, 48)
    line = (
        "fine-tuning: top-1 fell from 87.50 to 77.08 % (48 validation images, standard error of "
        "the difference 7.7 points); set finetune.lr lower or finetune.epochs higher"
    )
    assert caplog.messages == [line] * told
