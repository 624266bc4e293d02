"""Networks that return more than a tensor, as files: every tensor by name, logits found again."""

import collections
import dataclasses

import pytest
import torch
from helpers.networks import SmallNet
from torch.utils.data import DataLoader, TensorDataset

from nni_haloc.chain.exporting import OnnxNetwork, export_onnx, export_program, quantize_onnx
from nni_haloc.space.outputs import logits_of, plain
from nni_haloc.training.finetuning import accuracy

Named = collections.namedtuple("Named", ["features", "logits"])


@dataclasses.dataclass
class Result:
    features: torch.Tensor
    logits: torch.Tensor
    note: str = "text"


FORMS = {
    "a dict, the logits last": lambda y: {"features": torch.cat([y, -y], 1), "logits": y},
    "a named tuple": lambda y: Named(torch.cat([y, -y], 1), y),
    "a dataclass": lambda y: Result(torch.cat([y, -y], 1), y),
    "a tuple with a dict": lambda y: (y, {"a": [y + 1, None]}),
    "nothing beside": lambda y: {"logits": y, "features": None},
}


class Returning(SmallNet):
    def __init__(self, form):
        torch.manual_seed(0)
        super().__init__()
        self.form = form

    def forward(self, x):
        return self.form(super().forward(x))


@pytest.mark.parametrize("form", [form for form in FORMS if form != "a dict, the logits last"])
def test_a_program_gives_what_the_network_gives(tmp_path, form):
    net, x = Returning(FORMS[form]).eval(), torch.randn(3, 3, 8, 8)
    export_program(net, x[:2], tmp_path / "net.pt2")
    program = torch.export.load(tmp_path / "net.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(program(x), plain(net(x)))
        torch.testing.assert_close(logits_of(program(x)), logits_of(net(x)))


def test_a_file_of_onnx_has_the_outputs_names_and_the_accuracy_of_its_logits(tmp_path, images):
    net = Returning(FORMS["a dict, the logits last"]).eval()
    assert export_onnx(net, images[:2], tmp_path / "net.onnx") < 1e-5
    quantize_onnx(tmp_path / "net.onnx", images, tmp_path / "int8.onnx")
    with torch.no_grad():
        expected = net(images)
    onnx = OnnxNetwork(tmp_path / "net.onnx")
    torch.testing.assert_close(onnx(images), expected)
    loader = DataLoader(TensorDataset(images, expected["logits"].argmax(1)), 16)
    assert accuracy(onnx, loader) == (1.0,)
    assert accuracy(OnnxNetwork(tmp_path / "int8.onnx"), loader)[0] > 0.8


class Phases(SmallNet):
    """Has complex numbers, which float32 would cut to their real parts."""

    def __init__(self):
        super().__init__()
        self.register_buffer("phase", torch.tensor([1j, 2j, 3j, 4j]))

    def forward(self, x):
        return super().forward(x) * self.phase.imag


def test_complex_buffers_keep_their_imaginary_parts(tmp_path, images):
    torch.manual_seed(0)
    net = Phases().eval()
    export_program(net, images[:2], tmp_path / "net.pt2")
    with torch.no_grad():
        found = torch.export.load(tmp_path / "net.pt2").module()(images[:3])
        torch.testing.assert_close(found, net(images[:3]))
    assert found.abs().max() > 0
