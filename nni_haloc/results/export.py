"""Write the network of a finished run for other runtimes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

from nni_haloc.chain.exporting import export_onnx, export_program, quantize_onnx
from nni_haloc.runs.finished import Finished
from nni_haloc.runs.folder import hold
from nni_haloc.utils.errors import SettingsError, as_one_line, needs
from nni_haloc.utils.files import make_folder, whole

ONNX_FILE, PROGRAM_FILE, INT8_FILE = "model.onnx", "model.pt2", "model-int8.onnx"
OPENVINO_FILE, OPENVINO_INT8_FILE = "model.xml", "model-int8.xml"
EXECUTORCH_FILE, EXECUTORCH_INT8_FILE = "model.pte", "model-int8.pte"
_CALIBRATED = ("int8", "openvino-int8", "executorch-int8")
"""Formats that need training images."""

Exported = tuple[Path, str]
"""The file that was written, and what was checked of it."""


def export(
    folder: str | Path,
    formats: Sequence[str] | None = None,
    out: str | Path | None = None,
    *,
    factories: bool = False,
) -> list[tuple[str, Path, str]]:
    """Write the network of a finished run, or of one of its stages, for other runtimes.

    Each file appears as soon as it is whole. What ``folder`` holds itself stays as it is.

    Args:
        folder: the run's folder, or a stage's.
        formats: some of `FORMATS` (None: `DEFAULT`). ``int8``, ``openvino-int8`` and
            ``executorch-int8`` are calibrated on training images and need the run's data; the
            others do not.
        out: receives the files; None is ``folder/export``.
        factories: see `Finished`.

    Returns:
        For each format its name, its file, and what was checked.

    Raises:
        SettingsError: for a folder that is none of a finished run, an unknown format, a network
            that can't be exported, and an ``out`` that is the run's folder.
    """
    names = list(DEFAULT) if formats is None else list(formats)
    for name in names:
        if name not in FORMATS:
            raise SettingsError(f"format: expected some of {', '.join(FORMATS)}, found {name!r}")
    run = Finished(folder, data=bool({*names} & {*_CALIBRATED}), factories=factories)
    target = Path(out or run.folder.export)
    if target.resolve() == run.folder.path.resolve():
        raise SettingsError(f"--out: expected another folder than the run's, found {target}")
    with as_one_line():
        network = run.network()
    with hold(run.folder, out), as_one_line():
        make_folder(target)
        return [(name, *FORMATS[name](run, network, target)) for name in names]


def _told(difference: float) -> str:
    """Say how far a file's outputs are from those of torch."""
    return f"{difference:.1e} from torch" if difference else "identical to torch"


def _export_onnx(run: Finished, network: nn.Module, out: Path) -> Exported:
    difference = export_onnx(network, run.example(2), out / ONNX_FILE)
    return out / ONNX_FILE, f"in ONNX Runtime, {_told(difference)}"


def _export_program(run: Finished, network: nn.Module, out: Path) -> Exported:
    difference = export_program(network, run.example(2), out / PROGRAM_FILE)
    return out / PROGRAM_FILE, f"loaded back, {_told(difference)}"


def _export_safetensors(run: Finished, network: nn.Module, out: Path) -> Exported:
    for file in (run.folder.model, run.folder.weights, run.folder.ranks):
        if file.is_file():
            with whole(out / file.name) as part:
                shutil.copyfile(file, part)
    return out / run.folder.weights.name, f"as in the run's folder, with {run.folder.ranks.name}"


def _export_int8(run: Finished, network: nn.Module, out: Path) -> Exported:
    with TemporaryDirectory() as scratch:
        source = Path(scratch) / ONNX_FILE
        export_onnx(network, run.example(2), source)
        quantize_onnx(source, run.calibration_images(), out / INT8_FILE)
    return out / INT8_FILE, "runs in ONNX Runtime"


def _export_openvino(run: Finished, network: nn.Module, out: Path) -> Exported:
    from nni_haloc.costs.device.openvino_runtime import export_openvino

    difference = export_openvino(network, run.example(2), out / OPENVINO_FILE)
    return out / OPENVINO_FILE, f"in OpenVINO, {difference:.1e} from torch"


def _export_openvino_int8(run: Finished, network: nn.Module, out: Path) -> Exported:
    from nni_haloc.costs.device.openvino_runtime import export_openvino

    file, images = out / OPENVINO_INT8_FILE, run.calibration_images()
    difference = export_openvino(network, run.example(2), file, images)
    return file, f"in OpenVINO, in 8 bits, {difference:.1e} from torch"


def _export_executorch(run: Finished, network: nn.Module, out: Path) -> Exported:
    with needs("executorch", what="export to ExecuTorch", install="nni-haloc[executorch]"):
        from nni_haloc.costs.device.executorch_runtime import export_executorch
    difference = export_executorch(network, run.example(1), out / EXECUTORCH_FILE)
    return out / EXECUTORCH_FILE, f"in ExecuTorch, one image, {difference:.1e} from torch"


def _export_executorch_int8(run: Finished, network: nn.Module, out: Path) -> Exported:
    with needs("executorch", what="export to ExecuTorch", install="nni-haloc[executorch]"):
        from nni_haloc.costs.device.executorch_runtime import export_executorch
    file, images = out / EXECUTORCH_INT8_FILE, run.calibration_images()
    difference = export_executorch(network, run.example(1), file, images)
    return file, f"in ExecuTorch, one image, in 8 bits, {difference:.1e} from torch"


DEFAULT = ("onnx", "program", "safetensors", "int8")
"""Formats that are written if none is named."""
FORMATS: dict[str, Callable[[Finished, nn.Module, Path], Exported]] = {
    "onnx": _export_onnx,
    "program": _export_program,
    "safetensors": _export_safetensors,
    "int8": _export_int8,
    "openvino": _export_openvino,
    "openvino-int8": _export_openvino_int8,
    "executorch": _export_executorch,
    "executorch-int8": _export_executorch_int8,
}
"""Formats by name: ONNX, a program of `torch.export`, safetensors, ONNX in 8 bits, OpenVINO's files
in float32 and in 8 bits, and ExecuTorch's programs for XNNPACK in float32 and in 8 bits."""
