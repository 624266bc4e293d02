"""Candidates that share one set of factors, against closed forms in float64."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nni_haloc.search.space import RankSpace
from nni_haloc.space.candidates import build_nested_candidates
from nni_haloc.space.covariances import channel_moments, patch_covariances
from nni_haloc.space.layers import LayerSpec, kernel_factors
from nni_haloc.space.nested import NestedLayer, balanced, leading, nested_factors
from nni_haloc.space.ranks import AllowedRanks, find_layers
from nni_haloc.space.tucker import LowRank, Tucker2, output_error, reconstruct


def moments_of(rows, size):
    """Return moments that data of a given shape might have."""
    x = torch.randn(rows, size, dtype=torch.float64) @ torch.randn(size, size, dtype=torch.float64)
    return x.T @ x / rows


@settings(deadline=None, max_examples=20)
@given(f=st.integers(2, 9), c=st.integers(2, 9), k=st.integers(1, 3), seed=st.integers(0, 99))
def test_at_full_rank_the_product_is_the_kernel(f, c, k, seed):
    torch.manual_seed(seed)
    kernel = torch.randn(2, f, c, k, k, dtype=torch.float64)
    inputs, outputs = (torch.stack([moments_of(50, n) for _ in range(2)]) for n in (c, f))
    for i, factors in enumerate(zip(*nested_factors(kernel, inputs, outputs, (f, c)), strict=True)):
        torch.testing.assert_close(reconstruct(Tucker2(*factors)), kernel[i], rtol=1e-6, atol=1e-6)
    matrix = kernel[..., 0, 0]
    factors = nested_factors(matrix, inputs, outputs, (f,))
    torch.testing.assert_close(factors.left @ factors.right, matrix, rtol=1e-6, atol=1e-6)


def test_cutting_input_coordinates_leaves_the_least_squares_coefficients_of_the_rest():
    """For inputs that are white over the positions, whatever their covariance over channels."""
    torch.manual_seed(0)
    f, c, k, r = 6, 5, 4, 3
    kernel, per_position = torch.randn(f, c, 2, 2, dtype=torch.float64), moments_of(50, c)
    s = torch.block_diag(*[per_position] * k)  # positions slowest
    rows = kernel.flatten(2).permute(0, 2, 1).flatten(1)
    outputs = rows @ s @ rows.T
    whole = nested_factors(kernel[None], k * per_position[None], outputs[None], (f, c))
    out, core, inn = leading(Tucker2(*(factor[0] for factor in whole)), (f, r))
    a = torch.block_diag(*[inn] * k)  # of all positions
    best = rows @ s @ a.T @ torch.linalg.inv(a @ s @ a.T)
    found = (out @ core.flatten(1)).reshape(f, r, k).permute(0, 2, 1).flatten(1)
    torch.testing.assert_close(found, best)


def test_a_matrix_has_the_optimal_error_at_every_rank():
    torch.manual_seed(0)
    weight, s = torch.randn(7, 5, dtype=torch.float64), moments_of(50, 5)
    whole = nested_factors(weight[None], s[None], (weight @ s @ weight.T)[None], (5,))
    values = torch.linalg.svdvals(weight @ torch.linalg.cholesky(s)).square()
    for r in range(1, 6):
        left, right = leading(LowRank(*(factor[0] for factor in whole)), (r,))
        lost = values[r:].sum() / values.sum()
        assert output_error(weight, left @ right, s) ** 2 == pytest.approx(float(lost), abs=1e-12)


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_channel_moments_are_sums_of_the_patch_covariance(mode):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, stride=2, padding=1, padding_mode=mode)
    net, images = nn.Sequential(conv), torch.randn(6, 3, 9, 9)
    specs = {"0": LayerSpec.of("0", conv, ((6, 3, 9, 9),))}
    inputs, outputs = channel_moments(net, specs, images, batch_size=4)["0"]
    s = patch_covariances(net, specs, images, shrinkage=0)["0"].double()
    by_position = s.reshape(3, 9, 3, 9).diagonal(dim1=1, dim2=3).sum(-1)
    number = 6 * 5 * 5
    added = 0.3 * 3 / number * by_position.diagonal().mean()
    torch.testing.assert_close(inputs, by_position + added * torch.eye(3), rtol=1e-4, atol=1e-5)
    w = conv.weight.detach().double().flatten(1)
    expected = w @ s @ w.T + added / 9 * (w @ w.T)
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [(4, 3), (5,)])
def test_balanced_factors_have_the_same_product(rank):
    torch.manual_seed(0)
    if len(rank) == 2:
        factors = Tucker2(torch.randn(9, 4), torch.randn(4, 3, 3, 3), 1e3 * torch.randn(3, 8))
        even = balanced(factors)
        torch.testing.assert_close(even.factor_in @ even.factor_in.T, torch.eye(3).double())
        torch.testing.assert_close(even.factor_out.T @ even.factor_out, torch.eye(4).double())
    else:
        factors = LowRank(torch.randn(9, 5), 1e3 * torch.randn(5, 8))
        even = balanced(factors)
        torch.testing.assert_close(even.left.norm(dim=0), even.right.norm(dim=1))
    type_ = type(factors)
    expected = reconstruct(type_(*(value.double() for value in factors)))
    torch.testing.assert_close(reconstruct(even), expected)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 8, 1),
        nn.Flatten(),
        nn.Linear(8 * 16, 10),
    )


IMAGES = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))
EVERY = AllowedRanks(step=2, equal=False, kinds=("conv", "pointwise", "linear"))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_candidate_runs_the_product_of_its_factors(net, layout):
    net = net.to(memory_format=layout)
    layers = find_layers(net, IMAGES, EVERY)
    rows = layers.candidates(EVERY)
    built = build_nested_candidates(net, layers.specs, rows, IMAGES)
    inputs = {}
    for name in rows:
        net[int(name)].register_forward_hook(
            lambda _, args, __, name=name: inputs.update({name: args[0]})
        )
    with torch.no_grad():
        net(IMAGES.contiguous(memory_format=layout))
        for name, row in built.items():
            spec, x = layers.specs[name], inputs[name]
            for candidate, module in row.items():
                factors = kernel_factors(module)
                kernel = factors[0] if candidate == "dense" else reconstruct(module.factors())
                bias = module.bias if candidate == "dense" else module.output_bias
                expected = spec.run(x, kernel, bias)
                torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
                if isinstance(module, NestedLayer):
                    alone = module.alone()
                    torch.testing.assert_close(alone(x), expected, rtol=1e-4, atol=1e-5)
                    assert alone(x).stride() == module(x).stride() == row["dense"](x).stride()


def test_all_low_ranks_of_a_layer_share_one_set_of_weights(net):
    """The space holds the dense layers and the largest rank's factors, and nothing else."""
    space = RankSpace(net, IMAGES[:2], allowed=EVERY, calibration=IMAGES, nested=True)
    most = 0
    for name, row in space.candidates.items():
        spec = space.specs[name]
        ranks = [rank for rank in row.values() if rank is not None]
        largest = tuple(max(each) for each in zip(*ranks, strict=True))
        most += sum(inputs * outputs * k for inputs, outputs, k in spec.parts(largest))
        most += spec.out_channels * bool(spec.bias)
    own = sum(p.numel() for p in net.parameters())
    assert sum(p.numel() for p in space.model.parameters()) == own + most


def test_the_frozen_network_has_weights_of_its_own_and_computes_the_same(net):
    space = RankSpace(net, IMAGES[:2], allowed=EVERY, calibration=IMAGES, nested=True)
    plan = {name: list(row)[-2] for name, row in space.candidates.items()}
    frozen = space.freeze(plan).eval()
    modules = copy.deepcopy(space.original)
    for name, candidate in plan.items():
        modules[int(name)] = space.modules_by_layer[name][candidate]
    with torch.no_grad():
        torch.testing.assert_close(frozen(IMAGES), modules(IMAGES), rtol=1e-4, atol=1e-4)
    shared = {id(p) for p in space.parameters()}
    assert not any(isinstance(m, NestedLayer) or id(m) in shared for m in frozen.modules())
    assert not shared & {id(p) for p in frozen.parameters()}


def test_the_frozen_networks_outer_factors_are_orthonormal(net):
    """So that they train well: the core has all of the scale."""
    space = RankSpace(net, IMAGES[:2], allowed=EVERY, calibration=IMAGES, nested=True)
    plan = {name: list(row)[-2] for name, row in space.candidates.items()}
    frozen = space.freeze(plan)
    found = [
        kernel_factors(frozen.get_submodule(name))
        for name in plan
        if space.specs[name].kind == "conv"
    ]
    assert found
    for out, _, inn in found:
        for factor in (out.flatten(1).T, inn.flatten(1)):  # rows are directions
            gram = factor.detach() @ factor.detach().T
            torch.testing.assert_close(gram, torch.eye(len(gram)), rtol=0, atol=1e-5)


def test_data_decides_which_directions_come_first(net):
    """Against the bases of the weights alone, on uniform ranks: the error is smaller."""
    layers = find_layers(net, IMAGES, EVERY)
    specs = {name: layers.specs[name] for name in ("0", "2")}
    rows = {name: {"r2": (2, 2), "r4": (4, 3)} for name in specs}
    covariances = patch_covariances(net, specs, IMAGES)
    errors = []
    for images in (None, IMAGES):
        built = build_nested_candidates(net, specs, rows, images)
        errors.append(
            [
                output_error(net[int(n)].weight, reconstruct(m.factors()), covariances[n])
                for n, row in built.items()
                for m in row.values()
            ]
        )
    assert sum(errors[1]) < sum(errors[0])


@pytest.mark.parametrize("nested", [False, True])
def test_a_delivered_network_can_be_scripted(net, nested):
    """TorchScript compiles the properties of a class, too."""
    space = RankSpace(net, IMAGES[:2], allowed=EVERY, calibration=IMAGES, nested=nested)
    frozen = space.freeze({name: list(row)[-1] for name, row in space.candidates.items()}).eval()
    scripted = torch.jit.script(frozen)
    with torch.no_grad():
        torch.testing.assert_close(scripted(IMAGES), frozen(IMAGES))


def test_a_network_of_double_precision_keeps_it(net):
    space = RankSpace(net.double(), IMAGES[:2].double(), allowed=EVERY, nested=True)
    plan = {name: list(row)[-1] for name, row in space.candidates.items()}
    frozen, modules = space.freeze(plan).eval(), copy.deepcopy(space.original)
    for name, candidate in plan.items():
        modules[int(name)] = space.modules_by_layer[name][candidate]
    with torch.no_grad():
        x = IMAGES.double()
        torch.testing.assert_close(frozen(x), modules(x), rtol=1e-12, atol=1e-12)
