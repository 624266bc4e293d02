"""Messages about names suggest the one that was probably meant."""

import pytest

from nni_haloc.inputs.registries import RUNTIMES
from nni_haloc.utils.errors import expected_one_of


@pytest.mark.parametrize(
    ("found", "meant"),
    [("onnx", "onnxruntime"), ("Openvno", "openvino"), ("tensor", "tensorrt"), ("zzz", None)],
)
def test_the_start_of_a_name_and_a_misspelt_one_are_told_the_name(found, meant):
    message = expected_one_of(RUNTIMES.names(), found)
    assert message.endswith(f"did you mean {meant!r}?" if meant else f"found {found!r}")
