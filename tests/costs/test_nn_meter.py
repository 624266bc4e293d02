"""nn-Meter itself reads our ONNX models; only the predictors of its kernels are stand-ins."""

import json
import logging
import math

import pytest
import torch
from torch import nn

from nni_haloc.costs.device.onnx_models import with_initializers, with_onnx
from nni_haloc.costs.nn_meter import predicted_table
from nni_haloc.costs.specify import specify
from nni_haloc.space.names import DENSE
from nni_haloc.space.ranks import AllowedRanks

KINDS = ("conv", "pointwise", "linear")
RULES = {"BF_conv_bn": {"obey": True}, "BF_bn_relu": {"obey": True}, "BF_conv_relu": {"obey": True}}
"""Which nodes a device fuses; nn-Meter downloads them with a device's predictors."""


@pytest.fixture(scope="module")
def nn_meter(tmp_path_factory):
    """Import nn-Meter, which writes its settings into the home folder when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        module = pytest.importorskip("nn_meter")
    logging.getLogger("nn-Meter").setLevel(logging.ERROR)
    return module


class Work:
    """Stands for the predictor of one kind of kernel: it needs a millisecond for a million MACs."""

    def __init__(self, macs):
        self.macs, self.seen = macs, []

    def predict(self, features):
        self.seen += features
        return [self.macs(*each) / 1e6 for each in features]


def conv_macs(size, cin, cout, kernel, stride, *_):
    return math.ceil(size / stride) ** 2 * cin * cout * kernel**2


@pytest.fixture
def predictor(nn_meter, tmp_path):
    rules = tmp_path / "fusion_rules.json"
    rules.write_text(json.dumps(RULES))
    kernels = {
        "conv-bn-relu": Work(conv_macs),
        "fc": Work(lambda cin, cout, *_: cin * cout),
    }
    return nn_meter.predictor.nnMeterPredictor(kernels, str(rules))


def network():
    return nn.Sequential(
        nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 16, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 6),
    )


def specified(model, shape=(1, 8, 10, 10)):
    spec = specify(model, torch.randn(shape), AllowedRanks(step=2, kinds=KINDS), program=False)
    return with_onnx(spec, model)


def convolutions(graph):
    """List (kernel shape, strides, group, channels in and out) in the order of the data."""
    left, found = dict(graph), []
    names = [name for name, node in graph.items() if not node["inbounds"]]
    while names:
        node = left.pop(names.pop())
        attr = node["attr"]["attr"]
        channels = (node["attr"]["input_shape"][0][-1], node["attr"]["output_shape"][0][-1])
        found.append((attr["kernel_shape"], attr["strides"], attr["group"], *channels))
        names += node["outbounds"]
    assert not left
    return found


def test_nn_meter_sees_the_three_convolutions_of_a_candidate(nn_meter):
    spec = specified(network())
    entry = spec.entries[spec.layers["0"]["r4"]]
    graph = nn_meter.model_to_graph(with_initializers(entry.onnx), "onnx")
    assert convolutions(graph) == [
        ([1, 1], [1, 1], 1, 8, 4),
        ([3, 3], [2, 2], 1, 4, 4),
        ([1, 1], [1, 1], 1, 4, 12),
    ]


@pytest.mark.parametrize(
    ("layer", "kernel", "strides", "channels"),
    [
        (nn.Conv2d(8, 8, (3, 5), padding=1), [3, 5], [1, 1], (8, 8)),
        (nn.Conv2d(8, 8, 3, stride=(1, 2), bias=False), [3, 3], [1, 2], (8, 8)),
        (nn.Conv2d(8, 6, 3, dilation=2), [3, 3], [1, 1], (8, 6)),
    ],
)
def test_nn_meter_sees_every_attribute_of_other_convolutions(
    nn_meter, layer, kernel, strides, channels
):
    spec = specified(nn.Sequential(layer))
    for candidate, index in spec.layers["0"].items():
        graph = nn_meter.model_to_graph(with_initializers(spec.entries[index].onnx), "onnx")
        found = convolutions(graph)
        assert len(found) == (1 if candidate == DENSE else 3)
        assert found[len(found) // 2][:3] == (kernel, strides, 1)
        assert (found[0][3], found[-1][4]) == channels


def test_nn_meter_sees_the_networks_nodes_and_nothing_but_them(nn_meter):
    """Sizes and axes that torch's exporter computes are no work."""
    grouped = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), *network())
    graph = nn_meter.model_to_graph(with_initializers(specified(grouped).onnx), "onnx")
    kinds = [node["attr"]["type"] for node in graph.values()]
    assert kinds == [
        "Conv", "Conv", "BatchNormalization", "Relu", "Conv", "ReduceMean", "Reshape", "Gemm",
    ]  # fmt: skip
    groups = [n["attr"]["attr"]["group"] for n in graph.values() if n["attr"]["type"] == "Conv"]
    assert groups == [8, 1, 1]


def test_a_table_by_nn_meter_counts_every_kernel(predictor):
    """Of layers in their candidates, and of the network, with the sizes that the kernels have."""
    model = network()
    rules = AllowedRanks(step=2, kinds=KINDS)
    table = predicted_table(model, torch.randn(1, 8, 10, 10), predictor, rules, "phone")
    dense = {"0": 25 * 8 * 12 * 9, "3": 25 * 12 * 16, "6": 16 * 6}
    for layer, macs in dense.items():
        assert table.costs[layer][DENSE] == pytest.approx(macs / 1e6)
    found = table.costs["0"]["r4"]
    assert found == pytest.approx((100 * 8 * 4 + 25 * 4 * 4 * 9 + 25 * 4 * 12) / 1e6)
    assert table.costs["3"]["r4"] == pytest.approx(25 * (12 * 4 + 4 * 16) / 1e6)
    assert table.costs["6"]["r2"] == pytest.approx((16 * 2 + 2 * 6) / 1e6)
    assert table.fixed == pytest.approx(0.0, abs=1e-9)
    assert all(cost > 0 for row in table.costs.values() for cost in row.values())


def test_a_kernel_that_nn_meter_has_no_predictor_of_is_no_latency_of_zero(predictor):
    del predictor.kernel_predictors["fc"]
    with pytest.raises(ValueError, match=r"layer '6', candidate '.*': expected a latency above 0 "):
        predicted_table(
            network(),
            torch.randn(1, 8, 10, 10),
            predictor,
            AllowedRanks(step=2, kinds=KINDS),
        )


class Says:
    """A predictor that returns, or raises, what it is given."""

    def __init__(self, answer):
        self.answer = answer

    def predict(self, model, model_type="onnx"):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (0, "found 0"),
        (-1.5, "found -1.5"),
        (float("nan"), "found nan"),
        (float("inf"), "found inf"),
        (KeyError("ks"), r"can't predict its ONNX model \(KeyError: 'ks'\)"),
        (None, r"can't predict its ONNX model \(TypeError: "),
    ],
)
def test_no_latency_is_one_clear_line(answer, found):
    with pytest.raises(ValueError, match=rf"^layer '0', candidate 'dense': .*Says.*{found}"):
        predicted_table(nn.Sequential(nn.Conv2d(4, 4, 3)), torch.randn(1, 4, 6, 6), Says(answer))
