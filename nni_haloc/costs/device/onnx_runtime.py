"""Timing with ONNX Runtime on the processor.

It needs numpy and onnxruntime, and no PyTorch if the specification carries ONNX models.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from nni_haloc.costs.device.onnx_based import RANDOM_BATCHES, OnnxBased, random_inputs
from nni_haloc.costs.device.onnx_int8 import check_onnx, quantize_model
from nni_haloc.costs.device.onnx_session import clear_errors, onnxruntime_package, open_session
from nni_haloc.costs.device.runtime import Deployed, Run, check_options, check_threads
from nni_haloc.utils.versions import processor

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class OnnxRuntime(OnnxBased):
    """Times with ONNX Runtime's CPU provider.

    Attributes:
        threads: processor threads (None: ONNX Runtime's own choice).
        dtype: ``float32``, or ``int8``: each entry and the network are quantized by ONNX Runtime,
            by the ranges of random activations, so the times are right and the outputs are not.
    """

    precisions = ("float32", "int8")
    threads: int | None = None
    dtype: str = "float32"

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
            ValueError: if an option asks for anything but the processor, float32 or int8, and
                contiguous images, or for a CUDA graph.
            MissingPackage: if ONNX Runtime is not installed, or for int8 the package onnx.
        """
        check_options(
            "onnxruntime",
            device=(device, ("cpu",)),
            dtype=(dtype, cls.precisions),
            memory_format=(memory_format, ("contiguous",)),
            graph=(graph, (False,)),
        )
        check_threads(threads)
        onnxruntime_package()
        if dtype == "int8":
            with check_onnx():
                pass
        return cls(threads, dtype)

    def identity(self) -> dict[str, Any]:
        """Return what the times hold for; see `Runtime.identity`."""
        return {
            "runtime": f"onnxruntime {onnxruntime_package().__version__}",
            "device": processor(),
            "dtype": self.dtype,
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
            opened, lambda shape: self._pass_of(str(file), shape[0]), (file,), opened.batch
        )

    def ready(self, model: bytes | str, batch: int | None = None) -> Run:
        """Return a forward pass of an ONNX model; see `OnnxBased.ready`."""
        if self.dtype == "float32":
            return self._pass_of(model, batch)
        with TemporaryDirectory() as folder:
            source, file = Path(folder) / "float32.onnx", Path(folder) / "int8.onnx"
            source.write_bytes(model if isinstance(model, bytes) else Path(model).read_bytes())
            shapes = _shapes(open_session(str(source), self.threads), batch)
            quantize_model(source, random_inputs(shapes, RANDOM_BATCHES), file)
            return self._pass_of(file.read_bytes(), batch)

    def _pass_of(self, model: bytes | str, batch: int | None) -> Run:
        """Return a forward pass of an ONNX model as it is, on random inputs, warmed up."""
        session = open_session(model, self.threads)
        (feeds,) = random_inputs(_shapes(session, batch))
        with clear_errors():
            for _ in range(2):
                session.run(None, feeds)
        return lambda: session.run(None, feeds)


def _shapes(session: Any, batch: int | None) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's inputs; ``batch`` is for dimensions that it leaves open."""
    return {
        x.name: tuple(n if isinstance(n, int) else batch or 1 for n in x.shape)
        for x in session.get_inputs()
    }
