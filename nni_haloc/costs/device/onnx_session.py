"""Open ONNX models in ONNX Runtime. It needs no PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from nni_haloc.utils.errors import needs


def onnxruntime_package() -> ModuleType:
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
    onnxruntime = onnxruntime_package()
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
    onnxruntime_package()
    from onnxruntime.capi import onnxruntime_pybind11_state as binding

    errors = tuple(
        v for v in vars(binding).values() if isinstance(v, type) and issubclass(v, Exception)
    )
    try:
        yield
    except errors as error:
        raise RuntimeError(f"ONNX Runtime: {error}") from None
