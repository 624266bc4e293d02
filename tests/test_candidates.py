"""Candidates made from a trained network: the covariance against explicit patches, weights, aliases."""

import pytest
import torch
from torch import nn

from nni_haloc.candidates import build_candidates, patch_covariances, replace_modules
from nni_haloc.layers import TuckerConv2d
from nni_haloc.ranks import RankRules, find_layers
from nni_haloc.tucker import hosvd, output_error, reconstruct


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
def test_the_covariance_reproduces_the_layers_output_energy(mode):
    """For any kernel, E||W x||^2 over the patches is the mean square of the convolution's output; no unfolding in the oracle."""
    torch.manual_seed(0)
    conv = nn.Conv2d(5, 7, 3, stride=2, padding=1, dilation=2, padding_mode=mode, bias=False)
    images = torch.randn(10, 5, 9, 9)
    s = patch_covariances(nn.Sequential(conv), find_layers(nn.Sequential(conv), images, RankRules(step=1)).specs, images, batch_size=3)["0"]
    w = conv.weight.detach().double().flatten(1)
    energy = conv(images).detach().double().pow(2).mean((0, 2, 3)).sum()
    torch.testing.assert_close(((w @ s) * w).sum(), energy, rtol=1e-4, atol=0)


def test_patches_are_bounded_and_drawn_with_the_seed(net, images):
    specs = find_layers(net, images).specs
    few = patch_covariances(net, specs, images, max_patches=256, seed=1)
    again, other = (patch_covariances(net, specs, images, max_patches=256, seed=seed) for seed in (1, 2))
    full = patch_covariances(net, specs, images)
    for name in specs:
        torch.testing.assert_close(few[name], again[name], rtol=0, atol=0)
        assert not torch.equal(few[name], other[name])
        assert (few[name] - full[name]).norm() < 0.6 * full[name].norm()


def test_only_one_image_is_unfolded_at_a_time(net, images, monkeypatch):
    unfold, sizes = torch.nn.functional.unfold, []
    monkeypatch.setattr(torch.nn.functional, "unfold", lambda x, *args, **kwargs: (sizes.append(len(x)), unfold(x, *args, **kwargs))[1])
    patch_covariances(net, find_layers(net, images).specs, images)
    assert set(sizes) == {1}


def test_images_that_are_not_finite_are_refused(net, images):
    images[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="layer 'body.0'.*not finite"):
        patch_covariances(net, {"body.0": find_layers(net, images).specs["body.0"]}, images)


def test_by_the_data_the_output_is_closer_than_by_the_weights(net, images):
    layers = find_layers(net, images)
    candidates = layers.candidates(RankRules())
    modules = dict(net.named_modules())
    covariances = patch_covariances(net, layers.specs, images)
    by_data = build_candidates(net, layers.specs, candidates, images)
    for name, row in candidates.items():
        for candidate, rank in row.items():
            layer = by_data[name][candidate]
            if rank is None:
                assert torch.equal(layer.weight, modules[name].weight)
                assert layer.weight is not modules[name].weight
            elif len(rank) == 2:
                w = modules[name].weight
                ours = output_error(w, reconstruct(layer.factors()), covariances[name])
                assert ours <= output_error(w, reconstruct(hosvd(w, [rank])[0]), covariances[name]) + 1e-4  # stored in float32


def test_methods_need_what_they_need(net, images):
    specs = find_layers(net, images).specs
    with pytest.raises(ValueError, match="needs calibration images"):
        build_candidates(net, specs, {"body.0": {"r2": (2, 2)}}, None, "data")


def test_a_layer_under_two_names_is_replaced_under_both():
    model = nn.Module()
    model.a = model.b = nn.Conv2d(4, 4, 3)
    new = TuckerConv2d(find_layers(nn.Sequential(model.a), torch.randn(1, 4, 5, 5), RankRules(step=1)).specs["0"], 2, 2)
    replace_modules(model, {"a": new})
    assert model.a is new
    assert model.b is new
