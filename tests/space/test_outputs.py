"""Which tensor of an output the logits are, by one rule; divergences against the closed form."""

import collections
import dataclasses
import types
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nni_haloc.chain.exporting import export_program
from nni_haloc.chain.pruning import prune
from nni_haloc.costs.analytic import mac_table
from nni_haloc.runs.compress_model import compress_model
from nni_haloc.search.space import RankSpace
from nni_haloc.space.outputs import cross_entropy, divergence, hits, logits_of, plain
from nni_haloc.training.finetuning import accuracy
from nni_haloc.utils.errors import HalocError
from nni_haloc.utils.placement import moved

LOGITS, OTHER = torch.randn(2, 3), torch.randn(2, 5, 4, 4)
Named = collections.namedtuple("Named", ["features", "logits"])
Pair = collections.namedtuple("Pair", ["first", "second"])


@dataclasses.dataclass
class Result:
    features: Any = None
    out: Any = None


@dataclasses.dataclass
class Lone:
    prediction: Any
    names: tuple = ("a", "b")


class Slots:
    __slots__ = ("hidden", "logits")

    def __init__(self):
        self.hidden, self.logits = OTHER, LOGITS


class ModelOutput(collections.OrderedDict):
    """As the transformers have it: a dict whose entries are attributes."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Computed:
    @property
    def logits(self):
        return LOGITS


GIVEN = {
    "a tensor": LOGITS,
    "a dict": {"features": OTHER, "logits": LOGITS},
    "torchvision's segmentation": collections.OrderedDict(out=LOGITS, aux=OTHER),
    "output": {"x": OTHER, "output": LOGITS},
    "logits before out": {"out": OTHER, "logits": LOGITS},
    "out before output": {"output": OTHER, "out": LOGITS},
    "a dict of one tensor": {"prediction": LOGITS, "names": ["a"]},
    "a tuple": (LOGITS, OTHER),
    "a list": [LOGITS, OTHER, OTHER],
    "a tuple with a loss that is None": (None, LOGITS),
    "a tuple with a loss": (torch.tensor(1.0), LOGITS, OTHER),
    "a tuple in a tuple": ((LOGITS, OTHER), OTHER),
    "a dict in a tuple": ({"features": OTHER, "logits": LOGITS}, OTHER),
    "a tuple in a dict": {"logits": (LOGITS, OTHER)},
    "a named tuple": Named(OTHER, LOGITS),
    "a named tuple of other names": Pair(LOGITS, OTHER),
    "googlenet in training": torchvision.models.GoogLeNetOutputs(LOGITS, OTHER, OTHER),
    "inception in training": torchvision.models.InceptionOutputs(LOGITS, OTHER),
    "a dataclass": Result(OTHER, LOGITS),
    "a dataclass of one tensor": Lone(LOGITS),
    "an object": types.SimpleNamespace(hidden=OTHER, logits=LOGITS),
    "slots": Slots(),
    "a property": Computed(),
    "the transformers'": ModelOutput(loss=torch.tensor(1.0), logits=LOGITS, hidden=(OTHER,)),
    "a name without a value": {"logits": None, "out": LOGITS},
}


@pytest.mark.parametrize("kind", GIVEN)
def test_logits_are_found(kind):
    assert logits_of(GIVEN[kind]) is LOGITS


@pytest.mark.parametrize(
    ("output", "found"),
    [
        ({"a": LOGITS, "b": LOGITS}, "a dict with a, b"),
        (Lone(None), "a Lone with prediction, names"),
        ([], "a list"),
        (None, "a NoneType"),
        ("text", "a str"),
        (3.0, "a float"),
        (torch.ones(4), r"a tensor of shape \(4,\)"),
        (torch.tensor(1.0), r"a tensor of shape \(\)"),
        ((torch.tensor(1.0), torch.ones(3)), "a tuple"),
        ({"a\nb": LOGITS, "c": LOGITS}, r"a dict with a\\nb, c"),
    ],
)
def test_an_output_without_a_clear_answer_is_one_line(output, found):
    with pytest.raises(HalocError, match=rf"^the network's output: expected logits .*{found}$"):
        logits_of(output)


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@given(
    shape=st.lists(st.integers(1, 3), max_size=3),
    classes=st.integers(2, 4),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_divergence_is_the_closed_form_at_any_number_of_dimensions(shape, classes, seed):
    rng = np.random.default_rng(seed)
    z, target = (3 * rng.standard_normal((2, classes, *shape)) for _ in range(2))
    p, q = softmax(target), softmax(z)
    expected = (p * (np.log(p) - np.log(q))).sum(1)
    found = divergence(torch.tensor(z), torch.tensor(target))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_logits_of_one_class_are_those_of_its_probability():
    z, target = torch.randn(2, 4, 1, 3, dtype=torch.float64)
    p, q = (1 / (1 + np.exp(-x.numpy())) for x in (target, z))
    expected = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    np.testing.assert_allclose(divergence(z, target).numpy(), expected[:, 0], rtol=1e-9)


def test_networks_of_other_numbers_of_classes_are_not_compared():
    with pytest.raises(ValueError, match=r"one shape, found \(2, 3\) and \(2, 1\)"):
        divergence(torch.zeros(2, 3), torch.zeros(2, 1))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    classes=st.integers(2, 6),
    k=st.integers(1, 6),
    ignored=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_hits_and_cross_entropy_leave_ignored_labels_out(shape, classes, k, ignored, seed):
    random = np.random.default_rng(seed)
    logits = random.normal(size=(shape[0], classes, *shape[1:]))
    labels = random.integers(0, classes, shape)
    if len(shape) > 1:
        labels[random.random(shape) < ignored] = -100
    rows, flat = np.moveaxis(logits, 1, -1).reshape(-1, classes), labels.ravel()
    counted = [(row, label) for row, label in zip(rows, flat, strict=True) if label >= 0]
    both = torch.from_numpy(logits), torch.from_numpy(labels)
    losses = [np.log(np.exp(row).sum()) - row[label] for row, label in counted]
    expected = np.mean(losses) if losses else 0.0
    assert float(cross_entropy(*both)) == pytest.approx(expected)
    if k > classes:
        with pytest.raises(ValueError, match=f"^top-{k}: expected at least {k} classes"):
            hits(*both, k)
        return
    best = [label in np.argsort(row)[-k:] for row, label in counted]
    assert [int(number) for number in hits(*both, k)] == [sum(best), len(best)]


def test_hits_and_cross_entropy_take_probabilities():
    logits = torch.randn(5, 3, 2, dtype=torch.float64)
    labels = torch.rand(5, 3, 2, dtype=torch.float64).softmax(1)
    expected = -(labels * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(cross_entropy(logits, labels), expected)
    right = (logits.argmax(1) == labels.argmax(1)).sum()
    assert [int(number) for number in hits(logits, labels)] == [int(right), 10]


def in_itself_first(x):
    return (found := [x]).insert(0, found) or found


def in_itself_last(x):
    return (found := [x]).append(found) or found


def named_in_itself(x):
    found = {"features": x}
    found["logits"] = found
    return found


def attribute_of_itself(x):
    found = types.SimpleNamespace(features=x)
    found.out = found
    return found


def two_around_each_other(x):
    first, second = {}, [x]
    first["out"], second[:0] = second, [first]
    return first


def very_deep(x):
    for _ in range(3000):
        x = [x]
    return x


ENDLESS = (in_itself_first, in_itself_last, named_in_itself, attribute_of_itself)
ENDLESS = (*ENDLESS, two_around_each_other, very_deep)


class Ending(nn.Module):
    """A network whose output has another form."""

    def __init__(self, form):
        super().__init__()
        self.first, self.last, self.form = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 3), form

    def forward(self, x):
        return self.form(self.last(self.first(x).relu()).mean((2, 3)))


@pytest.mark.parametrize("form", ENDLESS)
def test_an_output_inside_itself_is_one_line_or_no_matter(form):
    found = form(torch.ones(2, 3))
    with pytest.raises(HalocError, match="^the network's output: expected tensors, found a "):
        plain(found)
    if form is in_itself_last:  # its first tensor is the logits
        assert logits_of(found).shape == (2, 3)
        return
    with pytest.raises(HalocError, match="^the network's output: expected tensors, found a "):
        logits_of(found)


USES = {
    "space": lambda net, x, y: RankSpace(net, x[:1]),
    "table": lambda net, x, y: mac_table(net, x[:1]),
    "accuracy": lambda net, x, y: accuracy(net, [(x, y)]),
    "rule": lambda net, x, y: compress_model(net, [(x, y)], budget=0.7, metric="macs", epochs=0),
    "export": lambda net, x, y: export_program(net, x[:1], "never.pt2"),
    "prune": lambda net, x, y: prune(net, x[:2], 0.3),
}


@pytest.mark.parametrize("form", ENDLESS)
@pytest.mark.parametrize("use", USES)
def test_networks_with_such_outputs_are_refused_on_one_line_or_work(form, use):
    try:
        USES[use](Ending(form), torch.rand(8, 3, 8, 8), torch.arange(8) % 4)
    except ValueError as error:
        message = str(error)
    else:
        message = ""
    assert "\n" not in message
    assert len(message) < 300


def test_an_output_may_hold_one_tensor_twice_and_containers_in_containers():
    x = torch.ones(2, 3)
    part, found = {"a": x}, x
    assert plain([part, part, [x, {"b": x}]]) == ({"a": x}, {"a": x}, (x, {"b": x}))
    for _ in range(40):
        found = (found,)
    assert logits_of(found) is x


@pytest.mark.parametrize("form", [in_itself_last, named_in_itself, very_deep])
def test_an_input_inside_itself_is_one_line(form):
    with pytest.raises(HalocError, match="inputs and outputs: expected tensors in lists and dicts"):
        moved(form(torch.rand(1, 3, 8, 8)), torch.device("cpu"))
