"""Searches of networks that return more than a tensor, take more than one, or checkpoint parts."""

import copy
import dataclasses
import functools
import types

import pytest
import torch
import torchvision
from helpers.networks import SmallNet
from helpers.searches import search
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset, default_collate

from nni_haloc.costs.counts import count_macs
from nni_haloc.inputs.models import build_model
from nni_haloc.inputs.weights import load_weights
from nni_haloc.plan.sensitivity import loss, sensitivities
from nni_haloc.runs.compress_model import compress_model
from nni_haloc.search.approach import FeatureMaps, first_images
from nni_haloc.search.evaluator import Classification
from nni_haloc.search.space import RankSpace
from nni_haloc.search.strategy import Haloc, run_search
from nni_haloc.space.modules import batch_size_of, batches, call
from nni_haloc.space.ranks import AllowedRanks
from nni_haloc.training.finetuning import accuracy, finetune, recalibrate
from nni_haloc.training.recipe import Recipe
from nni_haloc.utils.errors import HalocError

QUIET = {"enable_progress_bar": False}


@dataclasses.dataclass
class Result:
    features: torch.Tensor
    logits: torch.Tensor


FORMS = {
    "a dict": lambda y: {"features": y.flatten(1), "logits": y},
    "a tuple": lambda y: (y, y.flatten(1)),
    "a list": lambda y: [y, None],
    "a dataclass": lambda y: Result(y[:, :2], y),
    "an object": lambda y: types.SimpleNamespace(out=y),
}


class Returning(SmallNet):
    """Returns its logits in some form; in training mode perhaps in another, as torchvision's do."""

    def __init__(self, form, training=None):
        torch.manual_seed(0)
        super().__init__()
        self.form, self.other = form, training or form

    def forward(self, x):
        return (self.other if self.training else self.form)(super().forward(x))


def same(y):
    return y


@functools.cache
def figures_of(form, training=None):
    """What a search, its start, its plan and a fine-tuning give, to the last digit."""
    images = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(0, 4, (64,), generator=torch.Generator().manual_seed(2))
    data = DataLoader(TensorDataset(images, labels), 16)
    net = Returning(FORMS.get(form, same), FORMS.get(training))
    space = RankSpace(net, images[:1], calibration=images, nested=False)
    start = space.sensitivities(images[:16])
    strategy = search(net, images, (data, data), space=space, start=start)
    network = strategy.network()
    recalibrate(network, data, 2)
    top1 = accuracy(network, data)
    finetune(network, data, Recipe(1, 0.01), data, teacher=net, distill=0.5, **QUIET)
    direct = sensitivities(net, space.modules_by_layer, images[:8], labels[:8])
    figures = (start, direct, strategy.plan().names, top1, loss(network, images, labels))
    return figures, network.state_dict()


@pytest.mark.parametrize(
    ("form", "training"), [*((form, None) for form in FORMS), ("a tensor", "a tuple")]
)
def test_a_networks_form_of_output_changes_nothing(form, training):
    figures, state = figures_of(form, training)
    expected, theirs = figures_of("a tensor")
    assert figures == expected
    assert all(torch.equal(value, theirs[name]) for name, value in state.items())


@pytest.mark.filterwarnings("ignore:.*has shuffling enabled.*")
@pytest.mark.parametrize("epochs", [0, 1])
def test_compress_model_takes_any_form(loaders, epochs):
    net = Returning(FORMS["a dict"], FORMS["a tuple"])
    result = compress_model(
        net, *loaders, metric="macs", budget=0.7, epochs=epochs, calibration_images=32
    )
    assert isinstance(result.model(torch.randn(2, 3, 8, 8)), dict)


def test_an_output_without_logits_is_one_line(images, loaders):
    net = Returning(lambda y: {"a": y, "b": y})
    for attempt in (
        lambda: search(net, images, loaders),
        lambda: finetune(net, loaders[0], Recipe(1), **QUIET),
        lambda: accuracy(net, loaders[0]),
        lambda: RankSpace(net, images[:1], calibration=images).sensitivities(images[:8]),
    ):
        with pytest.raises(HalocError, match=r"^the network's output: expected .* dict with a, b$"):
            attempt()


@pytest.mark.parametrize("heads", [True, False])
def test_googlenet_is_searched_with_and_without_its_auxiliary_heads(tmp_path, heads):
    """Its weights are those of the network with heads, as they are published."""
    torch.manual_seed(0)
    trained = torchvision.models.googlenet(num_classes=3, init_weights=False, aux_logits=True)
    torch.save(trained.state_dict(), tmp_path / "googlenet.pth")
    net = build_model(
        "torchvision:googlenet", {"num_classes": 3, "init_weights": False, "aux_logits": heads}
    )
    load_weights(net, tmp_path / "googlenet.pth")
    images = torch.randn(8, 3, 32, 32)
    data = TensorDataset(images, torch.arange(8) % 3)
    allowed = AllowedRanks(step=64, exclude=("inception*", "conv1*"))
    strategy = search(
        net, images, (DataLoader(data), DataLoader(data)), 0.95, allowed=allowed, nested=True
    )
    network = strategy.network()
    assert {"conv2.conv", "conv3.conv"} >= set(strategy.mixed_layers)
    assert not torch.equal(network.fc.weight, net.fc.weight)
    assert hasattr(network.eval()(images), "argmax")
    finetune(network, DataLoader(data, 4), Recipe(1, 0.001), **QUIET)


class Listed(SmallNet):
    """Takes one image after another, or a dict of images."""

    def forward(self, x):
        if isinstance(x, dict):
            x = x["pixels"]["values"]
        return super().forward(torch.stack(tuple(x)) if isinstance(x, list) else x)


def listed(batch):
    return [image for image, _ in batch], torch.tensor([label for _, label in batch])


def nested(batch):
    x, y = default_collate(batch)
    return {"pixels": {"values": x}, "scale": 1.0, "rows": torch.ones(3)}, y


class Keyed(SmallNet):
    """Takes its images by name, as transformers do."""

    def forward(self, pixels=None, mask=None, training=True):
        return super().forward(pixels if mask is None else pixels * mask)


def keyed(batch):
    x, y = default_collate(batch)
    return {"pixels": x, "mask": torch.ones(len(x), 1, 1, 1)}, y


@pytest.mark.parametrize(
    ("kind", "collate", "share"),
    [(Listed, listed, 0.25), (Listed, nested, 0.25), (Listed, nested, 1.0), (Keyed, keyed, 0.25)],
)
def test_a_network_may_take_a_list_or_a_dict_of_images(loaders, kind, collate, share):
    torch.manual_seed(0)
    net, data = kind(), loaders[0].dataset
    example, _ = collate([data[0], data[1]])
    space = RankSpace(net, example, nested=False)
    train, val = (
        DataLoader(data, 16, collate_fn=collate, generator=torch.Generator().manual_seed(i))
        for i in (0, 1)
    )
    options = {"alpha_every": 1, "average": 0.0, "approach_share": share, "lam": 1.0}
    strategy = Haloc(space.costs, 0.5, **options)
    evaluator = Classification(train, val, Recipe(1, 0.01, schedule="constant"), **QUIET)
    run_search(space, evaluator, strategy)
    network = strategy.network()
    assert not torch.equal(network.head.weight, net.head.weight)
    recalibrate(network, train, 1)
    finetune(network, train, Recipe(1, 0.01), val, teacher=net, **QUIET)
    batches = [(call(network, x), y) for x, y in val]
    right = sum(int((logits.argmax(1) == y).sum()) for logits, y in batches)
    assert accuracy(network, val)[0] == pytest.approx(right / len(data))


def test_feature_maps_of_lists_and_dicts_are_those_of_the_tensor(images, loaders):
    """A dict is cut as a tensor is; of a list all images are compared."""
    torch.manual_seed(0)
    strategy = search(Listed(), images, loaders)
    layers, batch = list(strategy.mixed_layers.values()), [loaders[0].dataset[i] for i in range(8)]

    def terms_of(collate, share):
        maps = FeatureMaps(strategy.supernet, layers, strategy.supernet.original, share)
        with maps.compared() as terms:
            strategy.supernet(collate(batch)[0])
        return terms

    for share in (0.5, 1.0):
        expected = terms_of(default_collate, share)
        assert len(expected) == len(layers)
        torch.testing.assert_close(terms_of(nested, share), expected)
    torch.testing.assert_close(terms_of(listed, 0.5), expected)


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        ((torch.arange(8),), {}, ((4,), {})),
        ((), {"x": torch.arange(8), "n": 3}, ((), {"x": 4})),
        (({"x": torch.arange(8), "table": torch.zeros(3)},), {}, (({"x": 4, "table": 3},), {})),
        (([torch.zeros(3, 4, 4)] * 8,), {}, (([3] * 8,), {})),
        (({"images": [torch.zeros(8, 4)] * 2},), {}, (({"images": [8, 8]},), {})),
        ((types.SimpleNamespace(x=1),), {}, ((), {})),
        ((), {}, ((), {})),
    ],
)
def test_the_first_images_are_taken_where_it_is_clear_what_images_are(args, kwargs, expected):
    def sizes(value):
        if isinstance(value, torch.Tensor):
            return len(value)
        if isinstance(value, dict):
            return {k: sizes(v) for k, v in value.items() if sizes(v) is not None}
        return [sizes(v) for v in value] if isinstance(value, list) else None

    few, few_named = first_images(args, kwargs, 0.5)
    assert tuple(s for s in map(sizes, few) if s is not None) == expected[0]
    assert sizes(dict(few_named)) == expected[1]


class Growing(SmallNet):
    """Pads what its body gets in training mode alone."""

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = self.body(nn.functional.pad(x, (2, 2)) if self.training else x)
        return self.head((x + self.act(self.point(x))).mean((2, 3)))


def test_layers_that_cannot_be_compared_are_one_warning(images, loaders, caplog, monkeypatch):
    monkeypatch.setattr("nni_haloc.utils.log.logger.propagate", True)
    torch.manual_seed(0)
    search(Growing(), images, loaders, lam=1.0)
    (line,) = (r.getMessage() for r in caplog.records if r.levelname == "WARNING")
    assert line.startswith("search.lam: the outputs of 2 layers (body.0, ...) have no counterparts")


class Checkpointed(SmallNet):
    """Runs its middle again in the backward pass."""

    def __init__(self, reentrant):
        torch.manual_seed(0)
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        if self.reentrant is not None and torch.is_grad_enabled():
            x = checkpoint(self.body, x, use_reentrant=self.reentrant)
        else:
            x = self.body(x)
        return self.head((x + self.act(self.point(x))).mean((2, 3)))


def test_checkpoints_that_are_not_reentrant_change_nothing(images, loaders):
    networks = []
    for reentrant in (None, False):
        train, val = (
            DataLoader(x.dataset, 16, shuffle=True, generator=torch.Generator().manual_seed(3))
            for x in loaders
        )
        net = Checkpointed(reentrant)
        strategy = search(net, images, (train, val), lam=1.0)
        networks.append((strategy.plan().names, strategy.network()))
    (plan, plain), (other_plan, other) = networks
    assert plan == other_plan
    for (name, value), theirs in zip(plain.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(value, theirs, msg=name)


def test_reentrant_checkpoints_are_one_line_with_the_remedy(images, loaders):
    net = Checkpointed(True)
    for warmup in (0, 1):
        with pytest.raises(HalocError, match=r"^the network uses reentrant .*use_reentrant=False"):
            search(net, images, loaders, warmup_epochs=warmup)
    with pytest.raises(HalocError, match="feature_weight"):
        finetune(
            net, loaders[0], Recipe(1), teacher=net, layers=["body.0"], feature_weight=1.0, **QUIET
        )
    before = copy.deepcopy(net.state_dict())
    finetune(net, loaders[0], Recipe(1, 0.01), teacher=net, **QUIET)  # plain training works
    assert not torch.equal(net.body[0].weight, before["body.0.weight"])


@pytest.mark.parametrize(
    ("example", "number"),
    [
        ([torch.zeros(3, 4, 4)] * 5, 5),
        (([torch.zeros(3, 4, 4)] * 5,), 5),
        ({"images": [torch.zeros(7)] * 5}, 5),
        ([torch.zeros(5, 3, 4, 4)] * 2, 5),
        ([torch.zeros(5, 7), torch.zeros(5, 2)], 5),
        ((torch.zeros(5, 3, 4), torch.zeros(5, 3, 4)), 5),
    ],
)
def test_a_list_holds_images_or_batches(example, number):
    assert batch_size_of(example) == number
    parts = list(batches(example, 2))
    assert [batch_size_of(part) for part in parts] == [2, 2, 1]


def test_macs_of_a_list_of_images_are_those_of_one_image():
    torch.manual_seed(0)
    net = Listed()
    images = torch.randn(5, 3, 8, 8)
    assert count_macs(net, list(images)) == count_macs(net, images)
