"""Networks and data shared by the tests: small, random, seeded."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.set_num_threads(1)  # the networks here are too small to share out


class SmallNet(nn.Module):
    """Two searchable 3x3 convolutions, a searchable 1x1 one, BatchNorm, in-place activations, a shortcut and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Sequential(nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(inplace=True))
        self.point = nn.Conv2d(12, 12, 1)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = self.body(x)
        return self.head((x + self.act(self.point(x))).mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = SmallNet()
    with torch.no_grad():
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 2)
    return model


@pytest.fixture
def images():
    return torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def labels():
    return torch.randint(0, 4, (64,), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def loaders(images, labels):
    data = TensorDataset(images, labels)
    return tuple(DataLoader(data, 16, shuffle=True, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4))


@pytest.fixture(scope="session")
def experiment(tmp_path_factory):
    """Port, id and home of a real NNI experiment of two trials, DONE."""
    from nni_experiments import digits_experiment

    home = tmp_path_factory.mktemp("home")
    with digits_experiment(home, [0.5, 0.3]) as (port, number):
        yield port, number, home
