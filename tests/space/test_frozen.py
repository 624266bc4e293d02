"""What a user has frozen stays frozen: in the rank space, in its networks, after a training."""

import copy

import pytest
import torch
from helpers.networks import SmallNet
from helpers.searches import search
from torch import nn

from nni_haloc.chain.pruning import prune
from nni_haloc.costs.analytic import mac_table, roofline_table
from nni_haloc.plan.budget import Limit
from nni_haloc.plan.compression import compress, restructure
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.plan.rules.learned import learned
from nni_haloc.plan.rules.problem import Problem
from nni_haloc.runs.compress_model import compress_model
from nni_haloc.search.evaluator import Classification
from nni_haloc.search.multitrial import run_multitrial
from nni_haloc.search.space import RankSpace
from nni_haloc.search.strategy import Haloc, run_search
from nni_haloc.space.ranks import AllowedRanks, find_layers
from nni_haloc.training.finetuning import finetune
from nni_haloc.training.recipe import Recipe
from nni_haloc.utils.errors import InfeasibleBudget

ALL = AllowedRanks(kinds=("conv", "pointwise", "linear"), step=2)
QUIET = {"enable_progress_bar": False}


def frozen(net, *names):
    for name, parameter in net.named_parameters():
        if name.startswith(names):
            parameter.requires_grad_(False)
    return net


def flags(net):
    return {name: parameter.requires_grad for name, parameter in net.named_parameters()}


def outside(net, layers):
    return {name: flag for name, flag in flags(net).items() if not name.startswith(tuple(layers))}


PARTS = {
    "the stem": (("stem", "norm"), {"stem"}),
    "a norm": (("norm",), set()),
    "all but the head": (("stem", "norm", "body", "point"), {"stem", "body.0", "point"}),
    "a bias": (("stem.bias",), set()),
    "a weight": (("point.weight",), {"point"}),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("nested", [True, False])
def test_flags_hold_in_the_space_and_its_networks(net, images, part, nested):
    names, expected = PARTS[part]
    frozen(net, *names)
    space = RankSpace(net, images[:1], allowed=ALL, nested=nested)
    reasons = {row.layer: row.reason for row in space.report() if row.reason}
    assert {layer for layer, reason in reasons.items() if reason == "frozen"} == expected
    lowest = {layer: list(row)[-1] for layer, row in space.candidates.items()}
    for sample in (lowest, dict.fromkeys(lowest, "dense")):
        network = space.freeze(sample)
        assert outside(network, lowest) == outside(net, lowest)
        plan = RankPlan({layer: space.candidates[layer][name] for layer, name in sample.items()})
        for other in (compress(net, plan), compress(net, plan, images), restructure(net, plan)):
            assert flags(other) == flags(network)
    own_bias = [flag for name, flag in flags(network).items() if name == "stem.bias"]
    assert own_bias == [not {"stem", "stem.bias"} & set(names)]


@pytest.mark.parametrize("average", [0.0, 0.9])
@pytest.mark.parametrize("approach", ["features", "weights"])
def test_frozen_parameters_stay_as_they_are_in_a_search_and_after_it(
    net, images, loaders, average, approach
):
    frozen(net, "stem", "norm", "point.bias")
    before = {name: value.clone() for name, value in net.named_parameters()}
    strategy = search(net, images, loaders, 0.7, average=average, approach=approach)
    network = strategy.network()
    assert set(strategy.mixed_layers) == {"body.0", "point"}
    finetune(network, loaders[0], Recipe(1, 0.1), **QUIET)
    values = dict(network.named_parameters())
    for name in ("stem.weight", "stem.bias", "norm.weight", "norm.bias"):
        assert torch.equal(values[name], before[name])
        assert not values[name].requires_grad
    biases = [v for name, v in values.items() if name.startswith("point") and "bias" in name]
    assert torch.equal(biases[0], before["point.bias"])
    assert not torch.equal(values["head.weight"], before["head.weight"])


def test_frozen_biases_stay_with_nested_candidates_too(net, images, loaders):
    frozen(net, "point.bias")
    network = search(net, images, loaders, nested=True, fraction=0.4).network()
    (bias,) = (v for n, v in network.named_parameters() if n.startswith("point") and "bias" in n)
    assert not bias.requires_grad
    assert torch.equal(bias, net.point.bias)


def test_a_network_without_gradients_is_taken_for_one_prepared_for_inference(
    net, images, loaders, caplog, monkeypatch
):
    monkeypatch.setattr("nni_haloc.utils.log.logger.propagate", True)
    trainable = RankSpace(net, images[:1], allowed=ALL)
    net.requires_grad_(False)
    with caplog.at_level("INFO"):
        space = RankSpace(net, images[:1], allowed=ALL)
    assert "no parameter of SmallNet requires gradients" in caplog.text
    assert space.candidates == trainable.candidates
    lowest = {layer: list(row)[-1] for layer, row in space.candidates.items()}
    plan = RankPlan({layer: space.candidates[layer][name] for layer, name in lowest.items()})
    for network in (space.freeze(lowest), compress(net, plan), restructure(net, plan)):
        assert all(flags(network).values())
    finetune(net, loaders[0], Recipe(1, 0.1), **QUIET)
    assert all(flags(net).values())
    assert not any(flags(SmallNet().requires_grad_(False)).values())


@pytest.mark.filterwarnings("ignore:.*has shuffling enabled.*")
def test_compress_model_keeps_what_is_frozen(net, loaders):
    frozen(net, "stem", "norm")
    for epochs in (0, 1):
        result = compress_model(
            net, *loaders, metric="macs", budget=0.7, epochs=epochs, calibration_images=64
        )
        values = dict(result.model.named_parameters())
        assert torch.equal(values["stem.weight"], net.stem.weight)
        assert not values["stem.weight"].requires_grad
        assert values["head.weight"].requires_grad


def test_the_rule_that_trains_trains_no_frozen_layer(net, images, labels, loaders, monkeypatch):
    frozen(net, "stem", "norm")
    costs = mac_table(net, images[:1], ALL)
    layers = find_layers(net, images[:1], ALL)
    problem = Problem(
        net, layers.specs, layers.candidates(ALL), [Limit.of(costs, 0.7)], images, labels,
        train=loaders[0],
    )  # fmt: skip
    trained = []
    monkeypatch.setattr(
        "nni_haloc.plan.rules.learned.copy_of",
        lambda m: trained.append(copy.deepcopy(m)) or trained[0],
    )
    assert set(learned(problem)) == {"body.0", "point", "head"}
    assert torch.equal(trained[0].stem.weight, net.stem.weight)
    assert not torch.equal(trained[0].head.weight, net.head.weight)


def by_search(net, images, loaders, allowed):
    space = RankSpace(net, images[:1], allowed=allowed)
    run_search(space, Classification(*loaders, Recipe(1)), Haloc(space.costs, 0.01))


def by_trials(net, images, loaders, allowed):
    space = RankSpace(net, images[:1], allowed=allowed)
    run_multitrial(space, [Limit.of(space.costs, 0.01)], lambda _: 0.0, "random", 2)


def by_a_rule(net, images, loaders, allowed):
    compress_model(net, *loaders, metric="macs", budget=0.01, epochs=0, allowed=allowed)


def by_a_plan(net, images, loaders, allowed):
    space = RankSpace(net, images[:1], allowed=allowed)
    strategy = Haloc(space.costs, 0.99)
    run_search(space, Classification(*loaders, Recipe(1), **QUIET), strategy)
    strategy.plan(0.01)


@pytest.mark.parametrize("entrance", [by_search, by_trials, by_a_rule, by_a_plan])
def test_a_budget_that_frozen_layers_exceed_says_so(net, images, loaders, entrance):
    allowed = AllowedRanks(kinds=("conv", "pointwise", "linear"), step=2, exclude=("head",))
    frozen(net, "stem", "norm", "point")
    macs = mac_table(net, images[:1], allowed)
    rest = macs.restrict({"body.0": {}})[1] / macs.original
    with pytest.raises(InfeasibleBudget) as refused:
        entrance(net, images, loaders, allowed)
    message = str(refused.value)
    assert f"; {rest:.3g} of the original's stays as it is (" in message
    assert "stem and 1 more: frozen" in message
    assert "head: excluded by name" in message


def test_pruning_keeps_what_is_frozen(net, images):
    frozen(net, "norm", "head.bias")
    small = prune(net, images[:2], 0.5)
    assert flags(small) == flags(net)
    assert small.stem.weight.shape != net.stem.weight.shape


def test_a_frozen_layer_that_a_plan_names_is_decomposed_and_stays_frozen(net):
    frozen(net, "stem")
    network = compress(net, RankPlan({"stem": (2, 2)}))
    assert not any(flag for name, flag in flags(network).items() if name.startswith("stem."))
    assert network.head.weight.requires_grad


def test_a_pattern_for_a_frozen_layer_says_that_it_is(net, images):
    frozen(net, "stem")
    with pytest.raises(ValueError, match=r"pin: no layer .* matches 'stem'; stem: frozen"):
        RankSpace(net, images[:1], allowed=AllowedRanks(pin={"stem": 2}))


def test_a_frozen_layer_costs_what_it_did(net, images):
    """A roofline counts the layers that are not searched, too."""
    everything = roofline_table(net, images[:1], ALL, flops=1e9, bandwidth=1e9)
    frozen(net, "stem")
    table = roofline_table(net, images[:1], ALL, flops=1e9, bandwidth=1e9)
    assert "stem" not in table.costs
    assert table.original == pytest.approx(everything.original)
    assert mac_table(net, images[:1], ALL).original == mac_table(SmallNet(), images[:1]).original


class Indexed(SmallNet):
    """Has parameters and buffers that no gradient reaches."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.tensor([3, 0, 2, 1]), requires_grad=False)
        self.flag = nn.Parameter(torch.tensor([True, False]), requires_grad=False)
        self.register_buffer("counts", torch.arange(4))
        self.register_buffer("mask", torch.tensor([True, True, False]))
        self.register_buffer("phase", torch.tensor([1 + 2j, 3j]))
        self.gain = nn.Parameter(torch.tensor([1.0 + 0j, 1j]))

    def forward(self, x):
        shift = (self.gain * self.phase).real.sum() * 1e-3
        return super().forward(x)[:, self.table] + self.counts + shift


def test_integers_and_complex_numbers_among_the_parameters(images, loaders):
    torch.manual_seed(0)
    net = Indexed()
    kept = {n: v.clone() for n, v in net.state_dict().items() if not v.is_floating_point()}
    strategy = search(net, images, loaders, average=0.9)
    network = strategy.network()
    finetune(network, loaders[0], Recipe(1, 0.01), teacher=net, **QUIET)
    state = network.state_dict()
    for name in ("table", "flag", "counts", "mask", "phase"):
        assert torch.equal(state[name], kept[name])
        assert state[name].dtype == kept[name].dtype
    assert not torch.equal(state["gain"], kept["gain"])  # it is trained
    assert flags(network)["gain"]
    assert not flags(network)["table"]


def test_integers_everywhere_else(images, loaders, tmp_path):
    """Compression without training, pruning, saving, and a network that is all frozen."""
    from nni_haloc.runs.saved import load

    torch.manual_seed(0)
    net = Indexed().requires_grad_(False)
    result = compress_model(net, loaders[0], loaders[1], metric="macs", budget=0.7, epochs=0)
    assert flags(result.model)["head.weight"]
    assert not flags(result.model)["table"]
    result.save(tmp_path)
    loaded = load(tmp_path, Indexed())
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), result.model(images))


def test_a_layer_of_complex_weights_is_left_alone():
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.real = nn.Linear(16, 16)
            self.mix = nn.Linear(16, 16, dtype=torch.complex64)

        def forward(self, x):
            return self.mix(self.real(x).to(torch.complex64)).abs()

    space = RankSpace(Complex(), torch.randn(2, 16), allowed=ALL)
    assert list(space.candidates) == ["real"]
    assert space.left_alone == {"mix": "its weight is of torch.complex64"}
