"""Passes as captured graphs or compiled programs give what ordinary passes give."""

import copy
import shutil

import pytest
import torch
from helpers.host_copies import no_waits_on
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nni_haloc.inputs.schema.chain import Quantize
from nni_haloc.inputs.schema.training import Finetune
from nni_haloc.training import compiled, finetuning
from nni_haloc.training.compiled import Compiled, Replayed
from nni_haloc.training.finetuning import accuracy, finetune, recalibrate
from nni_haloc.training.recipe import Recipe
from nni_haloc.utils.errors import HalocError

COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
QUIET = {"enable_progress_bar": False}


def near(network, other, tolerance=1e-4):
    for (name, a), b in zip(network.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(
            a, b, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@COMPILER
def test_a_compiled_training_is_the_same(net, images, labels, device):
    loader = DataLoader(TensorDataset(images, labels), 16)
    plain, fast = copy.deepcopy(net), copy.deepcopy(net)
    for network, compile in ((plain, False), (fast, True)):
        finetune(network, loader, Recipe(1, 0.01), loader, compile=compile, **QUIET)
    near(plain, fast)
    assert type(fast) is type(net)
    assert fast.state_dict().keys() == net.state_dict().keys()


@COMPILER
def test_outputs_gradients_and_statistics_are_the_same(net, images, device):
    """Making the graph itself changes neither BatchNorm's statistics nor the random state."""
    plain, x = net.to(device), images[:16].to(device)
    fast = copy.deepcopy(plain)
    run = Compiled(fast)
    for _ in range(3):
        torch.manual_seed(0)
        y, expected = run(x), plain(x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        for network, out in ((plain, expected), (fast, y)):
            network.zero_grad()
            out.square().sum().backward()
        for a, b in zip(plain.parameters(), fast.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)
        near(plain, fast)


def test_other_shapes_and_evaluation_run_as_ever(net, images, monkeypatch):
    made, ran = [], []

    def compile(network, inputs):
        made.append(inputs[0].shape)
        return lambda x: ran.append(x.shape) or network(x)

    monkeypatch.setattr(compiled, "_compiled", compile)
    run = Compiled(net.eval())
    run(images)
    assert not made
    net.train()
    for number in (16, 16, 7, 16):
        assert run(images[:number]).shape == (number, 4)
    net.eval()
    run(images[:16])
    assert [len(shape) for shape in made] == [4]
    assert [shape[0] for shape in ran] == [16, 16, 16]


def test_a_network_that_cannot_be_compiled_is_one_line(net, loaders, monkeypatch):
    def refuse(network, inputs):
        raise RuntimeError("no such kernel\nand a long report")

    monkeypatch.setattr(compiled, "_compiled", refuse)
    monkeypatch.setattr(compiled, "_captured", refuse)
    expected = (
        r"^compile: the network can't be compiled here \(no such kernel\); set compile: false$"
    )
    with pytest.raises(HalocError, match=expected):
        finetune(net, loaders[0], Recipe(1, 0.01), compile=True, **QUIET)


def test_a_pass_without_gradients_is_replayed(net, images, device):
    net, x = net.to(device).eval(), images.to(device)
    run = Replayed(net, net.buffers())
    with torch.no_grad():
        for part in (x[:16], x[16:32], x[32:39]):
            torch.testing.assert_close(run(part).clone(), net(part), rtol=1e-4, atol=1e-5)


def test_recalibration_is_the_same(net, images, labels, device):
    loader = DataLoader(TensorDataset(images, labels), 16)
    fast = copy.deepcopy(net)
    recalibrate(net, loader, 3)
    recalibrate(fast, loader, 3, compile=True)
    near(net, fast)


def test_no_iteration_of_a_training_waits_for_the_device(net, images, labels, device, monkeypatch):
    step, seen = finetuning._Training.training_step, []

    def watched(module, batch, batch_idx):
        seen.append(batch_idx)
        if len(seen) < 3 or module.trainer.is_last_batch:
            return step(module, batch, batch_idx)
        with no_waits_on(device):
            return step(module, batch, batch_idx)

    monkeypatch.setattr(finetuning._Training, "training_step", watched)
    loader = DataLoader(TensorDataset(images, labels), 2)
    finetune(net, loader, Recipe(1, 0.01), **QUIET)
    assert len(seen) == 32  # the losses have been looked at on the way


def test_accuracy_waits_once(net, images, labels, monkeypatch):
    class Slow(nn.Module):
        def forward(self, x):
            return net(x)

    waits = []
    for name in ("__float__", "item", "cpu", "tolist"):
        whole = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *a, f=whole, n=name: waits.append(n) or f(self, *a)
        )
    accuracy(Slow(), DataLoader(TensorDataset(images, labels), 4))
    several = len(waits)
    waits.clear()
    accuracy(Slow(), DataLoader(TensorDataset(images, labels), 32))
    assert several == len(waits)


@pytest.mark.parametrize(
    ("section", "settings", "message"),
    [
        (Finetune, {"distill_features": 1.0}, "compile: expected false with distill_features"),
        (Quantize, {}, "compile: expected false, because NNI's quantizers"),
    ],
)
def test_what_looks_into_the_network_is_not_compiled(section, settings, message):
    with pytest.raises(ValueError, match=message):
        section(compile=True, **settings)


def test_features_of_a_compiled_network_are_refused(net, loaders):
    with pytest.raises(ValueError, match="^compile: not together with feature_weight"):
        finetune(
            net,
            loaders[0],
            Recipe(1),
            teacher=net,
            layers=["stem"],
            feature_weight=1.0,
            compile=True,
        )
