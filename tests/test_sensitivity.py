"""What each candidate alone adds to the loss, against replacing it by hand."""

import copy

import pytest
import torch

from nni_haloc.candidates import build_candidates
from nni_haloc.ranks import RankRules, find_layers
from nni_haloc.sensitivity import loss, sensitivities


@pytest.fixture
def modules(net, images):
    layers = find_layers(net, images[:1])
    return build_candidates(net, layers.specs, layers.candidates(RankRules()), images)


def by_hand(network, images, labels):
    """Mean of ``-log softmax`` image by image, in float64."""
    network = copy.deepcopy(network).double().eval()
    with torch.no_grad():
        logits = torch.cat([network(image[None].double()) for image in images])
    return float(-logits.log_softmax(1)[range(len(labels)), labels].mean())


def test_the_loss_is_the_mean_over_all_images_whatever_the_batches(net, images, labels):
    expected = by_hand(net, images, labels)
    for batch_size in (1, 7, 64, 1000):
        assert loss(net, images, labels, batch_size) == pytest.approx(expected, rel=1e-5)


def test_each_candidate_is_put_alone_into_the_original(net, modules, images, labels):
    """Every candidate of every layer, in a network made by hand from the original; what was tried before leaves no trace."""
    assert {layer: len(row) for layer, row in modules.items()} == {"stem": 2, "body.0": 4, "point": 3}
    before = copy.deepcopy(net.state_dict())
    found = sensitivities(net.train(), modules, images, labels, batch_size=24)
    assert net.training
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    original = by_hand(net, images, labels)
    for layer, row in modules.items():
        assert list(found[layer]) == list(row)
        for name, module in row.items():
            replaced = copy.deepcopy(net)
            parent, _, child = layer.rpartition(".")
            setattr(replaced.get_submodule(parent), child, copy.deepcopy(module))
            assert found[layer][name] == pytest.approx(by_hand(replaced, images, labels) - original, abs=2e-6), (layer, name)


def test_one_pass_a_candidate_and_one_for_the_original(net, modules, images, labels):
    """The classifier is no candidate: it runs once in every pass."""
    calls = []
    net.head.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    sensitivities(net, modules, images, labels)
    assert calls == [64] * (1 + sum(map(len, modules.values())))
