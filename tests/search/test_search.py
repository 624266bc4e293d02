"""The search on NNI: what each update touches, where it settles, what it exports."""

import ast
import copy
import inspect
import math
from dataclasses import replace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from helpers.paths import ROOT
from helpers.searches import QUIET, Watch, search, state
from nni.nas.experiment import NasExperiment
from nni.nas.nn.pytorch import LayerChoice, ModelSpace
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from nni_haloc.costs.analytic import mac_table, param_table
from nni_haloc.costs.counts import count_macs, count_params
from nni_haloc.costs.table import CostTable
from nni_haloc.inputs.config import load_config
from nni_haloc.inputs.models import build_model
from nni_haloc.inputs.schema.search import Search, SearchOptions
from nni_haloc.inputs.schema.training import Training
from nni_haloc.plan.budget import Limit, cheapest
from nni_haloc.plan.compression import compress
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.runs.run import run
from nni_haloc.search import gates, probabilities, updates
from nni_haloc.search import supernet as supernet_module
from nni_haloc.search.approach import FeatureMaps, Kernels
from nni_haloc.search.evaluator import Classification
from nni_haloc.search.space import RankSpace
from nni_haloc.search.strategy import Haloc, run_search
from nni_haloc.search.supernet import MixedRankLayer
from nni_haloc.space.ranks import AllowedRanks
from nni_haloc.space.tucker import reconstruct
from nni_haloc.training.finetuning import finetune
from nni_haloc.training.recipe import Recipe
from nni_haloc.utils.errors import Diverged, HalocError


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_ten_lines_of_python_compress_a_network(net, images, loaders, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # NNI keeps a list of experiments in the home folder
    monkeypatch.chdir(tmp_path)
    before = state(net)
    space = RankSpace(net, images[:1], calibration=images)
    strategy = Haloc(space.costs, budget=0.5)
    experiment = NasExperiment(space, Classification(*loaders, Recipe(1, 0.01), **QUIET), strategy)
    experiment.config.experiment_working_directory = str(tmp_path)
    experiment.run()
    plan = strategy.plan()
    (exported,) = experiment.export_top_models(formatter="instance")
    experiment.stop()
    assert isinstance(plan, RankPlan)
    assert plan.chosen_by["cost"] <= plan.chosen_by["budget"]
    fresh = compress(net, plan, images)
    for network in (exported, strategy.network(plan), fresh):
        assert count_macs(network, images[:1]) == plan.chosen_by["cost"]
        assert type(network) is type(net)
        assert not any(isinstance(m, LayerChoice) for m in network.modules())
    assert same(exported.state_dict(), strategy.network(plan).state_dict())
    assert (
        finetune(fresh, loaders[0], Recipe(1, 0.01), DataLoader(loaders[1].dataset, 16), **QUIET)
        is fresh
    )
    assert same(before, state(net))
    assert not any(isinstance(m, LayerChoice) for m in net.modules())


def test_the_space_is_an_nni_model_space_of_layer_choices(net, images):
    space = RankSpace(net, images[:1])
    assert isinstance(space, ModelSpace)
    choices = {m.label: m for m in space.modules() if isinstance(m, LayerChoice)}
    assert set(choices) == set(space.candidates) == {"stem", "body.0", "point"}
    assert all(type(choice) is LayerChoice for choice in choices.values())
    assert {name: mutable.values for name, mutable in space.simplify().items()} == {
        n: list(row) for n, row in space.candidates.items()
    }
    assert space.size() == math.prod(len(row) for row in space.candidates.values())
    assert "head" in space.left_alone
    torch.testing.assert_close(
        space.eval()(images), net.eval()(images)
    )  # dense is each layer's first candidate


def test_candidates_that_the_active_cost_does_not_reward_are_dropped(net, images):
    costs = mac_table(net, images[:1])
    row = {**costs.costs["body.0"], "r6": 1e9}
    dearer = type(costs)(
        "latency_ms",
        {**costs.costs, "body.0": row, "point": dict.fromkeys(costs.costs["point"], 5.0)},
        costs.fixed,
    )
    space = RankSpace(net, images[:1], dearer)
    assert "r6" not in space.candidates["body.0"]
    assert "point" not in space.candidates
    assert "latency_ms" in space.left_alone["point"]


def test_a_network_without_anything_to_search_is_refused(images):
    with pytest.raises(ValueError, match="nothing to search in Sequential .*0: kind 'linear'"):
        RankSpace(nn.Sequential(nn.Linear(8, 8)), images)


def test_only_the_sampled_candidates_run_and_are_updated(net, images, loaders, monkeypatch):
    monkeypatch.setattr(
        supernet_module, "runs_dense", lambda *_: False
    )  # a dense kernel's run is not seen by the candidate's hook
    monkeypatch.setattr(
        gates, "contracts", lambda *_: True
    )  # what this small network is too small for
    watch = Watch()
    strategy = search(net, images, loaders, epochs=3, callbacks=[watch], lam=1.0)
    layers = strategy.mixed_layers
    sampled_so_far = set()
    for runs, last, changed, held in watch.rounds:
        assert len(runs) == 2 * len(layers)  # one candidate a layer in each of the two steps
        sampled_so_far |= {f"model.{layer}.{name}." for layer, name in last.items()}
        for layer in layers.values():
            for name in layer.names:
                touched = any(k.startswith(f"model.{layer.label}.{name}.") for k in changed)
                assert touched == (name == last[layer.label])
        candidates_held = {
            k
            for k in held
            if any(k.startswith(f"model.{x.label}.") and "alpha" not in k for x in layers.values())
        }
        assert all(
            any(k.startswith(prefix) for prefix in sampled_so_far) for k in candidates_held
        )  # no momentum for what never ran
        assert not any("alpha" in k for k in held)
    # One pass of the original an iteration, in the weight step; once more on the first batch, where
    # an activation writes over an output.
    assert watch.original == len(watch.rounds) + 1


def test_without_the_feature_map_term_the_original_never_runs(net, images, loaders):
    watch = Watch()
    search(net, images, loaders, callbacks=[watch], lam=0.0)
    assert watch.original == 0


def test_the_feature_map_term_is_eq_8_on_the_same_batch(net, images, loaders):
    strategy = search(net, images, loaders)
    supernet, layers = strategy.supernet.eval(), list(strategy.mixed_layers.values())
    for layer in layers:
        layer.searching, layer.sampled = False, len(layer.names) - 1
    with FeatureMaps(supernet, layers, supernet.original).compared() as terms:
        supernet(images)
    ours, theirs = {}, {}
    path = strategy.network(
        RankPlan({x.label: supernet.candidates[x.label][x.names[x.sampled]] for x in layers})
    ).eval()
    for model, kept in ((path, ours), (net.eval(), theirs)):
        for name in ("stem", "body.0", "point"):
            model.get_submodule(name).register_forward_hook(
                lambda _, __, y, name=name, kept=kept: kept.update({name: y.detach().clone()})
            )
        model(images)
    expected = sum(float(((ours[n] - theirs[n]) ** 2).mean()) for n in ours)
    assert float(sum(terms).detach()) == pytest.approx(expected, rel=1e-4)
    assert all(layer.observe is None for layer in layers)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.01])
def test_the_feature_map_term_and_its_gradient_are_those_of_the_mean_square(
    net, images, loaders, share
):
    """Over the first images of the batch where a share of it is compared; against autograd's own
    mean square on copies.
    """
    strategy = search(net, images, loaders)
    supernet, layers = strategy.supernet.double().eval(), list(strategy.mixed_layers.values())
    supernet.original.double()
    x, n = images.double(), max(1, round(share * len(images)))
    for layer in layers:
        layer.searching, layer.sampled = False, len(layer.names) - 1
    with FeatureMaps(supernet, layers, supernet.original, share).compared() as terms:
        logits = supernet(x)
    weights = [p for layer in layers for p in layer[layer.names[-1]].parameters()]
    found = torch.autograd.grad(logits.square().sum() + 0.3 * sum(terms), weights)
    ours, theirs = [], []
    hooks = [
        layer.register_forward_hook(lambda _, __, y: ours.append(y.clone())) for layer in layers
    ]
    hooks += [
        supernet.original.get_submodule(x.label).register_forward_hook(
            lambda _, __, y: theirs.append(y.clone())
        )
        for x in layers
    ]
    supernet.original(x)
    plain = supernet(x).square().sum()
    expected = [nn.functional.mse_loss(y[:n], t[:n]) for y, t in zip(ours, theirs, strict=True)]
    torch.testing.assert_close(torch.stack(terms), torch.stack(expected))
    torch.testing.assert_close(found, torch.autograd.grad(plain + 0.3 * sum(expected), weights))
    for hook in hooks:
        hook.remove()


class Moody(nn.Module):
    """Calls its layers as often in training as it is told to, and all of them once in evaluation,
    as the original network is.
    """

    def __init__(self, stem, body):
        super().__init__()
        self.stem, self.body, self.head = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Linear(8, 4),
        )
        self.calls = stem, body

    def forward(self, x):
        stem, body = self.calls if self.training else (1, 1)
        x = self.stem(x) if stem else x.repeat(1, 3, 1, 1)[:, :8]
        for _ in range(body):
            x = torch.relu(self.body(x))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("calls", "compared"), [((1, 2), 2), ((1, 0), 1), ((0, 1), 1), ((0, 0), 0)]
)
def test_a_call_that_the_original_does_not_make_too_has_no_term(images, loaders, calls, compared):
    class Losses(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            found.append(module.latest.tolist())

    found = []
    strategy = search(Moody(*calls), images, loaders, callbacks=[Losses()], lam=1.0)
    assert len(found) == len(loaders[0])
    assert any(distance > 0 for _, distance in found) == (
        compared > 0
    )  # the dense candidate, while it is the original, has none
    supernet = strategy.supernet.train()
    with FeatureMaps(
        supernet, strategy.mixed_layers.values(), supernet.original
    ).compared() as terms:
        supernet(images)
    assert len(terms) == compared


def test_a_call_on_fewer_images_than_the_originals_has_no_term(images, loaders):
    """It would be compared with other images' outputs, or, one against many, be spread over them
    without a word.
    """
    strategy = search(Moody(1, 1), images, loaders)
    supernet, original = strategy.supernet, strategy.supernet.original
    maps = FeatureMaps(supernet, strategy.mixed_layers.values(), original)
    supernet.register_forward_pre_hook(
        lambda _, args: (args[0][:1],)
    )  # runs before the one that has the original run
    original.register_forward_pre_hook(lambda _, args: (images,))
    with maps.compared() as terms:
        supernet(images)
    assert not terms


@pytest.mark.parametrize(
    "options",
    [
        {"allowed": AllowedRanks(equal=False)},
        {"allowed": AllowedRanks(kinds=("conv", "pointwise", "linear"))},
    ],
)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_unequal_ranks_linear_layers_and_channels_last_are_searched(
    net, images, loaders, options, precision
):
    net = net.to(memory_format=torch.channels_last)
    strategy = search(net, images, loaders, lam=1.0, precision=precision, **options)
    plan = strategy.plan()
    assert (
        0.9 * plan.chosen_by["budget"]
        < count_macs(strategy.network(plan), images[:1])
        <= plan.chosen_by["budget"]
    )
    for layer in strategy.mixed_layers.values():
        assert all(
            p.is_contiguous(memory_format=torch.channels_last)
            for p in layer.parameters()
            if p.dim() == 4
        )


def test_weight_approaching_compares_kernels_and_runs_no_original(net, images, loaders):
    watch = Watch()
    strategy = search(net, images, loaders, callbacks=[watch], lam=1.0, approach="weights")
    assert watch.original == 0
    layers = list(strategy.mixed_layers.values())
    for layer in layers:
        layer.sampled = len(layer.names) - 1
    with Kernels(layers, strategy.supernet.original).compared() as terms:
        found = [float(term.detach()) for term in terms]
    for layer, term in zip(layers, found, strict=True):
        weight, kernel = (
            net.get_submodule(layer.label).weight,
            reconstruct(layer[layer.names[-1]].factors()),
        )
        assert term == pytest.approx(
            float(((kernel.reshape(weight.shape) - weight) ** 2).mean().detach()), rel=1e-4
        )


def test_lambda_may_fall_to_nothing_over_the_search(net, images, loaders, monkeypatch):
    used = []
    monkeypatch.setattr(
        updates, "weight_loss", lambda ce, approach, lam: used.append(lam) or ce + lam * approach
    )
    search(net, images, loaders, epochs=2, lam=3.0, lam_schedule="linear")
    assert used == pytest.approx([3 * (1 - i / 8) for i in range(8)])


def test_a_compressed_network_gives_the_supernets_outputs_for_the_same_path(net, images, loaders):
    strategy = search(net, images, loaders)
    supernet = strategy.supernet.eval()
    generator = np.random.default_rng(7)
    for _ in range(4):
        for layer in strategy.mixed_layers.values():
            layer.searching, layer.sampled = False, layer.draw(generator)
        path = RankPlan(
            {
                x.label: supernet.candidates[x.label][x.names[x.sampled]]
                for x in strategy.mixed_layers.values()
            }
        )
        with torch.no_grad():
            torch.testing.assert_close(strategy.network(path).eval()(images), supernet(images))


def test_seeds_give_the_same_ranks_twice_and_the_same_weights(net, images, loaders):
    first, second, other = (search(net, images, loaders, epochs=2, seed=seed) for seed in (0, 0, 1))
    assert first.plan() == second.plan()
    assert same(first.network().state_dict(), second.network().state_dict())
    assert first.probabilities != other.probabilities


class Costs(pl.Callback):
    """Expected cost of every limit, in units of its budget, after each iteration."""

    def on_fit_start(self, trainer, module):
        self.state, self.ratios = module.state, []

    def on_train_batch_end(self, *_):
        self.ratios.append(
            [
                float(self.state.expected_cost(limit).detach()) / limit.budget
                for limit in self.state.limits
            ]
        )


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.7])
@pytest.mark.parametrize(
    "options", [{}, {"alpha_optimizer": "sgd", "alpha_lr": 1.0}, {"temperature": 2.0}]
)
def test_by_default_the_expected_cost_goes_evenly_to_the_budget_and_stays(
    net, images, loaders, fraction, options
):
    """From that of uniform probabilities, in two fifths of the search."""
    watch = Costs()
    strategy = search(
        net, images, loaders, fraction, epochs=3, warmup_epochs=1, callbacks=[watch], **options
    )
    rows, rest = strategy.costs.restrict(strategy.supernet.candidates)
    start = (rest + sum(sum(row.values()) / len(row) for row in rows.values())) / strategy.budget
    steps = 2 * len(loaders[0])
    expected = [start] * len(loaders[0]) + [
        start + min(1, (i + 1) / steps / 0.4) * (1 - start) for i in range(steps)
    ]
    assert [ratio for (ratio,) in watch.ratios] == pytest.approx(expected, abs=1e-5)
    assert expected[-1] == 1.0
    assert strategy.plan().chosen_by["cost"] <= strategy.budget


def test_a_search_from_sensitivities_starts_at_the_budget_and_keeps_their_order(
    net, images, loaders
):
    """Alpha that hardly moves: its scores are what it started from, and the probabilities the
    tilted softmax in closed form.
    """
    watch = Costs()
    space = RankSpace(net, images[:1], mac_table(net, images[:1]), calibration=images)
    added = {
        layer: {name: 0.01 * i for i, name in enumerate(row)}
        for layer, row in space.candidates.items()
    }
    still = {"alpha_optimizer": "sgd", "alpha_lr": 1e-9, "lam": 0.0, "temperature": 2.0}
    strategy = search(
        net,
        images,
        loaders,
        0.5,
        callbacks=[watch],
        space=space,
        start=added,
        start_scale=0.02,
        **still,
    )
    assert [ratio for (ratio,) in watch.ratios] == pytest.approx([1.0] * len(loaders[0]), abs=1e-5)
    price = float(strategy.supernet.prices[0])
    assert price > 0
    for layer, row in strategy.scores().items():
        losses = torch.tensor(list(added[layer].values()), dtype=torch.float64)
        assert list(row.values()) == pytest.approx(
            (-(losses - losses.mean()) / 0.02).tolist(), abs=1e-4
        )
        costs = (
            torch.tensor([strategy.costs.costs[layer][name] for name in row], dtype=torch.float64)
            / strategy.budget
        )
        assert list(strategy.probabilities[layer].values()) == pytest.approx(
            (-losses / 0.02 - price * costs).softmax(0).tolist(), abs=1e-4
        )


@pytest.mark.parametrize(
    ("options", "steps"),
    [({}, 2), ({"alpha_every": 1}, 6), ({"alpha_every": 3, "warmup_epochs": 1}, 1)],
)
def test_alpha_is_updated_as_often_as_asked(net, images, loaders, options, steps):
    counted = []

    class Steps(pl.Callback):
        def on_fit_start(self, trainer, module):
            module.architecture_optimizers().optimizer.register_step_pre_hook(
                lambda *_: counted.append(1)
            )

    train, val = (
        DataLoader(Subset(x.dataset, range(48)), 16) for x in loaders
    )  # three iterations an epoch
    costs = mac_table(net, images[:1])
    evaluator = Classification(
        train, val, Recipe(2, 0.01, schedule="constant"), callbacks=[Steps()], **QUIET
    )
    run_search(
        RankSpace(net, images[:1], costs, calibration=images),
        evaluator,
        Haloc(costs, 0.5, **options),
    )
    assert len(counted) == steps


def test_scores_are_alphas_path_without_the_prices(net, images, loaders):
    """With the prices taken back, alpha is where its optimizer's steps alone have led: here plain
    gradient steps, added up by hand.
    """

    class Steps(pl.Callback):
        def on_fit_start(self, trainer, module):
            self.total = {
                name: torch.zeros(len(layer.names), dtype=torch.float64)
                for name, layer in module.state.mixed_layers.items()
            }

            def add(optimizer, *_):
                for layer, size in zip(
                    module.state.mixed_layers.values(), self.total.values(), strict=True
                ):
                    size -= 0.5 * layer.alpha.grad.double()

            module.architecture_optimizers().optimizer.register_step_pre_hook(add)

    watch = Steps()
    strategy = search(
        net,
        images,
        loaders,
        0.4,
        epochs=2,
        callbacks=[watch],
        alpha_optimizer="sgd",
        alpha_lr=0.5,
        temperature=2.0,
    )
    for name, row in strategy.scores().items():
        assert list(row.values()) == pytest.approx(
            (watch.total[name] / 2).sub(watch.total[name].mean() / 2).tolist(), abs=1e-4
        )
        assert max(row.values()) > min(row.values())


def limits_of(net, images, macs, params):
    tables = mac_table(net, images[:1]), param_table(net, images[:1])
    return [
        Limit(table, fraction * table.original)
        for table, fraction in zip(tables, (macs, params), strict=True)
    ]


@pytest.mark.parametrize(("macs", "params"), [(0.4, 0.9), (0.9, 0.5), (0.35, 0.49)])
def test_of_two_budgets_both_hold(net, images, loaders, macs, params):
    limits, watch = limits_of(net, images, macs, params), Costs()
    strategy = search(net, images, loaders, limits=limits, epochs=2, callbacks=[watch])
    assert [max(ratios) for ratios in watch.ratios[4:]] == pytest.approx([1.0] * 4, abs=1e-5)
    plan = strategy.plan()
    network = strategy.network(plan)
    found = count_macs(network, images[:1]), count_params(network)
    facts = [plan.chosen_by, *plan.chosen_by["also"]]
    assert [(f["metric"], f["budget"], f["cost"], f["original_cost"]) for f in facts] == [
        (limit.costs.metric, limit.budget, cost, limit.costs.original)
        for limit, cost in zip(limits, found, strict=True)
    ]
    assert all(f["cost"] <= f["budget"] for f in facts)
    assert max(f["expected_cost"] / f["budget"] for f in facts) == pytest.approx(1.0, abs=1e-5)
    least = limits[0].costs.total(cheapest(strategy.supernet.candidates, limits[0].costs))
    between = (plan.chosen_by["cost"] + least) / 2
    tighter = strategy.plan(absolute=between)  # another budget in the first table; the second stays
    assert tighter.chosen_by["cost"] <= between
    assert tighter.chosen_by["also"][0]["budget"] == limits[1].budget


def test_the_papers_loss_prices_the_limit_that_is_exceeded_most(net, images, loaders):
    for fractions, binding in (((0.3, 0.9), 0), ((0.9, 0.3), 1)):
        limits = limits_of(net, images, *fractions)
        strategy = search(
            net, images, loaders, limits=limits, objective="paper", theta=2.0, lam=0.0, min_use=0.0
        )
        expected = float(strategy.expected_cost(limits[binding]).detach()) / limits[binding].budget
        assert float(strategy.state.probability_loss(torch.tensor(3.0)).detach()) == pytest.approx(
            3 * expected**2
        )


def test_budgets_that_conflict_are_refused_before_the_search(net, images, loaders):
    """Each is met by some network; the fewest parameters within the first are named."""
    macs, params = (limit.costs for limit in limits_of(net, images, 1.0, 1.0))
    costs = {
        layer: {"dense": 9.0} | {c: 1 + i for i, c in enumerate(row) if c != "dense"}
        for layer, row in params.costs.items()
    }
    odd = type(params)("params", costs, 0.0)  # here the larger rank is the cheaper one
    least = macs.total({layer: list(row)[-1] for layer, row in macs.costs.items()})
    with pytest.raises(
        ValueError,
        match=r"budget: 8 parameters is below the cheapest network within \S+ k MACs, 9 param",
    ):
        search(
            net,
            images,
            loaders,
            limits=[Limit(macs, least), Limit(odd, 8.0)],
            callbacks=[NeverStarted()],
        )


class NeverStarted(pl.Callback):
    def on_fit_start(self, *_):
        raise AssertionError("the search has started")


@pytest.mark.parametrize("arguments", [(), (1.0, []), ([Limit(None, 1.0)], 1.0)])
def test_limits_and_a_budget_exclude_each_other(arguments):
    with pytest.raises(
        (ValueError, TypeError),
        match="expected a cost table and a budget, or a list of limits|missing",
    ):
        Haloc(*arguments)


def test_a_candidate_stays_where_any_table_rewards_it(net, images):
    macs, params = (limit.costs for limit in limits_of(net, images, 1.0, 1.0))
    dear = {
        layer: {c: row["dense"] if c == "r6" else cost for c, cost in row.items()}
        for layer, row in macs.costs.items()
    }
    no_gain = type(macs)("macs", dear, macs.fixed)
    assert "r6" not in RankSpace(net, images[:1], no_gain).candidates["body.0"]
    assert "r6" in RankSpace(net, images[:1], [no_gain, params]).candidates["body.0"]
    also_dear = type(macs)("params", dear, macs.fixed)
    assert "r6" not in RankSpace(net, images[:1], [no_gain, also_dear]).candidates["body.0"]


def test_pinned_layers_keep_their_rank_and_are_trained(net, images, loaders):
    allowed = AllowedRanks(
        pin={"body.*": (5, 3), "point": 12, "stem": "dense"}, kinds=("conv", "pointwise", "linear")
    )
    space = RankSpace(net, images[:1], None, allowed, images)
    pinned = {"stem": "dense", "body.0": "r5x3", "point": "r12"}
    assert {name: list(row) for name, row in space.candidates.items() if name != "head"} == {
        k: [v] for k, v in pinned.items()
    }
    watch = Watch()
    strategy = search(net, images, loaders, 0.9, allowed=allowed, callbacks=[watch])
    plan = strategy.plan()
    assert plan.names.items() >= pinned.items()
    for network in (strategy.network(plan), compress(net, plan, images)):
        assert count_macs(network, images[:1]) == plan.chosen_by["cost"]
        assert network.body[0].core.weight.shape[:2] == (5, 3)
    for layer, name in pinned.items():  # a single candidate is what runs, and learns, every time
        assert all(
            any(k.startswith(f"model.{layer}.{name}.") for k in changed)
            for _, _, changed, _ in watch.rounds
        )


@pytest.mark.parametrize(
    ("optimizer", "thetas"), [("adam", (0.0, 0.02, 0.1, 0.5)), ("sgd", (0.0, 0.1, 0.5, 2.0))]
)
def test_in_the_papers_mode_a_larger_theta_ends_cheaper(net, images, loaders, optimizer, thetas):
    """All the way from above the budget. (Under Adam not beyond 0.5: early gradients grow so large
    that it steps less after.)
    """
    options = {
        "epochs": 4,
        "objective": "paper",
        "alpha_lr": 0.05,
        "lam": 0.0,
        "alpha_optimizer": optimizer,
    }
    found = [search(net, images, loaders, 0.3, theta=theta, **options) for theta in thetas]
    ends = [float(strategy.expected_cost().detach()) for strategy in found]
    assert ends == sorted(ends, reverse=True)
    assert len(set(ends)) == len(thetas)
    assert min(ends) > found[0].budget


def test_eta_matters_under_sgd_alone(net, images, loaders):
    options = {"objective": "paper", "lam": 0.0, "alpha_lr": 0.05}
    ends = {
        (optimizer, eta): search(
            net, images, loaders, 0.3, eta=eta, alpha_optimizer=optimizer, **options
        ).probabilities["body.0"]["dense"]
        for optimizer in ("adam", "sgd")
        for eta in (0.5, 2.0)
    }
    assert ends["adam", 0.5] == pytest.approx(ends["adam", 2.0], rel=1e-3)
    uniform = 1 / len(mac_table(net, images[:1]).costs["body.0"])
    assert ends["sgd", 2.0] - uniform == pytest.approx(4 * (ends["sgd", 0.5] - uniform), rel=0.2)


@pytest.mark.parametrize("fraction", [0.5, 0.3, 0.15])
def test_the_digits_example_ends_at_its_budget_and_uses_it(tmp_path, fraction):
    example = ROOT / "examples" / "digits" / "run.yml"
    run(
        load_config(
            example,
            {
                "budget.fraction": fraction,
                "search.epochs": 2,
                "finetune.epochs": 0,
                "recalibration_batches": 0,
            },
        ),
        tmp_path,
    )
    facts = RankPlan.load(tmp_path / "ranks.json").chosen_by
    assert facts["expected_cost"] == pytest.approx(facts["budget"], rel=0.02)
    costs = CostTable.load(tmp_path / "costs.json")
    room = facts["budget"] - costs.total(cheapest(costs.costs, costs))
    assert 0 <= facts["budget"] - facts["cost"] <= 0.1 * room  # 0.05 has no network at 15 %


def test_a_run_may_have_several_budgets(tmp_path):
    example = ROOT / "examples" / "digits" / "run.yml"
    short = {
        "search.epochs": 1,
        "finetune.epochs": 0,
        "recalibration_batches": 0,
        "rank_space": {"pin": {"block2.*": 12}},
    }
    counted = mac_table(
        build_model("digits_cnn"), torch.zeros(1, 1, 8, 8), AllowedRanks(pin={"block2.*": 12})
    )
    replace(counted, metric="latency_ms").save(tmp_path / "latency.json")
    also = [
        {"metric": "params", "fraction": 0.35},
        {"metric": "latency_ms", "fraction": 0.9, "table": str(tmp_path / "latency.json")},
    ]
    metrics = run(
        load_config(example, {**short, "budget.fraction": 0.5, "budget.also": also}), tmp_path
    )
    plan = RankPlan.load(tmp_path / "ranks.json")
    facts = [plan.chosen_by, *plan.chosen_by["also"]]
    assert [f["metric"] for f in facts] == ["macs", "params", "latency_ms"]
    assert (facts[0]["cost"], facts[1]["cost"]) == (metrics["macs"], metrics["params"])
    assert metrics["macs"] <= facts[0]["budget"]
    assert metrics["params"] <= facts[1]["budget"] == 0.35 * 65834
    assert plan.names["block2.conv"] == "r12"
    for i, name in enumerate(("costs.json", "costs-also0.json", "costs-also1.json")):
        assert CostTable.load(tmp_path / name).metric == facts[i]["metric"]
    with pytest.raises(
        HalocError, match=r"budget: 9 parameters is below the cheapest network, \S+ k parameters"
    ):
        run(
            load_config(example, {**short, "budget.also": [{"metric": "params", "absolute": 9.0}]}),
            tmp_path,
        )
    macs = str(tmp_path / "costs.json")
    with pytest.raises(
        HalocError, match=r"budget\.also\.0\.table: expected a table of params, found macs in"
    ):
        run(
            load_config(
                example,
                {**short, "budget.also": [{"metric": "params", "fraction": 0.5, "table": macs}]},
            ),
            tmp_path,
        )


def test_the_papers_choice_is_the_arg_max(net, images, loaders):
    strategy = search(
        net, images, loaders, select="argmax", objective="paper", allowed=AllowedRanks(dense=False)
    )
    for name, layer in strategy.mixed_layers.items():
        with torch.no_grad():
            layer.alpha.copy_(torch.arange(len(layer.names)))
        assert strategy.plan().names[name] == layer.names[-1]
        assert "dense" not in layer.names


def test_a_budget_that_nothing_meets_is_refused_before_the_search(net, images, loaders):
    with pytest.raises(
        ValueError, match=r"budget: .* MACs is below the cheapest network, \S+ k MACs"
    ):
        search(net, images, loaders, 1e-4)


def test_warm_up_trains_the_weights_alone(net, images, loaders):
    strategy = search(net, images, loaders, epochs=2, warmup_epochs=2)
    assert all(not layer.alpha.detach().any() for layer in strategy.mixed_layers.values())


def test_users_own_lightning_module_is_enough(net, images, loaders):
    """A training step that returns a bare loss, written by somebody who does not know of this
    project.
    """
    from nni.nas.evaluator.pytorch import Classification
    from nni.nas.evaluator.pytorch import DataLoader as Traced

    data = TensorDataset(images, torch.randint(0, 4, (64,)))
    evaluator = Classification(
        train_dataloaders=Traced(data, 16), val_dataloaders=Traced(data, 16),
        max_epochs=1, num_classes=4,
        enable_progress_bar=False, logger=False, enable_checkpointing=False,
    )  # fmt: skip
    costs = mac_table(net, images[:1])
    space = RankSpace(net, images[:1], costs, calibration=images)
    strategy = run_search(space, evaluator, Haloc(costs, 0.5))
    assert strategy.plan().chosen_by["cost"] <= 0.5 * costs.original
    assert any(isinstance(m, MixedRankLayer) for m in strategy.supernet.modules())
    assert not any(isinstance(m, MixedRankLayer) for m in space.modules())


class Awkward(nn.Module):
    """Writes into its convolutions' outputs, and calls one of them under two names."""

    def __init__(self):
        super().__init__()
        self.first, self.again = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.alias = self.again
        self.stem, self.norm, self.head = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.norm(self.stem(x))
        y = torch.nn.functional.relu(self.first(x), inplace=True)
        z = self.alias(self.again(y))
        z += x
        return self.head(z.mean((2, 3)))


def test_outputs_may_be_written_into_and_a_layer_may_have_two_names(images, loaders):
    torch.manual_seed(0)
    strategy = search(Awkward(), images, loaders, epochs=2, warmup_epochs=1, lam=1.0)
    supernet = strategy.supernet
    assert supernet.model.again is supernet.model.alias
    assert isinstance(supernet.model.alias, MixedRankLayer)
    for layer in strategy.mixed_layers.values():
        layer.searching, layer.sampled = False, len(layer.names) - 1
    path = RankPlan(
        {x.label: supernet.candidates[x.label][x.names[-1]] for x in strategy.mixed_layers.values()}
    )
    network = strategy.network(path).eval()
    assert network.again is network.alias
    with torch.no_grad():
        torch.testing.assert_close(network(images), supernet.eval()(images))


def test_a_frozen_model_in_evaluation_mode_is_searched_like_any_other(net, images, loaders):
    strategies = []
    for change in (lambda m: m.train(), lambda m: m.eval().requires_grad_(False)):
        model = change(copy.deepcopy(net))
        strategies.append(search(model, images, loaders, epochs=2))
        assert model.training == (len(strategies) == 1)
    assert same(strategies[0].network().state_dict(), strategies[1].network().state_dict())


def test_the_plan_keeps_dense_where_the_task_needs_it(images):
    """One layer has rank 2, the other full rank; the budget allows one of them to stay dense. The
    labels are the network's own answers.
    """
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3, padding=1), *(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2)))
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 4))
    with torch.no_grad():
        layers[1].weight.zero_()
        layers[1].weight[:, :, 1, 1] = torch.randn(8, 2) @ torch.randn(2, 8)
        layers[2].weight.copy_(nn.init.orthogonal_(torch.empty(8, 72)).reshape(8, 8, 3, 3) * 3)
        labels = model(images).argmax(1)
    data = DataLoader(
        TensorDataset(images, labels), 16, shuffle=True, generator=torch.Generator().manual_seed(0)
    )
    allowed = AllowedRanks(step=2, exclude=("0", "4"))
    costs = mac_table(model, images[:1], allowed)
    space = RankSpace(model, images[:1], costs, allowed, images)
    budget = costs.total({"1": "r2", "2": "dense"})
    strategy = Haloc(costs, budget_absolute=budget, lam=0.0)
    run_search(
        space, Classification(data, data, Recipe(10, 1e-6, schedule="constant"), **QUIET), strategy
    )
    assert strategy.plan().names == {"1": "r2", "2": "dense"}


def test_a_pinned_layer_takes_no_gate_gradient(net, images, loaders, monkeypatch):
    calls = []
    monkeypatch.setattr(
        MixedRankLayer,
        "_gate_gradients",
        lambda self, x, grad_y: calls.append(self.label) or torch.zeros(len(self)),
    )
    search(net, images, loaders, fraction=0.8, allowed=AllowedRanks(pin={"stem": 2}))
    assert set(calls) == {"body.0", "point"}


def test_a_search_that_diverges_says_so(net, images, loaders):

    with torch.no_grad():
        net.head.weight.fill_(float("nan"))
    with pytest.raises(
        Diverged,
        match=r"the search diverged: loss nan in epoch 1, iteration 1; lower its learning rate$",
    ):
        search(net, images, loaders)


@pytest.mark.parametrize("clip", [1e-3, None])
def test_the_gradients_of_the_weights_are_clipped_by_their_norm(net, images, loaders, clip):
    norms = []

    class Norm(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            held = [
                p.grad
                for n, p in module.named_parameters()
                if p.grad is not None and "alpha" not in n
            ]
            norms.append(float(torch.stack([g.norm() for g in held]).norm()))

    search(net, images, loaders, callbacks=[Norm()], lam=1.0, clip=clip)
    assert all(norm == pytest.approx(1e-3, rel=1e-3) if clip else norm > 0.1 for norm in norms)


def test_gate_gradients_that_are_not_finite_are_a_divergence_too(net, images, loaders, monkeypatch):
    """The loss may still be finite: half precision overflows in the backward pass first."""

    monkeypatch.setattr(
        MixedRankLayer,
        "_gate_gradients",
        lambda self, x, grad_y: torch.full((len(self.names),), float("inf")),
    )
    with pytest.raises(Diverged, match="the search diverged"):
        search(net, images, loaders)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"objective": "papr"}, "objective: input should be 'settle' or 'paper', found 'papr'"),
        ({"select": "arg max"}, "select: input should be 'knapsack' or 'argmax', found 'arg max'"),
        ({"alpha_optimizer": "lion"}, "alpha_optimizer: input should be .*, found 'lion'"),
        ({"lamda": 2.0}, "lamda: unknown key"),
        ({"approach_share": 0.0}, "approach_share: input should be greater than 0, found 0.0"),
        ({"alpha_every": 0, "eta": "1"}, r"eta: .*, found '1' \(and 1 more\)"),
    ],
)
def test_options_that_do_not_exist_are_refused(net, images, option, message):
    with pytest.raises(ValueError, match=f"^{message}$") as raised:
        Haloc(mac_table(net, images[:1]), 1.0, **option)
    assert type(raised.value) is ValueError
    assert raised.value.__suppress_context__


def test_python_and_the_settings_have_the_same_options_and_defaults(net, images):
    options = Haloc(mac_table(net, images[:1]), 0.5).options
    names = set(type(options).model_fields)
    assert Search().model_dump(include=names) == options.model_dump()
    others = {"start", "supernet", "tensorboard", *Training.model_fields} - {"compile"}
    assert names == set(Search.model_fields) - others
    assert SearchOptions.__qualname__ in Haloc.__doc__  # which says what each means


def test_a_fraction_and_an_absolute_budget_are_not_confused(net, images, loaders):
    costs = mac_table(net, images[:1])
    half = 0.5 * costs.original
    assert Haloc(costs, 0.5).budget == Haloc(costs, budget_absolute=half).budget == half
    with pytest.raises(
        ValueError,
        match=r"^budget: expected a fraction .*, found 12.5; .* macs use budget_absolute$",
    ):
        Haloc(costs, 12.5)
    for wrong in ({}, {"budget": 0.5, "budget_absolute": half}):
        with pytest.raises(ValueError, match="^expected either budget, .*, or budget_absolute, "):
            Haloc(costs, **wrong)
    for wrong in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="budget_absolute: expected a number of macs above 0"):
            Haloc(costs, budget_absolute=wrong)
    with pytest.raises(ValueError, match="or a list of limits$"):
        Haloc([Limit(costs, half)], budget_absolute=half)
    strategy = search(net, images, loaders, 0.8)
    assert strategy.plan(0.5) == strategy.plan(absolute=half)
    assert strategy.plan().chosen_by["budget"] == 0.8 * costs.original
    with pytest.raises(ValueError, match=r"found 12.5; for a number of macs use absolute$"):
        strategy.plan(12.5)


def test_the_updates_and_the_state_do_not_know_the_strategy():
    for module in (updates, probabilities):
        tree = ast.parse(inspect.getsource(module))
        imported = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert "nni_haloc.search.objective" in imported
        assert "nni_haloc.search.strategy" not in imported


def test_alpha_takes_no_part_in_the_weight_step(net, images, loaders, monkeypatch):
    """Gate gradients are computed once a layer and iteration, in the architecture step, and no
    weight step leaves alpha a gradient.
    """
    compute, calls, left = MixedRankLayer._gate_gradients, [], []

    def counted(self, x, grad_y):
        calls.append(self.label)
        return compute(self, x, grad_y)

    class After(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            left.extend(layer.alpha.grad for layer in module.state.mixed_layers.values())

    monkeypatch.setattr(MixedRankLayer, "_gate_gradients", counted)
    strategy = search(net, images, loaders, epochs=2, callbacks=[After()])
    iterations = 2 * len(loaders[0])
    assert len(calls) == iterations * len(strategy.mixed_layers)
    assert all(layer.task_gradient.count == iterations for layer in strategy.mixed_layers.values())
    assert left == [None] * len(calls)


def test_a_plans_layers_are_plain_strings(net, images, loaders):
    """NNI's labels are of a class of its own, which a checkpoint that is loaded safely may not
    hold.
    """
    for options in ({}, {"objective": "paper"}, {"select": "argmax"}):
        assert {type(name) for name in search(net, images, loaders, **options).plan().ranks} == {
            str
        }


def test_without_a_number_of_epochs_lambda_stays_and_the_cost_is_at_the_budget(
    net, images, loaders, monkeypatch
):
    used = []
    monkeypatch.setattr(
        updates, "weight_loss", lambda ce, approach, lam: used.append(lam) or ce + lam * approach
    )
    costs = mac_table(net, images[:1])
    strategy = Haloc(costs, 0.5, lam_schedule="linear")
    evaluator = Classification(
        *loaders, Recipe(-1, 0.01, schedule="constant"), max_steps=6, **QUIET
    )
    run_search(RankSpace(net, images[:1], costs), evaluator, strategy)
    assert set(used) == {1.0}
    assert float(strategy.expected_cost().detach()) == pytest.approx(strategy.budget, rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"alpha_lr": 1e12},
        {"objective": "paper", "theta": 1e4},
        {"alpha_lr": 1e12, "alpha_optimizer": "sgd"},
    ],
)
def test_an_exploding_alpha_is_a_divergence(net, images, loaders, options):
    """It ended with a plan that was chosen by rounding, or in the solver's error."""

    with pytest.raises(
        Diverged,
        match=r"the search diverged: alpha of layer '.*' moved by \S+ in one step; lower alpha_lr$",
    ):
        search(net, images, loaders, **options)


def test_a_network_with_layers_of_zeros_is_searched(net, images, loaders):
    with torch.no_grad():
        net.stem.weight.zero_()
        net.point.weight.zero_()
    strategy = search(net, images, loaders)
    assert strategy.costs.total(strategy.plan().names) <= strategy.budget
    assert all(torch.isfinite(value).all() for value in strategy.network().state_dict().values())
