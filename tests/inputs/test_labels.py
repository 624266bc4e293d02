"""Labels that are no classes of the outputs are one line, wherever they are used."""

import copy

import numpy as np
import pytest
import torch
from helpers.host_copies import no_waits_on
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import nni_haloc
from nni_haloc import DataError, Haloc, RankSpace, Recipe
from nni_haloc.chain.pruning import prune
from nni_haloc.inputs.labels import IGNORED, LabelCheck, check_labels
from nni_haloc.plan.sensitivity import added_losses

IMAGES = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
CLASSES = torch.arange(16) % 4
ONE_HOT = torch.eye(4)[CLASSES]
SEVERAL = (torch.arange(64) % 3 == 0).long().reshape(16, 4)

WRONG = {
    "a yes or no by one output": (
        (IMAGES.mean((1, 2, 3)) > 0.5).float()[:, None],
        1,
        "expected a network with an output for each class, at least 2, found 1",
    ),
    "whole numbers of one output": (torch.zeros(16).long(), 1, "at least 2, found 1"),
    "floats": (CLASSES.float(), 4, "found float32 of shape .*pass labels.long"),
    "half floats": (CLASSES.half(), 4, "found float16"),
    "floats in a column": (CLASSES.double()[:, None], 4, "found float64 of shape"),
    "complex numbers": (CLASSES.to(torch.complex64), 4, "found complex64"),
    "one-hot": (ONE_HOT, 4, r"found float32 of shape \(\d+, 4\); .*labels.argmax\(1\)"),
    "one-hot integers": (ONE_HOT.long(), 4, r"found shape \(\d+, 4\); .*labels.argmax\(1\)"),
    "probabilities": (ONE_HOT * 0.9 + 0.025, 4, r"labels.argmax\(1\)"),
    "several classes an image": (SEVERAL, 4, "several classes an image do not fit"),
    "a column": (CLASSES[:, None], 4, r"pass labels.squeeze\(1\)"),
    "positions": (CLASSES[:, None, None].expand(16, 8, 8), 4, r"found shape \(\d+, 8, 8\)"),
    "negative": (CLASSES - 1, 4, "expected class indices from 0 to 3, .*, found -1"),
    "ignored": (torch.where(CLASSES > 0, CLASSES, IGNORED), 4, "found -100"),
    "counted from one": (CLASSES + 1, 4, "found 4; these begin at 1: subtract 1"),
    "far too high": (CLASSES * 1000, 4, "found 3000"),
    "small integers": (CLASSES.to(torch.int8) - 1, 4, "found -1"),
}


def network(outputs):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.Flatten(),
        nn.Linear(32, outputs),
    )


def loader(labels):
    return DataLoader(TensorDataset(IMAGES, labels), 8)


def finetune(net, labels):
    nni_haloc.finetune(net, loader(labels), Recipe(1))


def validate(net, labels):
    good = torch.zeros(16).long()
    nni_haloc.finetune(net, loader(good), Recipe(1), loader(labels))


def teach(net, labels):
    nni_haloc.finetune(net, loader(labels), Recipe(1), teacher=network(net[-1].out_features))


def accuracy(net, labels):
    nni_haloc.accuracy(net, loader(labels))


def sensitivities(net, labels):
    space = RankSpace(net, IMAGES[:1])
    nni_haloc.sensitivities(net, space.modules_by_layer, IMAGES, labels)


def search(net, labels):
    space = RankSpace(net, IMAGES[:1])
    evaluator = nni_haloc.Classification(loader(labels), loader(labels), Recipe(1))
    nni_haloc.run_search(space, evaluator, Haloc(space.costs, 0.7))


def taylor(net, labels):
    prune(net, IMAGES[:1], 0.3, "taylor", loader(labels))


def compress(net, labels):
    options = {"budget": 0.7, "metric": "macs", "epochs": 1, "rule": "uniform"}
    nni_haloc.compress_model(net, loader(labels), loader(CLASSES), **options)


def learned(net, labels):
    options = {"budget": 0.7, "metric": "macs", "epochs": 0, "rule": "learned"}
    nni_haloc.compress_model(net, loader(labels), **options)


def compress_and_score(net, labels):
    options = {"budget": 0.7, "metric": "macs", "epochs": 0}
    nni_haloc.compress_model(net, loader(CLASSES), loader(labels), **options)


USES = (finetune, validate, teach, accuracy, sensitivities, search, taylor)
USES = (*USES, compress, learned, compress_and_score)


@pytest.mark.parametrize("case", WRONG)
def test_labels_that_are_no_classes_are_refused(case):
    labels, outputs, message = WRONG[case]
    with pytest.raises(DataError, match=f"^labels: .*{message}"):
        check_labels(labels, (16, outputs))


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
@pytest.mark.parametrize("case", ["a yes or no by one output", "one-hot", "counted from one"])
def test_they_are_refused_wherever_labels_are_used(use, case):
    labels, outputs, message = WRONG[case]
    if use is validate and outputs == 1:
        outputs, message = 4, "found float32"
    if case == "one-hot" and use in (finetune, validate, teach):
        use(network(outputs), labels)  # probabilities
        labels, message = SEVERAL.float(), "sum to 1 for each image or position, found a sum of "
    with pytest.raises(DataError, match=message) as raised:
        use(network(outputs), labels)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_integers_of_another_size_will_do(use):
    use(network(4), CLASSES.to(torch.int32))


@pytest.mark.parametrize("length", [15, 17])
def test_labels_of_another_number_than_images_are_refused(length):
    labels = torch.zeros(length).long()
    with pytest.raises(DataError, match=rf"of shape \(16,\), found shape \({length},\)"):
        sensitivities(network(4), labels)


@pytest.mark.parametrize("labels", [[0, 1], "cat", None, {"class": 1}, np.array([0, 1])])
def test_what_is_no_tensor_is_named_by_its_type(labels):
    with pytest.raises(DataError, match=f"found {type(labels).__name__}"):
        check_labels(labels, (2, 4))


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (TensorDataset(IMAGES), "list of 1"),
        (TensorDataset(IMAGES, CLASSES, CLASSES), "list of 3"),
        (IMAGES, "Tensor"),
    ],
)
@pytest.mark.parametrize("use", ["finetune", "accuracy"])
def test_batches_that_are_no_pairs_are_named(data, found, use):
    batches, net = DataLoader(data, 8), network(4)
    arguments = (net, batches, *[Recipe(1)] * (use == "finetune"))
    with pytest.raises(DataError, match=rf"expected batches \(images, labels\), found {found}"):
        getattr(nni_haloc, use)(*arguments)


def test_a_loader_without_batches_is_named():
    with pytest.raises(DataError, match=r"expected batches \(images, labels\), found none"):
        nni_haloc.accuracy(network(4), DataLoader(TensorDataset(IMAGES[:0], CLASSES[:0]), 8))


@given(
    st.lists(st.integers(-130, 300), min_size=1, max_size=8),
    st.integers(2, 200),
    st.booleans(),
    st.sampled_from([torch.int64, torch.int16]),
)
def test_labels_pass_where_torchs_cross_entropy_takes_them(values, outputs, positions, dtype):
    labels = torch.tensor(values).to(dtype)
    logits = torch.zeros(len(values), outputs)
    if positions:
        labels, logits = labels[None], logits.T[None]
    try:
        nn.functional.cross_entropy(logits, labels.long(), reduction="sum")
        fits = positions or IGNORED not in values
    except (IndexError, RuntimeError):
        fits = False
    try:
        assert torch.equal(check_labels(labels, logits.shape), labels.long())
        assert fits
    except DataError:
        assert not fits


def test_positions_have_classes_of_their_own():
    outputs = (2, 3, 4, 5)
    labels = torch.randint(0, 3, (2, 4, 5))
    assert torch.equal(check_labels(labels, outputs), labels)
    with pytest.raises(DataError, match=r"of shape \(2, 4, 5\), found shape \(2, 5, 4\)"):
        check_labels(labels.transpose(1, 2), outputs)
    with pytest.raises(DataError, match=r"pass labels.squeeze\(1\)"):
        check_labels(labels[:, None], outputs)


SOFT = 0.7 * ONE_HOT + 0.3 * ONE_HOT.roll(3, 0)
"""Labels as mixup makes them."""


class Mixed(nn.Module):
    """Give logits whose best class is the first in all images."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.tensor([1.0, 0.0, 0.0, 0.0]))

    def forward(self, x):
        return self.bias.expand(len(x), 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_probabilities_train_by_their_cross_entropy_and_count_by_the_largest(dtype):
    found, net = {}, Mixed()
    loss = -(SOFT.to(dtype).double() * net.bias.detach().double().log_softmax(0)).sum(1).mean()
    batches = loader(SOFT.to(dtype))
    nni_haloc.finetune(
        net, batches, Recipe(1, lr=1e-12), batches, lambda _, found_: found.update(found_)
    )
    assert found["train_loss"] == pytest.approx(
        float(loss), rel=1e-2 if dtype.itemsize < 4 else 1e-5
    )
    assert found["val_top1"] == float((SOFT.argmax(1) == 0).double().mean()) == 0.25


NO_PROBABILITIES = {
    "a sum of 2": (SOFT * 2, "found a sum of 2$"),
    "one image alone": (torch.cat([SOFT[:15], SOFT[15:] * 0.5]), "found a sum of 0.5$"),
    "negative": (SOFT - torch.eye(4)[[0] * 16] + torch.eye(4)[[1] * 16], "found negative ones or"),
    "not a number": (SOFT * torch.nan, "found negative ones or NaN"),
    "zeros": (SOFT * 0, "found a sum of 0$"),
    "of other classes": (torch.eye(3)[CLASSES % 3], "found float32 of shape .*8, 3"),
    "of one class": (torch.ones(16, 1), "found float32 of shape .*8, 1"),
    "of each image": (torch.ones(16), "found float32 of shape .*8,"),
    "by positions": (SOFT[..., None], "found float32 of shape .*8, 4, 1"),
    "complex": (SOFT + 0j, "found complex64"),
}


@pytest.mark.parametrize("use", [finetune, validate, teach], ids=lambda use: use.__name__)
@pytest.mark.parametrize("case", NO_PROBABILITIES)
def test_floats_that_are_no_probabilities_are_refused(use, case):
    labels, message = NO_PROBABILITIES[case]
    with pytest.raises(DataError, match=message) as raised:
        use(network(4), labels)
    assert "\n" not in str(raised.value)


class Pixels(nn.Module):
    """Classify each pixel."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.last(self.first(x).relu())


def pixels(ignored):
    """Labels of pixels, of which a share is ignored, and in the second half of the images all."""
    random = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 4, (16, 8, 8), generator=random)
    labels[torch.rand(labels.shape, generator=random) < ignored] = IGNORED
    labels[8:] = IGNORED
    return labels


@pytest.mark.parametrize("ignored", [0.0, 0.4, 0.99])
def test_ignored_positions_are_in_no_accuracy(ignored):
    torch.manual_seed(0)
    net, labels, found = Pixels(), pixels(ignored), {}
    with torch.no_grad():
        best = net(IMAGES).numpy().argmax(1)
    counted = labels.numpy() != IGNORED
    expected = (best[counted] == labels.numpy()[counted]).mean()
    batches = DataLoader(TensorDataset(IMAGES, labels), 5)
    assert nni_haloc.accuracy(net, batches) == (pytest.approx(expected),)
    assert nni_haloc.accuracy(net, batches, (4,)) == (1.0,)
    nni_haloc.finetune(
        net, batches, Recipe(1, lr=1e-12), batches, lambda _, metrics: found.update(metrics)
    )
    assert found["val_top1"] == pytest.approx(expected)
    assert np.isfinite(found["train_loss"])


def test_batches_of_ignored_labels_alone_change_nothing_and_are_no_accuracy():
    net, labels = Pixels(), torch.full((16, 8, 8), IGNORED)
    before = [p.detach().clone() for p in net.parameters()]
    batches = DataLoader(TensorDataset(IMAGES, labels), 8)
    nni_haloc.finetune(net, batches, Recipe(1, lr=0.1, weight_decay=0.0))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))
    with pytest.raises(DataError, match="expected classes, found -100 .to be ignored. alone"):
        nni_haloc.accuracy(net, batches)


def test_a_searchs_batches_leave_ignored_labels_out():
    torch.manual_seed(0)
    net, labels = Pixels(), pixels(0.5)
    evaluator = nni_haloc.Classification(loader(labels), loader(labels), Recipe(1))
    evaluator.module.set_model(net)
    with torch.no_grad():
        step = evaluator.module.training_step((IMAGES, labels), 0)
        logits = net(IMAGES)
    counted = labels != IGNORED
    right = logits.argmax(1)[counted] == labels[counted]
    assert float(step["top1"]) == pytest.approx(float(right.double().mean()))
    torch.testing.assert_close(step["loss"], nn.functional.cross_entropy(logits, labels))


def test_sensitivities_are_means_over_the_labels_that_count():
    torch.manual_seed(0)
    net, labels = Pixels(), pixels(0.5)
    space = RankSpace(net, IMAGES[:1])
    added = added_losses(net, space.modules_by_layer, IMAGES, labels)
    layer, name = next((a, b) for a, row in added.items() for b in row if b != "dense")
    changed = copy.deepcopy(net)
    changed.set_submodule(layer, space.modules_by_layer[layer][name])
    for i, found in enumerate(added[layer][name]):
        if i >= 8:
            assert found == 0
            continue
        with torch.no_grad():
            before, after = (
                nn.functional.cross_entropy(m(IMAGES[i : i + 1]), labels[i : i + 1])
                for m in (net, changed)
            )
        assert found == pytest.approx(float(after - before), abs=1e-5)


def test_outputs_that_are_no_logits_are_named():
    with pytest.raises(DataError, match=r"expected a network's outputs \(N, classes\), .*\(16,\)"):
        check_labels(CLASSES, (16,))


def test_batches_are_checked_before_they_are_moved(device):
    """Torch's device without memory stands in for one whose values can't be looked at."""
    check, there = LabelCheck(), torch.device("meta")
    outputs = torch.zeros(16, 4, device=there)
    check.look((IMAGES, CLASSES))
    with no_waits_on(device):
        check(CLASSES.to(there), outputs)
    check.look((IMAGES, CLASSES + 1))
    with pytest.raises(DataError, match="found 4"):
        check((CLASSES + 1).to(there), outputs)


def test_of_batches_that_are_made_on_a_device_the_first_are_looked_at(device):
    check = LabelCheck()
    labels = (CLASSES - 1).to(device)
    check.look((IMAGES, labels))
    with pytest.raises(DataError, match="found -1"):
        check(labels, torch.zeros(16, 4, device=device))


def test_without_training_labels_of_another_task_are_left_aside(caplog):
    """Ranks are then chosen without labels; a detector's boxes are no classes, and needn't be."""
    boxes = torch.rand(16, 4)
    options = {"budget": 0.7, "metric": "macs", "epochs": 0}
    with caplog.at_level("INFO", "nni_haloc"):
        result = nni_haloc.compress_model(network(4), loader(boxes), **options)
    plain = nni_haloc.compress_model(network(4), DataLoader(IMAGES, 8), **options)
    assert result.plan.ranks == plain.plan.ranks
    assert "the network's predictions take their place" in caplog.text
