"""Timing with ONNX Runtime on the processor.

It needs numpy and onnxruntime, and no PyTorch if the specification carries ONNX models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from nni_haloc.costs.device.runtime import Run, Runtime, check_threads
from nni_haloc.costs.device.spec import Specification
from nni_haloc.space.names import DENSE
from nni_haloc.utils.errors import needs
from nni_haloc.utils.versions import processor

if TYPE_CHECKING:
    from torch import nn


def _onnxruntime() -> ModuleType:
    """Import ONNX Runtime; if it is not installed, say so on one line."""
    with needs("onnxruntime", what="ONNX Runtime", install="onnxruntime"):
        import onnxruntime
    return onnxruntime


def open_session(model: bytes | str, threads: int | None = None) -> Any:
    """Open an ONNX model as an `onnxruntime.InferenceSession` on the processor.

    Args:
        model: its content or its path.
        threads: processor threads (None: ONNX Runtime's choice).

    Raises:
        RuntimeError: if it is no ONNX model.
        MissingPackage: if ONNX Runtime is not installed.
    """
    onnxruntime = _onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3
    # Otherwise the threads of one session disturb the next one's.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with clear_errors():
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn ONNX Runtime's own exceptions, which have no common base, into RuntimeErrors."""
    _onnxruntime()
    from onnxruntime.capi import onnxruntime_pybind11_state as binding

    errors = tuple(
        v for v in vars(binding).values() if isinstance(v, type) and issubclass(v, Exception)
    )
    try:
        yield
    except errors as error:
        raise RuntimeError(f"ONNX Runtime: {error}") from None


@dataclass(frozen=True)
class OnnxRuntime(Runtime):
    """Times with ONNX Runtime's CPU provider, in float32.

    Attributes:
        threads: processor threads (None: ONNX Runtime's own choice).
    """

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
        for option, value, only in (
            ("device", device, "cpu"),
            ("dtype", dtype, "float32"),
            ("memory_format", memory_format, "contiguous"),
            ("graph", graph, False),
        ):
            if value != only:
                raise ValueError(
                    f"runtime onnxruntime: {option}: expected {only!r}, found {value!r}"
                )
        check_threads(threads)
        _onnxruntime()
        return cls(threads)

    def identity(self) -> dict[str, Any]:
        """Return what the times hold for; see `Runtime.identity`."""
        return {
            "runtime": f"onnxruntime {_onnxruntime().__version__}",
            "device": processor(),
            "dtype": "float32",
            "memory_format": "contiguous",
            "threads": self.threads or "default",
        }

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
