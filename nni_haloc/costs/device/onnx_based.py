"""What runtimes have in common that run ONNX models: `OnnxBased`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nni_haloc.costs.device.runtime import Run, Runtime
from nni_haloc.costs.device.spec import Specification
from nni_haloc.space.names import DENSE

if TYPE_CHECKING:
    from torch import nn

RANDOM_BATCHES = 2
"""Random inputs that give activations their ranges where only the time counts."""


class OnnxBased(Runtime):
    """Run the entries of a specification, and the network, as ONNX models.

    A class that derives from this one writes `from_options`, `identity` and `ready`.
    """

    @abstractmethod
    def ready(self, model: bytes | str, batch: int | None = None) -> Run:
        """Return a forward pass of an ONNX model on random inputs of its shapes, warmed up.

        Args:
            model: its content or its path.
            batch: the size of the dimension that the model leaves open (None: 1).
        """

    def prepare(self, spec: Specification, model: nn.Module) -> Specification:
        """Add ONNX models of every entry and of the network."""
        from nni_haloc.costs.device.onnx_models import with_onnx

        return with_onnx(spec, model)

    def entry(self, spec: Specification, index: int) -> Run:
        """Return a forward pass of one entry; see `Runtime.entry`."""
        model = spec.entries[index].onnx
        if model is None:
            raise ValueError(
                "the specification carries no ONNX models: make it with `haloc spec --onnx`"
            )
        return self.ready(model)

    def network(self, spec: Specification, choice: Mapping[str, str]) -> Run:
        """Return a forward pass of the whole network; see `Runtime.network`."""
        if spec.onnx is None:
            raise ValueError(
                "the specification carries no ONNX model of the network: "
                "make it with `haloc spec --onnx`"
            )
        if all(name == DENSE for name in choice.values()):
            return self.ready(spec.onnx)
        from nni_haloc.costs.device.onnx_models import with_layers

        return self.ready(with_layers(spec, choice))


def random_inputs(shapes: Mapping[str, tuple[int, ...]], number: int = 1) -> list[dict[str, Any]]:
    """Draw batches of inputs in float32, the same ones each time.

    Args:
        shapes: shapes of a model's inputs, by name.
        number: of batches.
    """
    import numpy as np

    generator = np.random.default_rng(0)
    return [
        {name: generator.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
        for _ in range(number)
    ]
