"""Labels that are no classes of the outputs are one line, wherever they are used."""

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
    "counted from one": (CLASSES + 1, 4, "expected class indices from 0 to 3, .*, found 4"),
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
