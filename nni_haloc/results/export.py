"""Write the network of a finished run for other runtimes."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from nni_haloc.chain.exporting import export_onnx, export_program, quantize_onnx
from nni_haloc.runs.finished import Finished
from nni_haloc.runs.folder import EXPORT_FOLDER, MODEL_FILE, RANKS_FILE, WEIGHTS_FILE
from nni_haloc.utils.errors import SettingsError, reason_of
from nni_haloc.utils.files import whole

FORMATS = ("onnx", "program", "safetensors", "int8")


ONNX_FILE, INT8_FILE, PROGRAM_FILE = "model.onnx", "model-int8.onnx", "model.pt2"


def export(
    folder: str | Path,
    formats: Sequence[str] = FORMATS,
    out: str | Path | None = None,
    *,
    factories: bool = False,
) -> list[tuple[str, Path, str]]:
    """Write the network of a finished run's ``folder``, or of a stage's, in some of `FORMATS`; returns format, file and what was checked.

    ``out`` (None: ``folder/export``) receives the files, each as soon as it is whole; what ``folder`` holds itself stays as it is. Data are
    needed for ``int8`` alone, which is calibrated on training images. ``factories``: see `Finished`. Raises `SettingsError`.
    """
    run = Finished(folder, data="int8" in formats, factories=factories)
    out = Path(out or run.folder / EXPORT_FOLDER)
    if out.resolve() == run.folder.resolve():
        raise SettingsError(f"--out: expected another folder than the run's, found {out}")
    found: list[tuple[str, Path, str]] = []
    try:
        network, example = run.network(), run.example(2)
        out.mkdir(parents=True, exist_ok=True)
        for name in formats:
            if name == "onnx":
                found.append(
                    (
                        name,
                        out / ONNX_FILE,
                        _differs(export_onnx(network, example, out / ONNX_FILE), "in ONNX Runtime"),
                    )
                )
            elif name == "program":
                found.append(
                    (
                        name,
                        out / PROGRAM_FILE,
                        _differs(
                            export_program(network, example, out / PROGRAM_FILE), "loaded back"
                        ),
                    )
                )
            elif name == "int8":
                with TemporaryDirectory() as scratch:
                    source = out / ONNX_FILE
                    if "onnx" not in [done for done, *_ in found]:
                        source = Path(scratch) / ONNX_FILE
                        export_onnx(network, example, source)
                    quantize_onnx(source, run.calibration_images(), out / INT8_FILE)
                found.append((name, out / INT8_FILE, "runs in ONNX Runtime"))
            else:
                for file in (MODEL_FILE, WEIGHTS_FILE, RANKS_FILE):
                    if (run.folder / file).is_file():
                        with whole(out / file) as part:
                            shutil.copyfile(run.folder / file, part)
                found.append(
                    (name, out / WEIGHTS_FILE, f"as in the run's folder, with {RANKS_FILE}")
                )
    except (OSError, ValueError) as error:
        raise SettingsError(reason_of(error)) from None
    return found


def _differs(difference: float, how: str) -> str:
    return f"{how}, {difference:.1e} from torch"
