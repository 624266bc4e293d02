"""The Python and the packages that are here: whether they will do, and what a run was made with."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

_PACKAGES = (
    "nni-haloc", "nni", "torch", "torchvision", "pytorch-lightning", "torchmetrics", "tensorly", "numpy", "scipy", "scikit-learn",
    "safetensors", "onnx", "onnxruntime",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Python, the system, the processor, and those of the packages that results depend on and that are installed."""
    found = {
        "Python": platform.python_version(),
        "system": platform.platform(),
        "processor": processor(),
    }
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def check_supported() -> None:
    """ImportError, one line, if Python or an installed package is of a version that nni-haloc's own metadata rule out.

    A package that is not there is no matter: on a device that measures, most of them are not. Without metadata, or without `packaging`
    to read them, nothing is checked.
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
            found = version(needed.name)
        except PackageNotFoundError:
            continue
        if not needed.specifier.contains(found, prereleases=True):
            raise ImportError(
                f"nni-haloc {own.version} needs {needed.name} {needed.specifier}, found {found}"
            )


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    names = [
        line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))
    ]
    return next(iter(names), "") or platform.processor() or platform.machine()
