"""Logits with a place for each pixel: trained, distilled and measured as means over the places."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nni_haloc.training.finetuning import TEMPERATURE, _Training, accuracy, finetune
from nni_haloc.training.recipe import Recipe

SIZES = {"images": (), "sequences": (5,), "pixels": (4, 6), "voxels": (2, 3, 4)}
QUIET = {"enable_progress_bar": False}


class Dense(nn.Module):
    """One linear map of channels at each position."""

    def __init__(self, classes=3):
        super().__init__()
        self.mix = nn.Linear(2, classes, dtype=torch.float64)

    def forward(self, x):
        return {"out": self.mix(x.movedim(1, -1)).movedim(-1, 1), "aux": x}


def log_softmax(z):
    return z - np.log(np.exp(z).sum(1, keepdims=True))


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("distill", [0.0, 0.3, 1.0])
def test_the_loss_is_the_closed_form(size, distill):
    torch.manual_seed(0)
    student, teacher = Dense(), Dense()
    x = torch.randn(4, 2, *size, dtype=torch.float64)
    y = torch.randint(0, 3, (4, *size))
    task = _Training(student, Recipe(1), 1, teacher, distill, (), 0.0)
    found = task._taught(x, y, task.teacher[0])
    z, t = (net(x)["out"].detach().numpy() for net in (student, teacher))
    ce = -np.take_along_axis(log_softmax(z), y.numpy()[:, None], 1).mean()
    log_p, log_q = log_softmax(t / TEMPERATURE), log_softmax(z / TEMPERATURE)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(1).mean()
    expected = (1 - distill) * ce + distill * TEMPERATURE**2 * kl
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-9)


def segmentation(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)
    )
    return net


@pytest.fixture
def pixels():
    images = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(images, (images[:, 0] > 0).long() + 1), 8)


def test_a_network_is_not_destroyed_by_being_distilled_from_itself(pixels):
    net = segmentation()
    finetune(net, pixels, Recipe(6, 0.1, schedule="constant"), pixels, **QUIET)
    before = accuracy(net, pixels)[0]
    student = copy.deepcopy(net)
    finetune(student, pixels, Recipe(1, 0.1), pixels, teacher=net, distill=0.5, **QUIET)
    assert accuracy(student, pixels)[0] > before - 0.02
    assert before > 0.9


def test_accuracy_is_the_share_of_places(pixels):
    net = segmentation().eval()
    for k in (1, 2):
        with torch.no_grad():
            top = torch.cat([net(x) for x, _ in pixels]).topk(k, 1).indices
        labels = torch.cat([y for _, y in pixels])
        expected = (top == labels[:, None]).any(1).double().mean()
        assert accuracy(net, pixels, (k,))[0] == pytest.approx(float(expected), abs=1e-6)
