"""A whole run, and one call, work on the device: on a processor the same code, on CUDA there."""

import pytest
import torch
from helpers.networks import SmallNet
from helpers.paths import DIGITS
from helpers.short_runs import SETTINGS
from torch.utils.data import DataLoader, TensorDataset

from nni_haloc import compress_model, finetune, load
from nni_haloc.inputs.config import load_config
from nni_haloc.inputs.tensor_images import TensorImages
from nni_haloc.plan import sensitivity
from nni_haloc.runs.job import Job
from nni_haloc.runs.run import run
from nni_haloc.space import candidates
from nni_haloc.training import compiled
from nni_haloc.training.recipe import Recipe
from nni_haloc.utils.errors import SettingsError
from nni_haloc.utils.placement import working_device


@pytest.fixture
def uncompiled(monkeypatch, device):
    if device.type == "cpu":  # making programs takes long, and is tested where it is written
        monkeypatch.setattr(compiled, "_compiled", lambda network, inputs: network)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("compile", [False, True])
def test_a_run_works_on_the_device(tmp_path, device, uncompiled, monkeypatch, compile, precision):
    """Covariances, sensitivities, batches; and the result is loaded without the device."""
    where = {}

    def watched(module, name, of):
        whole = getattr(module, name)

        def call(*arguments, **options):
            result = whole(*arguments, **options)
            where.setdefault(name, set()).add(of(result).device.type)
            return result

        monkeypatch.setattr(module, name, call)

    watched(candidates, "channel_moments", lambda result: next(iter(result.values()))[0])
    watched(sensitivity, "losses_of", lambda result: result)
    watched(TensorImages, "__getitems__", lambda result: result[0])
    changes = {**SETTINGS, "search.epochs": 1, "finetune.epochs": 1, "data.in_memory": "device"}
    changes |= {f"{part}.compile": compile for part in ("search", "finetune")}
    changes |= {f"{part}.precision": precision for part in ("search", "finetune")}
    changes["trainer.accelerator"] = "gpu" if device.type == "cuda" else "cpu"
    figures = run(load_config(DIGITS, changes), tmp_path)
    kind = device.type
    assert where["channel_moments"] == where["losses_of"] == {kind}
    assert kind in where["__getitems__"]  # the processor's are examples and calibration images
    assert figures["macs"] <= 0.5 * figures["original_macs"]
    assert all(p.device.type == "cpu" for p in load(tmp_path).parameters())


@pytest.mark.parametrize("epochs", [0, 1])
def test_a_network_on_the_device_is_compressed_there_and_comes_home(
    net, images, labels, device, epochs
):
    loader = DataLoader(TensorDataset(images, labels), 16)
    net = net.to(device)
    result = compress_model(net, loader, loader, budget=0.6, metric="macs", epochs=epochs)
    assert {p.device.type for p in result.model.parameters()} == {device.type}
    assert {p.device.type for p in net.parameters()} == {device.type}
    assert set(result.metrics["compressed"]) == {"top1", "macs", "params", "latency_ms"}


def test_fine_tuning_gives_a_network_back_where_it_was(images, labels, device):
    net = SmallNet().to(device)
    loader = DataLoader(TensorDataset(images, labels), 16)
    finetune(net, loader, Recipe(1, 0.01), loader, enable_progress_bar=False)
    assert {value.device.type for value in net.state_dict().values()} == {device.type}


@pytest.mark.parametrize("accelerator", ["cpu", "auto"])
def test_the_settings_accelerator_is_where_all_work_happens(tmp_path, accelerator):
    job = Job(load_config(DIGITS, {**SETTINGS, "trainer.accelerator": accelerator}), tmp_path)
    outside = working_device()
    with job.active():
        there = accelerator == "auto" and torch.cuda.is_available()
        assert working_device().type == ("cuda" if there else "cpu")
    assert working_device() == outside


def test_a_compiled_search_in_several_processes_is_refused_before_anything_is_paid_for(tmp_path):
    changes = {**SETTINGS, "search.compile": True, "trainer.devices": 2}
    with pytest.raises(SettingsError, match="^search.compile: expected false with several"):
        Job(load_config(DIGITS, changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()
