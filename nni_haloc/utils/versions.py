"""Versions of Python and of packages: check them, and list those that a run was made with."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

_PACKAGES = (
    "nni-haloc", "nni", "torch", "torchvision", "pytorch-lightning", "torchmetrics", "tensorly",
    "numpy", "scipy", "scikit-learn", "safetensors", "onnx", "onnxruntime", "openvino", "nncf",
    "executorch",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Return the versions of Python, the system, the processor and the installed packages.

    Only packages on which results depend are listed.
    """
    facts = {
        "Python": platform.python_version(),
        "system": platform.platform(),
        "processor": processor(),
    }
    for name in _PACKAGES:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            continue
    return facts


def check_supported() -> None:
    """Check Python and the installed packages against nni-haloc's own metadata.

    Missing packages are ignored, because a device that measures has few of them. Without metadata,
    or without `packaging` (which comes with Lightning) to read it, nothing is checked.

    Raises:
        ImportError: if a version does not fit; the message is one line.
    """
    try:
        from packaging.requirements import Requirement
        from packaging.specifiers import SpecifierSet

        own = distribution("nni-haloc")
    except (ModuleNotFoundError, PackageNotFoundError):
        return
    python = own.metadata["Requires-Python"] or ""
    if platform.python_version() not in SpecifierSet(python, prereleases=True):
        raise ImportError(
            f"nni-haloc {own.version} needs Python {python}, found {platform.python_version()}"
        )
    for text in own.requires or []:
        needed = Requirement(text)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(needed.name)
        except PackageNotFoundError:
            continue
        if not needed.specifier.contains(installed, prereleases=True):
            raise ImportError(
                f"nni-haloc {own.version} needs {needed.name} {needed.specifier}, found {installed}"
            )


def processor() -> str:
    """Return the processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    names = [
        line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))
    ]
    return next(iter(names), "") or platform.processor() or platform.machine()
