"""Losses of candidates on images that they were not fitted to."""

import copy
import logging

import numpy as np
import pytest
import torch
from torch import nn

from nni_haloc.costs.analytic import mac_table
from nni_haloc.plan import evidence as evidence_module
from nni_haloc.plan.budget import Limit
from nni_haloc.plan.evidence import (
    Evidence,
    divergence_of_equal_outputs,
    divergence_within_and_beyond,
    gather_evidence,
)
from nni_haloc.plan.rules.problem import Problem
from nni_haloc.plan.sensitivity import added_losses
from nni_haloc.search.space import RankSpace
from nni_haloc.space.candidates import build_candidates, build_nested_candidates
from nni_haloc.space.covariances import channel_moments
from nni_haloc.space.layers import LayerSpec
from nni_haloc.space.modules import replace_modules
from nni_haloc.space.nested import lost_energies, nested_factors
from nni_haloc.space.ranks import AllowedRanks, find_layers
from nni_haloc.space.tucker import Tucker2, reconstruct


class Space:
    """A network's candidates, and how they are made."""

    def __init__(self, net, images, allowed=AllowedRanks(), method=None):
        self.net, self.layers = net, find_layers(net, images[:1], allowed)
        self.candidates, self.method, self.fits = self.layers.candidates(allowed), method, []

    def build(self, candidates, images):
        self.fits.append(images)
        return build_candidates(self.net, self.layers.specs, candidates, images, self.method)

    def gather(self, images):
        return gather_evidence(self.net, self.layers.specs, self.candidates, self.build, images)


def test_without_labels_the_loss_is_the_divergence_from_the_originals_outputs(net, images):
    """Image by image, in float64, against the definition."""
    net, images = net.double().eval(), images.double()
    space = Space(net, images)
    modules = space.build(space.candidates, images)
    found = added_losses(net, modules, images)
    with torch.no_grad():
        p = net(images).softmax(1)
        for layer, row in modules.items():
            for name, module in row.items():
                network = copy.deepcopy(net)
                replace_modules(network, {layer: module.double()})
                expected = (p * (p.log() - network(images).log_softmax(1))).sum(1)
                np.testing.assert_allclose(found[layer][name], expected.numpy(), atol=1e-6)


def test_each_half_is_measured_with_candidates_of_the_other(net, images):
    space = Space(net, images)
    found = space.gather(images)
    assert all(
        torch.equal(a, b) for a, b in zip(space.fits, (images[1::2], images[::2]), strict=True)
    )
    for i, (fitted, seen) in enumerate(((images[1::2], images[::2]), (images[::2], images[1::2]))):
        expected = added_losses(net, space.build(space.candidates, fitted), seen)
        for layer, row in expected.items():
            for name, values in row.items():
                half = found.losses[layer][name][32 * i : 32 * (i + 1)]
                np.testing.assert_allclose(half, values, rtol=1e-4, atol=1e-6)


def test_what_rules_and_the_search_start_from_is_measured_beyond_the_fit(net, images):
    """By candidates of the other half, however many images the problem or the space has."""
    allowed = AllowedRanks()
    space = Space(net, images, allowed, "data")
    expected = space.gather(images).added
    costs = mac_table(net, images[:1], allowed)
    problem = Problem(
        net, space.layers.specs, space.candidates, [Limit.of(costs, 0.6)], images, None, "data"
    )
    searched = RankSpace(net, images[:1], costs, allowed, images, "data", False)
    alike(problem.evidence.added, expected)
    alike(searched.sensitivities(images), expected)


def test_a_nested_search_starts_from_what_is_measured_beyond_the_fit(net, images):
    allowed = AllowedRanks()
    space = Space(net, images, allowed)

    def build(candidates, images):
        return build_nested_candidates(net, space.layers.specs, candidates, images)

    expected = gather_evidence(net, space.layers.specs, space.candidates, build, images).added
    searched = RankSpace(
        net, images[:1], mac_table(net, images[:1], allowed), allowed, images, None, True
    )
    alike(searched.sensitivities(images), expected)


def alike(found, expected):
    for layer, row in expected.items():
        for name, value in row.items():
            assert found[layer][name] == pytest.approx(value, rel=1e-3, abs=1e-6)


def test_on_the_images_of_the_fit_candidates_seem_to_gain_and_on_others_they_do_not():
    """A classifier of noise, with as many images as unknowns."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 4))
    images, labels = torch.randn(48, 3, 4, 4), torch.randint(4, (48,))
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()
    space = Space(net, images, AllowedRanks(step=4, kinds=("linear",)))
    inside = added_losses(net, space.build(space.candidates, images), images)
    beyond = space.gather(images).added
    for layer, row in beyond.items():
        low = [name for name in row if name != "dense"]
        assert sum(row[n] for n in low) > 1.2 * sum(inside[layer][n].mean() for n in low)


def test_a_gain_counts_as_nothing_and_errors_are_those_of_a_sum():
    losses = {
        "a": {"dense": np.zeros(4), "r2": np.array([-1.0, -2.0, 0.0, 1.0])},
        "b": {"r2": np.array([1.0, 2.0, 3.0, 6.0])},
    }
    found = Evidence(losses, {"a": ["r2"], "b": ["r2"]})
    assert found.added == {"a": {"dense": 0.0, "r2": 0.0}, "b": {"r2": 3.0}}
    total = np.array([0.0, 0.0, 3.0, 7.0])
    mean, error = found.of({"a": "r2", "b": "r2"})
    assert mean == 2.5
    assert error == pytest.approx(np.sqrt(((total - 2.5) ** 2).sum() / 3 / 4))


def decaying():
    """Return a network whose second layer has 24 channels of falling weight, and images."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(24 * 36, 10),
    )  # fmt: skip
    decay = torch.diag(0.8 ** torch.arange(24.0))
    with torch.no_grad():
        net[2].weight.copy_(torch.einsum("fg,gcij,cd->fdij", decay, net[2].weight, decay) * 4)
    return net.eval(), torch.randn(128, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def test_few_candidates_are_measured_and_the_others_lie_between_them(monkeypatch):
    """Every rank of a wide layer: against measuring all of them."""
    net, images = decaying()
    space = Space(net, images, AllowedRanks(step=1, exclude=("0",), kinds=("conv",)))
    some = space.gather(images)
    built = sum(map(len, some.measured.values()))
    assert built == evidence_module.CANDIDATES + 1
    monkeypatch.setattr(evidence_module, "CANDIDATES", 99)
    every = space.gather(images).added["2"]
    assert len(every) > 2 * built
    for name, value in some.added["2"].items():
        assert value == pytest.approx(every[name], rel=0.35, abs=1e-5), name
        if name in some.measured["2"]:
            assert value == pytest.approx(every[name], rel=1e-6)


def test_a_pair_of_ranks_loses_what_its_two_sides_lose_alone(monkeypatch):
    """Against measuring every pair, within a factor of two and a half.

    In images of one colour neighbouring positions are alike, which the lost energies leave out:
    pairs judged by them are four times off.
    """
    net, images = decaying()
    images = images[:, :, :1, :1].expand(-1, -1, 6, 6).contiguous()
    space = Space(net, images, AllowedRanks(step=3, equal=False, exclude=("0",), kinds=("conv",)))
    found = space.gather(images)
    probes = {name for name in found.measured["2"] if name != "dense"}
    assert len(probes) <= 2 * (evidence_module.CANDIDATES + 1)
    monkeypatch.setattr(evidence_module, "CANDIDATES", 99)  # so that none is interpolated
    every = space.gather(images).added["2"]
    assert len(every) > 3 * len(probes)
    for name, rank in space.candidates["2"].items():
        if rank is not None:
            ratio = max(found.added["2"][name], 1e-5) / max(every[name], 1e-5)
            assert 0.4 < ratio < 2.5, name


def test_more_rank_on_one_side_is_never_taken_for_worse(net, images):
    space = Space(net, images, AllowedRanks(step=1, equal=False))
    found = space.gather(images)
    for layer, row in space.candidates.items():
        assert list(found.losses[layer]) == list(row)
        assert all(np.isfinite(values).all() for values in found.losses[layer].values())
    added = found.added["body.0"]
    assert added["r4x3"] <= added["r3"] + 1e-9
    assert added["r3"] <= added["r3x2"] + 1e-9


def test_lost_energy_is_that_of_the_leading_block_for_inputs_white_over_positions():
    """Against the squared error of every kernel of leading parts, computed outright."""
    torch.manual_seed(0)
    f, c = 4, 3
    conv = nn.Conv2d(c, f, 2, bias=False).double()
    rows = torch.randn(50, c, dtype=torch.float64) @ torch.randn(c, c, dtype=torch.float64)
    per_position = rows.T @ rows / 50
    s = torch.block_diag(*[per_position] * 4)  # positions slowest
    spec = LayerSpec.of("0", conv, ((1, c, 5, 5),))

    def flat(kernel):
        return kernel.flatten(2).permute(0, 2, 1).flatten(1)

    w = flat(conv.weight.detach())
    outputs = w @ s @ w.T
    found = lost_energies(spec, conv.weight, 4 * per_position, outputs)
    whole = nested_factors(
        conv.weight.detach()[None], 4 * per_position[None], outputs[None], (f, c)
    )
    out, core, inn = (factor[0] for factor in whole)
    for r1 in range(1, f + 1):
        for r2 in range(1, c + 1):
            kernel = reconstruct(Tucker2(out[:, :r1], core[:r1, :r2], inn[:r2]))
            left = w - flat(kernel)
            expected = float((left @ s @ left.T).trace() / outputs.trace())
            assert float(found[r1 - 1, r2 - 1]) == pytest.approx(expected, abs=1e-9)


def test_lost_energy_of_a_matrix_is_the_tail_of_its_spectrum(images):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 8))
    specs = {"1": LayerSpec.of("1", net[1], ((64, 192),))}
    inputs, outputs = channel_moments(net, specs, images, shrinkage=0)["1"]
    assert inputs is None
    found = lost_energies(specs["1"], net[1].weight, inputs, outputs).diagonal()
    x = images.flatten(1).double() @ net[1].weight.detach().double().T
    values = torch.linalg.svdvals(x).square()
    expected = 1 - values.cumsum(0) / values.sum()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("number", "warned"), [(6, True), (256, False)])
def test_too_few_images_are_a_warning_with_the_numbers(net, number, warned, caplog):
    images = torch.randn(number, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    net.head.weight.data *= 30  # so that outputs differ as those of a trained network do
    space = Space(net.eval(), images)
    found, choice = space.gather(images), {"stem": "dense", "body.0": "r6", "point": "r4"}
    choice = {layer: choice[layer] for layer in space.candidates}
    with caplog.at_level(logging.INFO, "nni_haloc"):
        evidence_module.check_enough_images(
            found, net, space.candidates, choice, space.build, images
        )
    lines = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert bool(lines) == warned
    if warned:
        assert lines[0].startswith("6 calibration images are few: the outputs move by ")
        assert "calibration_images" in lines[0]


def test_the_divergence_beyond_the_fit_is_that_of_a_network_fitted_to_the_other_half(net, images):
    net = net.eval()
    space = Space(net, images)
    choice = {layer: list(row)[-1] for layer, row in space.candidates.items()}
    chosen = {layer: {name: space.candidates[layer][name]} for layer, name in choice.items()}
    within, beyond = divergence_within_and_beyond(net, chosen, space.build, images)
    expected = {True: 0.0, False: 0.0}
    halves = [images[::2], images[1::2]]
    with torch.no_grad():
        for i, fitted in enumerate(halves):
            network = copy.deepcopy(net)
            built = build_candidates(net, space.layers.specs, chosen, fitted)
            replace_modules(network, {layer: row[choice[layer]] for layer, row in built.items()})
            for j, seen in enumerate(halves):
                p, log_q = net(seen).softmax(1), network(seen).log_softmax(1)
                expected[i == j] += float((p * (p.log() - log_q)).sum(1).mean()) / 2
    assert within == pytest.approx(expected[True], rel=1e-4)
    assert beyond == pytest.approx(expected[False], rel=1e-4)


def test_too_few_images_to_measure_at_all_are_refused(net, images):
    space = Space(net, images)
    with pytest.raises(ValueError, match="^calibration images: expected at least 4 .*, found 3; "):
        space.gather(images[:3])


def test_outputs_with_a_place_for_each_pixel_are_compared_pixel_by_pixel(net, images):
    """The divergence is the mean over the pixels, in float64, against the definition."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)).double()
    images = images.double()
    space = Space(net.eval(), images, AllowedRanks(kinds=("conv", "pointwise")))
    modules = space.build(space.candidates, images)
    found = added_losses(net, modules, images)
    for layer, row in modules.items():
        for name, module in row.items():
            network = copy.deepcopy(net)
            replace_modules(network, {layer: module.double()})
            with torch.no_grad():
                p, log_q = net(images).softmax(1), network(images).log_softmax(1)
            expected = (p * (p.log() - log_q)).sum(1).mean((1, 2))
            np.testing.assert_allclose(found[layer][name], expected.numpy(), atol=1e-6)
    assert all(values.shape == (64,) for row in space.gather(images).losses.values()
               for values in row.values())  # fmt: skip


def test_a_single_output_is_the_logit_of_a_probability(images):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 1)).double()
    space = Space(net.eval(), images.double())
    modules = space.build(space.candidates, images.double())
    found = added_losses(net, modules, images.double())["0"]
    for name, module in modules["0"].items():
        network = copy.deepcopy(net)
        replace_modules(network, {"0": module.double()})
        with torch.no_grad():
            p, q = net(images.double()).sigmoid()[:, 0], network(images.double()).sigmoid()[:, 0]
        expected = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        np.testing.assert_allclose(found[name], expected.numpy(), atol=1e-9)
    assert any(values.mean() > 1e-6 for values in found.values())


class Named(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.conv, self.form = nn.Conv2d(3, 8, 3), form

    def forward(self, x):
        y = self.conv(x).mean((1, 2, 3))
        return {"dict": {"logits": y}, "vector": y}[self.form]


@pytest.mark.parametrize("form", ["dict", "vector"])
def test_outputs_that_cannot_be_compared_are_refused(images, form):
    space = Space(Named(form).eval(), images)
    with pytest.raises(ValueError, match=r"^the network's output: expected logits .*, found "):
        space.gather(images)


def test_equal_outputs_are_as_far_away_as_the_entropy_is_below_that_of_a_guess(net, images):
    net = net.eval()
    with torch.no_grad():
        shares = net(images).double().softmax(1).numpy()
    expected = np.log(shares.shape[1]) + (shares * np.log(shares)).sum(1).mean()
    assert divergence_of_equal_outputs(net, images) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("wrecked", [True, False])
def test_a_network_that_only_guesses_is_a_warning_with_the_scale(net, wrecked, caplog):
    images = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    net.head.weight.data *= 30
    space = Space(net.eval(), images)
    choice = {layer: list(row)[-1] for layer, row in space.candidates.items()}
    found = space.gather(images)

    def build(candidates, some):
        built = space.build(candidates, some)
        for row in built.values():
            for weight in (p for module in row.values() for p in module.parameters()):
                weight.data *= -10 if wrecked else 1
        return built

    with caplog.at_level(logging.INFO, "nni_haloc"):
        evidence_module.check_enough_images(found, net, space.candidates, choice, build, images)
    equal = divergence_of_equal_outputs(net, images)
    scale = f"a network that only guesses is {equal:.3g} away"
    assert any(line.endswith(scale) for line in caplog.messages)
    told = [line for line in caplog.messages if "knows no more than a guess" in line]
    assert bool(told) == wrecked
