"""Candidates of a trained network: the covariance against explicit patches, weights, aliases."""

import copy

import pytest
import torch
from helpers.host_copies import waits
from torch import nn

from nni_haloc.inputs.models import build_model
from nni_haloc.search.space import RankSpace
from nni_haloc.space import candidates, covariances
from nni_haloc.space.candidates import build_candidates
from nni_haloc.space.covariances import _draw_patches, patch_covariances
from nni_haloc.space.layers import LayerSpec, TuckerConv2d
from nni_haloc.space.modules import replace_modules
from nni_haloc.space.ranks import AllowedRanks, find_layers
from nni_haloc.space.reduced_rank import _cholesky
from nni_haloc.space.tucker import decompose, output_error, reconstruct
from nni_haloc.utils.placement import working_on


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
def test_the_covariance_reproduces_the_layers_output_energy(mode, device):
    """For any kernel, E||W x||^2 over the patches is the mean square of the output.

    There is no unfolding in the oracle.
    """
    torch.manual_seed(0)
    conv = nn.Conv2d(5, 7, 3, stride=2, padding=1, dilation=2, padding_mode=mode, bias=False)
    images = torch.randn(10, 5, 9, 9)
    s = patch_covariances(
        nn.Sequential(conv),
        find_layers(nn.Sequential(conv), images, AllowedRanks(step=1)).specs,
        images,
        batch_size=3,
        shrinkage=0,
    )["0"]
    assert s.device.type == device.type
    w = conv.weight.detach().double().flatten(1)
    energy = conv(images).detach().double().pow(2).mean((0, 2, 3)).sum()
    torch.testing.assert_close(((w @ s.double().cpu()) * w).sum(), energy, rtol=1e-4, atol=0)


def test_the_patches_are_the_same_on_every_device(device, images):
    """Of layers that are fed the images themselves; products are as precise as float32."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1))
    specs = find_layers(net, images, AllowedRanks(step=1)).specs
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # as in a run
    try:
        ours = patch_covariances(net, specs, images, max_patches=50)["0"].cpu()
    finally:
        torch.set_float32_matmul_precision(before)
    with working_on("cpu"):
        expected = patch_covariances(net.double(), specs, images.double(), max_patches=50)["0"]
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    assert all(p.device.type == "cpu" for p in net.parameters())


def test_patches_are_bounded_and_drawn_with_the_seed(net, images):
    specs = find_layers(net, images).specs
    few = patch_covariances(net, specs, images, max_patches=256, seed=1)
    again, other = (
        patch_covariances(net, specs, images, max_patches=256, seed=seed) for seed in (1, 2)
    )
    full = patch_covariances(net, specs, images)
    for name in specs:
        torch.testing.assert_close(few[name], again[name], rtol=0, atol=0)
        assert not torch.equal(few[name], other[name])
        assert (few[name] - full[name]).norm() < 0.6 * full[name].norm()


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
def test_drawn_patches_are_rows_of_the_unfolded_input(mode):
    """Oracle: `unfold` of the whole batch.

    Every patch is drawn once when all are asked for, and at most once otherwise.
    """
    conv = nn.Conv2d(
        5, 7, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(2, 1), padding_mode=mode
    )
    x = torch.randn(4, 5, 9, 8)
    spec = LayerSpec.of("0", conv, (tuple(x.shape),))
    columns = torch.nn.functional.unfold(spec.pad(x), (3, 2), (2, 1), 0, (2, 1))  # (N, C k1 k2, L)
    rows = columns.unflatten(1, (5, 6)).permute(0, 3, 2, 1).flatten(0, 1).flatten(1)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(_draw_patches(spec, x, 10**6, generator), rows)
    drawn = _draw_patches(spec, x.to(memory_format=torch.channels_last), 20, generator)
    matches = (drawn[:, None] == rows).all(-1)
    assert drawn.shape == (20, 30)
    assert matches.any(1).all()
    assert matches.sum(0).max() == 1


def test_only_the_patches_that_are_used_are_unfolded(net, images, monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "unfold", None)
    sizes, add = [], covariances._add_gram
    monkeypatch.setattr(
        covariances, "_add_gram", lambda total, rows: (sizes.append(rows.shape), add(total, rows))
    )
    specs = {n: s for n, s in find_layers(net, images).specs.items() if s.kind == "conv"}
    patch_covariances(net, specs, images, max_patches=10**9, max_work=1e6, batch_size=32)
    work = dict.fromkeys({d for _, d in sizes}, 0)
    for n, d in sizes:
        work[d] += n * d**2
    assert all(0.9e6 < done < 1.1e6 for done in work.values()), work


def test_a_gram_matrix_in_blocks_is_exact_above_the_diagonal():
    rows, total = torch.randn(20, 11), torch.zeros(11, 11)
    covariances._add_gram(total, rows, block=4)
    torch.testing.assert_close(total.triu(), (rows.T @ rows).triu())


def test_covariances_are_collected_in_groups_that_fit_the_memory(net, images, monkeypatch):
    """As many passes as needed and no more, and the same candidates whatever the grouping."""
    layers = find_layers(net, images)
    rows = layers.candidates(AllowedRanks())
    passes, collect = [], candidates.patch_covariances
    monkeypatch.setattr(
        candidates,
        "patch_covariances",
        lambda m, specs, x: (passes.append(list(specs)), collect(m, specs, x))[1],
    )
    sizes = {
        name: 4 * (s.in_channels * s.kernel_size[0] * s.kernel_size[1]) ** 2
        for name, s in layers.specs.items()
    }
    together = build_candidates(net, layers.specs, rows, images)
    assert passes == [list(rows)]
    passes.clear()
    one_by_one = build_candidates(net, layers.specs, rows, images, memory=max(sizes.values()) - 1)
    assert [name for group in passes for name in group] == list(rows)
    assert len(passes) > 1
    for group in passes:
        assert len(group) == 1 or sum(sizes[name] for name in group) < max(sizes.values())
    for name, row in together.items():
        for candidate, layer in row.items():
            for a, b in zip(
                layer.parameters(), one_by_one[name][candidate].parameters(), strict=True
            ):
                torch.testing.assert_close(a, b)


def test_layers_kept_plain_are_logged_from_one_decomposition(net, images, monkeypatch, caplog):
    """At full rank HOSVD is exact and stands; nothing is decomposed again to find that out."""
    calls, real = [], candidates.decompose_all
    monkeypatch.setattr(candidates, "decompose_all", lambda *a: (calls.append(a[1]), real(*a))[1])
    layers = find_layers(net, images)
    with caplog.at_level("INFO"):
        build_candidates(net, layers.specs, {"body.0": {"r4": (4, 4), "r12x8": (12, 8)}}, images)
    assert calls == [[(4, 4), (12, 8)]]
    assert "nothing better: body.0 (12, 8)" in caplog.text


class Repeating(nn.Module):
    """Three convolutions of one shape, one of another, two linear layers of one shape."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(3)))
        self.tail = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    def forward(self, x):
        return self.tail(self.body(self.stem(x).relu()).relu().mean((2, 3)))


@pytest.fixture
def repeating():
    torch.manual_seed(0)
    return Repeating().eval()


REPEATING = AllowedRanks(step=2, kinds=("conv", "linear"))


@pytest.mark.parametrize("method", ["data", "warm_hooi", "hosvd", "hooi"])
def test_layers_of_one_shape_are_decomposed_in_one_call_and_come_home(
    repeating, images, monkeypatch, method, device
):
    """Oracle: each layer decomposed on its own, on the processor."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    layers, calls = find_layers(repeating, images, REPEATING), []
    rows, before = layers.candidates(REPEATING), copy.deepcopy(repeating.state_dict())
    monkeypatch.setattr(
        candidates,
        "decompose_all",
        lambda *a, real=candidates.decompose_all: (calls.append(a[0]), real(*a))[1],
    )
    built = build_candidates(repeating, layers.specs, rows, images, method)
    assert sorted(weights.shape[0] for weights in calls) == [1, 2, 3]
    assert all(weights.device.type == device.type for weights in calls)
    assert list(built) == list(rows)
    for key, value in repeating.state_dict().items():
        assert torch.equal(value, before[key])
    with working_on("cpu"):
        covariances = patch_covariances(repeating, layers.specs, images)
    for name, row in rows.items():
        weight, ranks = repeating.get_submodule(name).weight, [r for r in row.values() if r]
        alone = dict(zip(ranks, decompose(weight, ranks, method, covariances[name]), strict=True))
        assert list(built[name]) == list(row)
        for candidate, rank in row.items():
            module = built[name][candidate]
            assert all(p.device.type == "cpu" for p in module.parameters())
            found = module.weight if rank is None else reconstruct(module.factors())
            expected = weight if rank is None else reconstruct(alone[rank]).to(weight)
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_candidates_of_a_network_on_a_device_are_there_too(repeating, images, device):
    network = repeating.to(device, memory_format=torch.channels_last)
    layers = find_layers(network, images.to(device), REPEATING)
    rows = {"body.1": {"r4": (4, 4), "dense": None}}
    for calibration in (images, images.to(device), None):
        for module in build_candidates(network, layers.specs, rows, calibration)["body.1"].values():
            assert all(p.device == network.stem.weight.device for p in module.parameters())
            kernels = [p for p in module.parameters() if p.dim() == 4]
            assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)


def test_the_device_is_waited_for_no_more_often_for_more_ranks(repeating, images, device):
    layers, numbers = find_layers(repeating, images, REPEATING), set()
    rows = layers.candidates(REPEATING)
    last = {name: dict(list(row.items())[-1:]) for name, row in rows.items()}
    for some in (last, rows):
        with waits() as found:
            build_candidates(repeating, layers.specs, some, images.to(device))
        numbers.add(len(found))
    assert len(numbers) == 1, numbers


def test_of_several_layers_the_one_that_fails_is_named(repeating, images, monkeypatch):
    bad, real = repeating.body[1].weight.detach(), torch.linalg.eigh

    def fails(x):
        if x.shape[1:] == gram.shape and any(torch.allclose(each, gram) for each in x):
            raise torch.linalg.LinAlgError("linalg.eigh: did not converge")
        return real(x)

    gram = bad.double().flatten(1) @ bad.double().flatten(1).T
    layers = find_layers(repeating, images, REPEATING)
    rows = layers.candidates(REPEATING)
    monkeypatch.setattr(torch.linalg, "eigh", fails)
    with pytest.raises(ValueError, match=r"^layer 'body.1': .* \(linalg.eigh: did not converge\)$"):
        build_candidates(repeating, layers.specs, rows, None, "hosvd")


def test_without_images_the_default_is_the_warm_started_iteration(net, images):
    layers = find_layers(net, images)
    layer = build_candidates(net, layers.specs, {"body.0": {"r4": (4, 4)}})["body.0"]["r4"]
    expected = decompose(net.body[0].weight, [(4, 4)], "warm_hooi")[0]
    torch.testing.assert_close(reconstruct(layer.factors()), reconstruct(expected))


def test_what_is_fitted_to_few_patches_holds_for_others():
    """Shrinkage lowers the output error on other images.

    There are a quarter as many patches as a patch has numbers.
    """
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(8, 8, generator=generator) * 2.0 ** -torch.arange(8)[:, None]
    images = torch.einsum("nchw,cd->ndhw", torch.randn(40, 8, 10, 10, generator=generator), mixing)
    conv = nn.Conv2d(8, 8, 3, bias=False)
    conv.weight.data = torch.randn(8, 8, 3, 3, generator=generator)
    specs = find_layers(nn.Sequential(conv), images, AllowedRanks(step=1)).specs
    truth = patch_covariances(nn.Sequential(conv), specs, images[20:], shrinkage=0)["0"]
    exact, shrunk = (
        patch_covariances(
            nn.Sequential(conv), specs, images[:20], max_patches=18, shrinkage=shrinkage
        )["0"]
        for shrinkage in (0, 0.3)
    )
    torch.testing.assert_close(shrunk, exact + 0.3 * 72 / 18 * exact.trace() / 72 * torch.eye(72))
    errors = [
        output_error(
            conv.weight, reconstruct(decompose(conv.weight, [(4, 4)], "data", s)[0]), truth
        )
        for s in (exact, shrunk)
    ]
    assert errors[1] < 0.9 * errors[0]


def test_images_that_are_not_finite_are_refused(net, images):
    images[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="layer 'body.0'.*not finite"):
        patch_covariances(net, {"body.0": find_layers(net, images).specs["body.0"]}, images)


def test_by_the_data_the_output_is_closer_than_by_the_weights(net, images):
    layers = find_layers(net, images)
    rows = layers.candidates(AllowedRanks())
    modules = dict(net.named_modules())
    covariances = patch_covariances(net, layers.specs, images)
    by_data = build_candidates(net, layers.specs, rows, images)
    for name, row in rows.items():
        for candidate, rank in row.items():
            layer = by_data[name][candidate]
            if rank is None:
                assert torch.equal(layer.weight, modules[name].weight)
                assert layer.weight is not modules[name].weight
            elif len(rank) == 2:
                w = modules[name].weight
                ours = output_error(w, reconstruct(layer.factors()), covariances[name])
                assert (
                    ours
                    <= output_error(
                        w, reconstruct(decompose(w, [rank], "hosvd")[0]), covariances[name]
                    )
                    + 1e-4
                )  # stored in float32


def test_methods_need_what_they_need(net, images):
    specs = find_layers(net, images).specs
    with pytest.raises(ValueError, match="needs calibration images"):
        build_candidates(net, specs, {"body.0": {"r2": (2, 2)}}, None, "data")


def test_a_layer_under_two_names_is_replaced_under_both():
    model = nn.Module()
    model.a = model.b = nn.Conv2d(4, 4, 3)
    new = TuckerConv2d(
        find_layers(nn.Sequential(model.a), torch.randn(1, 4, 5, 5), AllowedRanks(step=1)).specs[
            "0"
        ],
        2,
        2,
    )
    replace_modules(model, {"a": new})
    assert model.a is new
    assert model.b is new


def test_a_network_without_values_has_candidates_without_values():
    with torch.device("meta"):
        model, x = build_model("resnet20"), torch.zeros(2, 3, 32, 32)
    space = RankSpace(model, x)
    network = space.freeze({layer: list(row)[-1] for layer, row in space.candidates.items()})
    assert all(p.is_meta for p in network.parameters())
    assert network.eval()(x).shape == (2, 10)


@pytest.mark.parametrize("method", ["data", "warm_hooi", "hosvd"])
def test_a_decomposition_that_fails_names_its_layer(net, images, monkeypatch, method):
    def fails(*_):
        raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge\nand more")

    layers = find_layers(net, images[:1], AllowedRanks())
    monkeypatch.setattr(torch.linalg, "eigh", fails)
    with pytest.raises(
        ValueError,
        match=rf"^layer 'stem': its decomposition by '{method}' failed "
        r"\(linalg.eigh: .* failed to converge\)$",
    ):
        build_candidates(net, layers.specs, layers.candidates(AllowedRanks()), images, method)


def test_a_covariance_that_no_ridge_helps_is_an_error_and_no_endless_loop():
    with pytest.raises(torch.linalg.LinAlgError, match="no ridge"):
        _cholesky(torch.full((3, 3), float("nan")))
