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

from nni_haloc.space.outputs import cross_entropy, divergence, hits, logits_of
from nni_haloc.utils.errors import HalocError

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
