"""torchvision's whole list of models.

For each a rank space is built, a random plan and the all-dense one are frozen, and forward passes
fit. There are no values (the meta device) wherever a model works so; there are values for some
small ones, and in the slow suite, ``HALOC_SLOW=1``, for all below 30 M parameters and for
detection, whose post-processing looks at values.
"""

import os
import random
import warnings
from contextlib import contextmanager

import pytest
import torch
import torchvision
from nni.nas.nn.pytorch import LayerChoice
from torch import nn

from nni_haloc.inputs.models import build_model
from nni_haloc.search.space import RankSpace
from nni_haloc.space.ranks import AllowedRanks

models = torchvision.models
CLASSIFICATION = list(models.list_models(module=models))
SEGMENTATION, DETECTION = (
    models.list_models(module=m) for m in (models.segmentation, models.detection)
)
VIDEO = models.list_models(module=models.video)
SMALL = [
    "googlenet",
    "mnasnet0_5",
    "mobilenet_v3_small",
    "resnet18",
    "shufflenet_v2_x0_5",
    "ssdlite320_mobilenet_v3_large",
]
MOST = 30_000_000
"""Parameters of those that are tried with values."""
SLOW = pytest.mark.skipif(not os.environ.get("HALOC_SLOW"), reason="slow: HALOC_SLOW=1 runs it")
RULES = AllowedRanks(kinds=("conv", "pointwise", "linear"))


def build(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of initialisations to come
        return build_model(f"torchvision:{name}").eval()


def batch(name):
    if name in VIDEO:
        return torch.rand(1, 3, 16, 224, 224)
    return torch.rand(2, 3, 299, 299) if name == "inception_v3" else torch.rand(2, 3, 224, 224)


def shapes(out):
    """Of an output's tensors; how many boxes are found depends on the weights."""
    if isinstance(out, torch.Tensor):
        return out.shape
    if isinstance(out, dict):
        return {key: shapes(value) for key, value in out.items()}
    return [sorted(value) for value in out]


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    pairs = [(a[key], b[key]) for key in a] if isinstance(a, dict) else list(zip(a, b, strict=True))
    return all(same(x, y) for x, y in pairs)


def some(space, seed=0):
    draw = random.Random(seed)
    return {layer: draw.choice(list(row)) for layer, row in space.candidates.items()}


def kind_of(layer):
    """As the layer's own attributes tell it."""
    if type(layer).__name__ == "Conv2d" and layer.groups == 1:
        return "conv" if layer.weight[0, 0].numel() > 1 else "pointwise"
    return "linear" if hasattr(layer, "in_features") else type(layer).__name__


def check_report(space, model):
    """Each layer of the model is listed once, searched or left alone, as what it is.

    A searched layer is a choice in the network.
    """
    rows = [row for row in space.report() if row.kind != "parameter"]
    layers = {
        n: m
        for n, m in model.named_modules()
        if (hasattr(m, "kernel_size") and hasattr(m, "weight")) or hasattr(m, "in_features")
    }
    assert [(row.layer, row.kind, row.shape) for row in rows] == [
        (n, kind_of(m), tuple(m.weight.shape)) for n, m in layers.items()
    ]
    network = dict(space.model.named_modules())
    for row in rows:
        choice = isinstance(network[row.layer], LayerChoice)
        assert row.candidates == (tuple(network[row.layer].names) if choice else ())
        assert bool(row.reason) != choice
        if not choice:
            assert type(network[row.layer]) is type(layers[row.layer])
        elif row.kind != "conv":
            assert all(
                name == "dense" or int(name[1:]) < min(row.shape[:2]) for name in row.candidates
            )
    own = {
        n for n, p in model.named_parameters() if p.dim() > 1 and n.rpartition(".")[0] not in layers
    }
    assert {row.layer for row in space.report()} - set(layers) == own


@pytest.mark.parametrize("name", [n for n in CLASSIFICATION + SEGMENTATION + VIDEO if n != "s3d"])
def test_without_values(name):
    model, x = build_on_meta(name), batch(name).to("meta")
    with torch.no_grad():
        expected = model(x)
        space = RankSpace(model, x, allowed=RULES)
        assert shapes(space.freeze(some(space)).eval()(x)) == shapes(expected)
    check_report(space, model)


def test_a_model_of_three_dimensional_convolutions_alone_is_refused_in_one_line():
    with pytest.raises(
        ValueError,
        match=r"^nothing to search in S3D "
        r"\(features.0.0.0 and \d+ more: Conv3d is not decomposed\)$",
    ):
        RankSpace(build_on_meta("s3d"), batch("s3d").to("meta"), allowed=RULES)


@contextmanager
def parameters_on_meta():
    """Move each parameter to the meta device before it is initialised, which takes seconds."""
    register = nn.Module.register_parameter

    def register_on_meta(module, name, parameter):
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "register_parameter", register_on_meta)
        yield


def build_on_meta(name):
    try:
        with torch.device("meta"):
            return build(name)
    except ValueError as error:
        if "NotImplementedError" not in str(error):
            raise
        # Its constructor looks at values, though not at those of its parameters.
        with parameters_on_meta():
            return build(name).to("meta")


def with_values(name):
    torch.manual_seed(0)
    model, x = build(name), batch(name)
    if sum(p.numel() for p in model.parameters()) > MOST:
        pytest.skip("more than 30 M parameters")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        expected = model(x)
        space = RankSpace(model, x, allowed=RULES, decomposition="hosvd")
        assert shapes(space.freeze(some(space)).eval()(x)) == shapes(expected)
        assert same(space.freeze(dict.fromkeys(space.candidates, "dense")).eval()(x), expected)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not model.training


@pytest.mark.parametrize("name", SMALL)
def test_with_values(name):
    with_values(name)


@SLOW
@pytest.mark.parametrize(
    "name", [n for n in CLASSIFICATION + SEGMENTATION + DETECTION if n not in SMALL]
)
def test_with_values_all(name):
    with_values(name)
