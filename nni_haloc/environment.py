"""What a run was made with."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from .device.files import processor

_PACKAGES = (
    "nni-haloc", "nni", "torch", "torchvision", "pytorch-lightning", "torchmetrics", "tensorly", "numpy", "scipy", "scikit-learn",
    "safetensors", "onnx", "onnxruntime",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Python, the system, the processor, and those of the packages that results depend on and that are installed."""
    found = {"Python": platform.python_version(), "system": platform.platform(), "processor": processor()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
