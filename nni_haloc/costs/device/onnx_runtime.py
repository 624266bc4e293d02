"""Timing with ONNX Runtime on the processor.

It needs numpy and onnxruntime, and no PyTorch if the specification carries ONNX models.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nni_haloc.costs.device.onnx_based import OnnxBased
from nni_haloc.costs.device.onnx_session import clear_errors, onnxruntime_package, open_session
from nni_haloc.costs.device.runtime import Deployed, Run, check_options, check_threads
from nni_haloc.utils.versions import processor

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class OnnxRuntime(OnnxBased):
    """Times with ONNX Runtime's CPU provider, in float32.

    Attributes:
        threads: processor threads (None: ONNX Runtime's own choice).
    """

    precisions = ("float32", "int8")
    threads: int | None = None

    @classmethod
    def from_options(
        cls,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        memory_format: str = "contiguous",
        threads: int | None = None,
        graph: bool = False,
        tf32: bool = True,
    ) -> OnnxRuntime:
        """Make the runtime; see `Runtime.from_options`. A processor has no TF32.

        Raises:
            ValueError: if an option asks for anything but the processor, float32 and contiguous
                images, or for a CUDA graph.
            MissingPackage: if ONNX Runtime is not installed.
        """
        check_options(
            "onnxruntime",
            device=(device, ("cpu",)),
            dtype=(dtype, ("float32",)),
            memory_format=(memory_format, ("contiguous",)),
            graph=(graph, (False,)),
        )
        check_threads(threads)
        onnxruntime_package()
        return cls(threads)

    def identity(self) -> dict[str, Any]:
        """Return what the times hold for; see `Runtime.identity`."""
        return {
            "runtime": f"onnxruntime {onnxruntime_package().__version__}",
            "device": processor(),
            "dtype": "float32",
            "memory_format": "contiguous",
            "threads": self.threads or "default",
        }

    def deploy(
        self, network: nn.Module, example: Tensor, stem: Path, images: Tensor | None = None
    ) -> Deployed:
        """Make a trained network ready, as an ONNX file; see `Runtime.deploy`."""
        from nni_haloc.costs.device.onnx_files import OnnxNetwork, deployed_onnx, quantize_onnx

        file = deployed_onnx(network, example, stem)
        if images is not None:
            source, file = file, stem.with_name(f"{stem.name}-int8.onnx")
            quantize_onnx(source, images, file)
        opened = OnnxNetwork(file, self.threads)
        return Deployed(
            opened, lambda shape: self.ready(str(file), shape[0]), (file,), opened.batch
        )

    def ready(self, model: bytes | str, batch: int | None = None) -> Run:
        """Return a forward pass of an ONNX model on random inputs of its shapes, warmed up.

        Args:
            model: its content or its path.
            batch: the size of the dimension that the model leaves open (None: 1).
        """
        import numpy as np

        session, generator = open_session(model, self.threads), np.random.default_rng(0)
        shapes = {
            x.name: [n if isinstance(n, int) else batch or 1 for n in x.shape]
            for x in session.get_inputs()
        }
        feeds = {
            name: generator.standard_normal(shape, dtype=np.float32)
            for name, shape in shapes.items()
        }
        with clear_errors():
            for _ in range(2):
                session.run(None, feeds)
        return lambda: session.run(None, feeds)
