"""What all tests share: small random networks and data, processes, two workers."""

import os
import sys

for library in ("OMP", "OPENBLAS", "MKL"):
    # The matrices here are too small to share out: threads that wait for each other on a busy
    # machine took thirty times as long. Set before a library is loaded, and for subprocesses.
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")
# Trials are started by `python3`, which has to be this one's.
os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])

import pytest
import torch
from helpers.commands import Commands, end_server
from helpers.networks import SmallNet
from helpers.workers import number_of_workers, place_of
from torch.utils.data import DataLoader, TensorDataset

from nni_haloc.utils.placement import working_on

torch.set_num_threads(1)


def pytest_addoption(parser, pluginmanager):
    if not pluginmanager.hasplugin("xdist"):
        parser.addoption("--numprocesses", help="an option of pytest-xdist, without effect")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    return number_of_workers(config.args)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from helpers.scheduler import Groups

    return Groups(config, log)


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a CUDA device; skipped without one")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: place_of(item.nodeid))
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    """Run the test's work on the processor, and again on a CUDA device, where there is one."""
    with working_on(request.param):
        yield torch.device(request.param)


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
    return tuple(
        DataLoader(data, 16, shuffle=True, generator=torch.Generator().manual_seed(seed))
        for seed in (3, 4)
    )


@pytest.fixture(scope="session")
def experiment(tmp_path_factory):
    """Port, id and home of a real NNI experiment of two trials, DONE."""
    from helpers.nni_experiments import digits_experiment

    home = tmp_path_factory.mktemp("home")
    with digits_experiment(home, [0.5, 0.3]) as (port, number):
        yield port, number, home


@pytest.fixture(scope="session")
def commands(tmp_path_factory):
    return Commands(tmp_path_factory.mktemp("output") / "output.txt")


@pytest.fixture(scope="session", autouse=True)
def _servers_end():
    yield
    end_server()
