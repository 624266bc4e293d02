"""The search with nested candidates: exact gates for every pair of ranks, and the whole of it."""

import copy
import math
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from helpers.searches import search
from nni.nas.nn.pytorch import LayerChoice
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nni_haloc.costs.analytic import mac_table
from nni_haloc.costs.counts import count_macs
from nni_haloc.plan.sensitivity import sensitivities
from nni_haloc.search.evaluator import Classification
from nni_haloc.search.gates import contract_nested, gate_gradients
from nni_haloc.search.space import RankSpace
from nni_haloc.search.strategy import Haloc, run_search
from nni_haloc.search.supernet import MixedRankLayer
from nni_haloc.space.candidates import build_nested_candidates
from nni_haloc.space.nested import NestedLayer, leading
from nni_haloc.space.ranks import AllowedRanks, find_layers
from nni_haloc.training.finetuning import finetune
from nni_haloc.training.recipe import Recipe
from nni_haloc.utils.errors import InfeasibleBudget

EVERY = AllowedRanks(step=2, equal=False, kinds=("conv", "pointwise", "linear"))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(6, 8, 3, stride=2, padding=1), (4, 6, 9, 9)),
        (nn.Conv2d(6, 8, 3, padding=2, padding_mode="circular", bias=False), (4, 6, 9, 9)),
        (nn.Conv2d(6, 8, 1), (4, 6, 5, 5)),
        (nn.Linear(6, 8), (4, 3, 6)),
    ],
)
def test_gates_of_every_pair_of_ranks_are_those_of_running_every_candidate(layer, shape):
    torch.manual_seed(0)
    layer, x = layer.double(), torch.randn(*shape, dtype=torch.float64)
    net = nn.Sequential(layer)
    layers = find_layers(net, x, EVERY)
    rows = layers.candidates(EVERY)
    candidates = list(build_nested_candidates(net, layers.specs, rows, x)["0"].values())
    if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
        assert len(candidates) > 8
    grad_y = torch.randn_like(layer(x))
    expected = torch.stack([(candidate(x) * grad_y).sum() for candidate in candidates])
    found = gate_gradients(layers.specs["0"], candidates, x, grad_y)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_one_contraction_gives_every_leading_block():
    torch.manual_seed(0)
    out, core, inn = torch.randn(5, 4), torch.randn(4, 3, 3, 3), torch.randn(3, 6)
    g = torch.randn(5, 6, 3, 3)
    corners = torch.tensor([[r1, r2] for r1 in range(4) for r2 in range(3)])
    found = contract_nested(g, (out, core, inn), corners)
    for (i, j), value in zip(corners.tolist(), found, strict=True):
        kernel = torch.einsum(
            "fr,rsij,sc->fcij", out[:, : i + 1], core[: i + 1, : j + 1], inn[: j + 1]
        )
        torch.testing.assert_close(value, (g * kernel).sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compile_", [False, True])
def test_a_nested_search_over_every_pair_gives_a_plan_and_a_plain_network(
    net, images, loaders, compile_
):
    allowed = AllowedRanks(equal=False)
    costs = mac_table(net, images[:1], allowed)
    space = RankSpace(net, images[:1], costs, allowed, images, nested=True)
    strategy = search(net, images, loaders, space=space, allowed=allowed, compile=compile_)
    plan = strategy.plan()
    assert plan.chosen_by["cost"] <= plan.chosen_by["budget"]
    network = strategy.network(plan)
    assert not any(isinstance(m, LayerChoice | NestedLayer) for m in network.modules())
    assert count_macs(network, images[:1]) == plan.chosen_by["cost"]
    supernet = copy.deepcopy(strategy.state.supernet).eval()
    for layer in supernet.modules():
        if isinstance(layer, MixedRankLayer):
            layer.sampled = layer.names.index(plan.names[layer.label])
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(images), supernet(images), rtol=1e-3, atol=1e-3)


def test_only_the_leading_part_of_the_shared_factors_gets_a_gradient(net, images):
    space = RankSpace(net, images[:1], calibration=images, nested=True)
    for row in space.modules_by_layer.values():
        *low, module = (module for name, module in row.items() if name != "dense")
        module(torch.randn(2, module.shared.spec.in_channels, 8, 8)).square().sum().backward()
        whole = module.shared.factors()
        for value, part in zip(whole, leading(whole, module.rank), strict=True):
            inside = torch.zeros_like(value, dtype=torch.bool)
            inside[tuple(slice(n) for n in part.shape)] = True
            assert value.grad[inside].abs().min() > 0 or not low
            assert not value.grad[~inside].any()


def test_averaged_weights_are_the_moving_average_of_all_steps(net, images, loaders):
    class Trace(pl.Callback):
        def on_fit_start(self, trainer, module):
            self.tensors = dict(module.state.supernet.named_parameters())
            self.averages = {k: v.detach().clone() for k, v in self.tensors.items()}
            self.steps = 0

        def on_train_batch_end(self, *_):
            self.steps += 1
            d = min(0.3, (1 + self.steps) / (10 + self.steps))  # from the third step on 0.3
            for key, value in self.tensors.items():
                self.averages[key] = d * self.averages[key] + (1 - d) * value.detach()

    trace = Trace()
    strategy = search(net, images, loaders, epochs=3, callbacks=[trace], average=0.3)
    for key, value in strategy.state.supernet.named_parameters():
        if "alpha" not in key:
            torch.testing.assert_close(value.detach(), trace.averages[key])


def test_drawn_budgets_range_over_their_range_and_end_at_the_budget(net, images, labels, loaders):
    class Costs(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            self.module = module
            seen.append(module.state.known_cost() / module.state.limits[0].costs.original)

    seen: list[float] = []
    added = sensitivities(net, RankSpace(net, images[:1]).modules_by_layer, images, labels)
    options = {"budget_range": [0.3, 0.8], "start": added}
    costs_seen = Costs()
    strategy = search(net, images, loaders, 0.5, epochs=6, callbacks=[costs_seen], **options)
    drawn = [costs_seen.module._drawn_budget() for _ in range(2000)]
    assert 0.3 <= min(drawn) < max(drawn) <= 0.8
    assert sum(budget < 0.3 + 0.5 / 4 for budget in drawn) == pytest.approx(1000, abs=100)
    assert 0.29 < min(seen) < 0.45
    assert 0.65 < max(seen) < 0.81
    costs = strategy.costs
    assert strategy.state.known_cost() == pytest.approx(0.5 * costs.original, rel=1e-3)


@pytest.mark.parametrize(("epochs", "iterations"), [(0.5, 2), (1, 4), (1.5, 6), (2.5, 9)])
def test_a_fraction_of_an_epoch_is_a_part_of_the_batches(net, images, loaders, epochs, iterations):
    """Of four batches an epoch; 2.5 epochs are three rounds of three batches."""

    class Count(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            count.append(trainer.current_epoch)

    count: list[int] = []
    search(net, images, loaders, epochs=epochs, callbacks=[Count()])
    assert len(count) == iterations
    assert max(count) == math.ceil(epochs) - 1


def test_every_fourth_iteration_gives_freed_memory_back(net, images, labels, monkeypatch):
    class Given(pl.Callback):
        def on_train_batch_end(self, *_):
            given.append(len(calls))

    calls, given = [], []
    monkeypatch.setattr("nni_haloc.search.updates.give_back_freed", lambda: calls.append(1))
    many = TensorDataset(images.repeat(3, 1, 1, 1)[:160], labels.repeat(3)[:160])
    loaders = [DataLoader(many, 16) for _ in range(2)]  # of ten batches
    search(net, images, loaders, epochs=2, callbacks=[Given()])
    assert given == [1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 6, 6]


@pytest.mark.parametrize("range_", [[0.6, 0.2], [0.3, 0.3], [0.0, 0.5]])
def test_a_range_of_budgets_must_rise(net, images, range_):
    with pytest.raises(ValueError, match="budget_range"):
        Haloc(mac_table(net, images[:1]), 0.5, budget_range=range_)


def test_a_range_below_the_cheapest_network_is_refused(net, images, loaders):
    with pytest.raises(InfeasibleBudget, match="is below the cheapest network"):
        search(net, images, loaders, budget_range=[0.01, 0.5])


def test_the_papers_objective_takes_no_range(net, images):
    with pytest.raises(ValueError, match="budget_range: expected none with objective 'paper'"):
        Haloc(mac_table(net, images[:1]), 0.5, budget_range=[0.2, 0.5], objective="paper")


@pytest.mark.parametrize(
    ("epochs", "batches", "processes", "each"),
    [(0.5, 10, 1, 5), (0.5, 10, 2, 2), (1.5, 10, 2, 3), (0.1, 4, 4, 1), (2, 10, 2, 1.0)],
)
def test_a_fraction_is_one_of_each_processes_batches(epochs, batches, processes, each):
    trainer = SimpleNamespace(world_size=processes, limit_train_batches=1.0)
    Recipe(epochs=epochs).shorten(trainer, batches)
    assert trainer.limit_train_batches == each
    given = SimpleNamespace(world_size=processes, limit_train_batches=7)
    Recipe(epochs=epochs).shorten(given, batches)
    assert given.limit_train_batches == 7


def test_a_loader_of_one_batch_serves_a_fraction_of_an_epoch(net, images, loaders):
    one = DataLoader(loaders[1].dataset, 64)
    evaluator = Classification(loaders[0], one, Recipe(0.5, 0.01), enable_progress_bar=False)
    space = RankSpace(net, images[:1], calibration=images)
    run_search(space, evaluator, Haloc(space.costs, 0.5))


@pytest.mark.parametrize("schedule", ["constant", "onecycle"])
@pytest.mark.parametrize(("epochs", "steps"), [(0.5, 2), (1.3, 4), (2.5, 9)])
def test_fine_tuning_takes_a_fraction_of_an_epoch(net, loaders, schedule, epochs, steps):
    class Count(pl.Callback):
        def on_train_batch_end(self, *_):
            count.append(1)

    count: list[int] = []
    recipe = Recipe(epochs, 0.01, schedule=schedule)
    finetune(net, loaders[0], recipe, callbacks=[Count()], enable_progress_bar=False)
    assert len(count) == steps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decomposition": "data"}, "^decomposition 'data' needs calibration images$"),
        ({"decomposition": "dta"}, "^decomposition: expected one of .*, found 'dta'$"),
    ],
)
@pytest.mark.parametrize("nested", [True, False])
def test_a_decomposition_that_cannot_be_made_is_refused(net, images, nested, options, message):
    with pytest.raises(ValueError, match=message):
        RankSpace(net, images[:1], nested=nested, **options)
