"""An iteration of the search never makes the processor wait for its device."""

from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from helpers.host_copies import no_waits_on, waits
from helpers.searches import search

from nni_haloc.costs.analytic import param_table
from nni_haloc.plan.budget import Limit
from nni_haloc.search.history import History
from nni_haloc.search.updates import HalocModule
from nni_haloc.training import compiled
from nni_haloc.utils.placement import HostCopy, Mirror


class Watched(pl.Callback):
    """Fail where an iteration of the search waits, from the third one on.

    In the first ones the original network is seen to write over its outputs.
    """

    def __init__(self, monkeypatch, device):
        step, seen = HalocModule.training_step, self

        def watched(module, batch, batch_idx):
            seen.iterations += 1
            if seen.iterations < 3 or module.trainer.is_last_batch:
                return step(module, batch, batch_idx)
            seen.watched += 1
            with no_waits_on(device):
                return step(module, batch, batch_idx)

        self.iterations = self.watched = 0
        monkeypatch.setattr(HalocModule, "training_step", watched)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alpha_every": 2, "approach_share": 0.25},
        {"lam": 0.0},
        {"approach": "weights"},
        {"objective": "paper"},
        {"precision": "bf16-mixed"},
        {"compile": True},
        {"nested": True, "average": 0.99, "budget_range": [0.4, 0.8]},
        {"nested": True, "average": 0.99, "compile": True},
    ],
)
def test_no_iteration_waits_for_the_device(net, images, loaders, monkeypatch, device, options):
    if device.type == "cpu":
        monkeypatch.setattr(compiled, "_compiled", lambda network, inputs: network)
    watched = Watched(monkeypatch, device)
    strategy = search(net, images, loaders, epochs=3, **options)
    assert watched.watched == 12 - 2 - 3  # without the first two, and each epoch's last
    assert strategy.plan().chosen_by["cost"] <= strategy.budget or options.get("objective")


def test_alphas_step_is_one_copy(net, images, loaders, monkeypatch, device):
    copies = []
    make = HostCopy.__init__
    monkeypatch.setattr(
        HostCopy, "__init__", lambda self, value: copies.append(len(value)) or make(self, value)
    )
    strategy = search(net, images, loaders, alpha_every=1)
    numbers = sum(len(layer.names) for layer in strategy.mixed_layers.values())
    assert copies.count(1 + 2 * numbers) == len(loaders[0])


def test_a_row_of_history_waits_for_nothing(net, images, loaders, tmp_path, device):
    costs = param_table(net, images[:1])
    strategy = SimpleNamespace()
    history = History(tmp_path / "history.csv", tmp_path / "search.json", strategy, costs)

    class Watched(pl.Callback):
        def on_train_batch_end(self, trainer, module, *arguments):
            state = module.state
            vars(strategy).update(vars(state), state=state, costs=costs, scores=state.scores)
            strategy.probabilities = state.probabilities
            with no_waits_on(device):
                history.on_train_batch_end(trainer, module, *arguments)

        def on_train_epoch_end(self, trainer, module):
            history.on_train_epoch_end(trainer, module)

    search(net, images, loaders, callbacks=[Watched()], limits=[Limit(costs, 0.6 * costs.original)])
    assert len((tmp_path / "history.csv").read_text().splitlines()) == 1 + len(loaders[0])


def test_a_mirror_reads_a_tensor_again_only_after_somebody_else_has_changed_it(device):
    tensor, mirror = torch.arange(3.0, device=device), Mirror()
    assert mirror.of(tensor).tolist() == [0, 1, 2]
    mirror.put(tensor, mirror.of(tensor) + 0.1)
    with waits() as found:
        values = mirror.of(tensor)
    assert not found
    assert values.tolist() == tensor.tolist()  # rounded to float32
    tensor += 1
    assert mirror.of(tensor).tolist() == tensor.tolist()


def test_a_watch_on_waits_sees_them():
    """The check of this file can fail."""
    tensor = torch.ones(3)
    for wait in (
        lambda: float(tensor[0]),
        lambda: bool((tensor > 0).all()),
        lambda: tensor.cpu(),
        lambda: tensor.tolist(),
        lambda: tensor[tensor > 0],
        lambda: torch.equal(tensor, tensor),
        lambda: tensor.numpy(),
        lambda: f"{tensor[0]:.3f}",
    ):
        with waits() as found:
            wait()
        assert found
    with waits() as found:
        torch.where(tensor > 0, tensor, 0).sum().add_(1)
    assert not found
