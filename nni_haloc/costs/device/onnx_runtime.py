"""Timing with ONNX Runtime on the processor; needs numpy and onnxruntime, and no PyTorch where the specification carries ONNX models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from nni_haloc.costs.device.measuring import Run
from nni_haloc.costs.device.spec import Specification
from nni_haloc.space.names import DENSE
from nni_haloc.utils.versions import processor


def open_session(model: bytes | str, threads: int | None = None) -> Any:
    """An `onnxruntime.InferenceSession` on the processor of an ONNX model, its content or its path; RuntimeError where it is none."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3
    options.add_session_config_entry(
        "session.force_spinning_stop", "1"
    )  # else the threads of one session disturb the next one's
    with clear_errors():
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@contextmanager
def clear_errors() -> Iterator[None]:
    """ONNX Runtime's own exceptions, which have no common base, as RuntimeErrors."""
    from onnxruntime.capi import onnxruntime_pybind11_state as binding

    errors = tuple(
        v for v in vars(binding).values() if isinstance(v, type) and issubclass(v, Exception)
    )
    try:
        yield
    except errors as error:
        raise RuntimeError(f"ONNX Runtime: {error}") from None


@dataclass(frozen=True)
class OnnxRuntime:
    """ONNX Runtime's CPU provider with ``threads`` threads (its own choice where None), float32."""

    threads: int | None = None

    def identity(self) -> dict[str, Any]:
        import onnxruntime

        return {
            "runtime": f"onnxruntime {onnxruntime.__version__}",
            "device": processor(),
            "dtype": "float32",
            "memory_format": "contiguous",
            "threads": self.threads or "default",
        }

    def entry(self, spec: Specification, index: int) -> Run:
        model = spec.entries[index].onnx
        if model is None:
            raise ValueError(
                "the specification carries no ONNX models: make it with `haloc spec --onnx`"
            )
        return self.ready(model)

    def network(self, spec: Specification, choice: Mapping[str, str]) -> Run:
        if spec.onnx is None:
            raise ValueError(
                "the specification carries no ONNX model of the network: make it with `haloc spec --onnx`"
            )
        if all(name == DENSE for name in choice.values()):
            return self.ready(spec.onnx)
        from nni_haloc.costs.device.onnx_models import with_layers

        return self.ready(with_layers(spec, choice))

    def ready(self, model: bytes | str, batch: int | None = None) -> Run:
        """A forward pass of an ONNX model, its content or its path, on random inputs of the shapes that it states, warmed up.

        ``batch``: the size of the dimension that it leaves open.
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

    def once(self, run: Run) -> float:
        start = perf_counter()
        run()
        return perf_counter() - start

    @contextmanager
    def pinned(self) -> Iterator[None]:
        yield
