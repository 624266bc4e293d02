"""Timing with TensorRT on an NVIDIA device, from ONNX models."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from nni_haloc.costs.device.onnx_based import OnnxBased
from nni_haloc.costs.device.runtime import Deployed, Run, check_options
from nni_haloc.utils.errors import needs
from nni_haloc.utils.log import logger

if TYPE_CHECKING:
    from torch import Tensor, nn

_WORKSPACE = 1 << 30
"""Bytes of the device that the kernels of an engine may use while they compute."""


def _tensorrt() -> ModuleType:
    """Import TensorRT; if it is not installed, say so on one line."""
    with needs("tensorrt", what="TensorRT", install="nni-haloc[tensorrt]"):
        import tensorrt
    return tensorrt


@dataclass(frozen=True)
class TensorRtRuntime(OnnxBased):
    """Times with TensorRT engines, built from ONNX models, on tensors that are on the device.

    Attributes:
        device: torch's name of a CUDA device.
        tf32: whether float32 may be computed in TF32.
    """

    device: str = "cuda"
    tf32: bool = True

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
    ) -> TensorRtRuntime:
        """Make the runtime; see `Runtime.from_options`. It has no use for processor threads.

        Raises:
            ValueError: if an option asks for anything but a CUDA device that is there, float32 and
                contiguous images, or for a CUDA graph.
            MissingPackage: if TensorRT is not installed.
        """
        check_options(
            "tensorrt",
            device=(device.partition(":")[0], ("cuda",)),
            dtype=(dtype, ("float32",)),
            memory_format=(memory_format, ("contiguous",)),
            graph=(graph, (False,)),
        )
        _tensorrt()
        from nni_haloc.costs.device.torch_runtime import TorchRuntime

        TorchRuntime(device)  # it checks that the device is there
        return cls(device, tf32)

    def identity(self) -> dict[str, Any]:
        """Return what the times hold for; see `Runtime.identity`."""
        from nni_haloc.costs.device.torch_runtime import hardware

        return {
            "runtime": f"tensorrt {_tensorrt().__version__}",
            "device": hardware(self.device),
            "dtype": "float32",
            "memory_format": "contiguous",
            "threads": self.device,
            "graph": False,
            "tf32": self.tf32,
        }

    def deploy(
        self, network: nn.Module, example: Tensor, stem: Path, images: Tensor | None = None
    ) -> Deployed:
        """Make a trained network ready, as an ONNX file that an engine is built of."""
        from nni_haloc.costs.device.exporting import OpenedNetwork, checked
        from nni_haloc.costs.device.onnx_files import deployed_onnx

        file = deployed_onnx(network, example, stem)
        engine = _Engine(file.read_bytes(), len(example), self.device, self.tf32)
        opened = OpenedNetwork(engine.outputs_of, list(engine.outputs), len(example))
        # TF32 has 10 bits of mantissa, and a sum of products loses more.
        checked(network, opened, example, False, file, 1e-2 if self.tf32 else 1e-4)
        return Deployed(opened, lambda shape: self.ready(str(file), shape[0]), (file,))

    def ready(self, model: bytes | str, batch: int | None = None) -> Run:
        """Return a forward pass of an ONNX model; see `OnnxBased.ready`."""
        content = model if isinstance(model, bytes) else Path(model).read_bytes()
        engine = _Engine(content, batch or 1, self.device, self.tf32)
        for _ in range(2):
            engine()
        return engine

    def once(self, run: Run) -> float:
        """Run one pass and return its seconds by the device's clock; see `TorchRuntime.once`."""
        from nni_haloc.costs.device.torch_runtime import TorchRuntime

        return TorchRuntime(self.device).once(run)


class _Engine:
    """Build an engine of an ONNX model; called, it runs once on its inputs, which are random.

    Args:
        model: content of the ONNX file.
        batch: the size of the dimensions that the model leaves open.
        device: torch's name of a CUDA device.
        tf32: whether float32 may be computed in TF32.

    Raises:
        RuntimeError: if TensorRT can't build it.
    """

    def __init__(self, model: bytes, batch: int, device: str, tf32: bool) -> None:
        import torch

        trt, start = _tensorrt(), time.perf_counter()
        self._device = device
        log = trt.Logger(trt.Logger.ERROR)
        with torch.cuda.device(device):
            builder = trt.Builder(log)
            network = builder.create_network(0)
            parser = trt.OnnxParser(network, log)
            if not parser.parse(model):
                raise RuntimeError(f"TensorRT: {parser.get_error(0).desc()}")
            config = builder.create_builder_config()
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, _WORKSPACE)
            if not tf32:
                config.clear_flag(trt.BuilderFlag.TF32)
            profile, shapes = builder.create_optimization_profile(), {}
            for tensor in map(network.get_input, range(network.num_inputs)):
                shape = tuple(batch if size < 0 else size for size in tensor.shape)
                profile.set_shape(tensor.name, shape, shape, shape)
                shapes[tensor.name] = shape
            config.add_optimization_profile(profile)
            plan = builder.build_serialized_network(network, config)
            if plan is None:
                raise RuntimeError("TensorRT can't build an engine of it")
            self._runtime = trt.Runtime(log)  # it has to outlive the engine
            self._engine = self._runtime.deserialize_cuda_engine(plan)
            self._context = self._engine.create_execution_context()
            self.inputs = {
                name: torch.randn(shape, device=device) for name, shape in shapes.items()
            }
            for name, x in self.inputs.items():
                self._context.set_input_shape(name, tuple(x.shape))
            names = map(self._engine.get_tensor_name, range(self._engine.num_io_tensors))
            self.outputs: Mapping[str, Any] = {
                name: torch.empty(tuple(self._context.get_tensor_shape(name)), device=device)
                for name in names
                if name not in self.inputs
            }
            for name, x in {**self.inputs, **self.outputs}.items():
                self._context.set_tensor_address(name, x.data_ptr())
        logger.debug("TensorRT: built in %.1f s", time.perf_counter() - start)

    def __call__(self) -> Mapping[str, Any]:
        import torch

        self._context.execute_async_v3(torch.cuda.current_stream(self._device).cuda_stream)
        return self.outputs

    def outputs_of(self, images: Any) -> list[Any]:
        """Return the outputs, as arrays, of images as an array."""
        import torch

        next(iter(self.inputs.values())).copy_(torch.from_numpy(images))
        return [y.cpu().numpy() for y in self().values()]
