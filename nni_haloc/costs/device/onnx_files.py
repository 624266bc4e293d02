"""A network as an ONNX file, in float32 and in 8 bits, checked against torch."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nni_haloc.costs.device.exporting import checked, names_of, outputs_as, traced
from nni_haloc.costs.device.onnx_int8 import quantize_model
from nni_haloc.costs.device.onnx_session import clear_errors, open_session
from nni_haloc.utils.errors import first_line, needs
from nni_haloc.utils.files import whole
from nni_haloc.utils.quiet import quietly

_OPSET = 20
_LARGEST = 3 << 29
"""Bytes of weights above which torch puts them into a separate file."""
_CALIBRATION_BATCH = 32


class OnnxNetwork(nn.Module):
    """Runs an ONNX file as a network, by ONNX Runtime on the processor.

    Called with a tensor ``(N, ...)`` it returns a tensor, or a tuple if the file has more outputs;
    a dict if one of them is called as logits are (see `nni_haloc.space.outputs.logits_of`).

    Args:
        file: the ONNX file.
        threads: processor threads (None: ONNX Runtime's own choice).

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no ONNX file.
        MissingPackage: if one of ONNX's packages is not installed.
    """

    def __init__(self, file: str | Path, threads: int | None = None) -> None:
        super().__init__()
        self.file = Path(file)
        if not self.file.is_file():
            raise FileNotFoundError(f"{file}: no such file")
        with needed("ONNX Runtime"):
            try:
                self._session = open_session(str(file), threads)
            except RuntimeError as error:
                raise ValueError(f"{file}: {first_line(error)}") from None
        first = self._session.get_inputs()[0]
        self.input: str = first.name
        """The name of its input."""
        size = first.shape[0] if first.shape else None
        self.batch: int | None = size if isinstance(size, int) else None
        """The only batch size that the file takes (None: any)."""

    def forward(self, x: Tensor) -> Any:
        with clear_errors():
            outputs = self._session.run(None, {self.input: x.detach().cpu().contiguous().numpy()})
        names = [output.name for output in self._session.get_outputs()]
        return outputs_as(names, [torch.from_numpy(y).to(x.device) for y in outputs])


def export_onnx(
    network: nn.Module, example: Tensor, file: str | Path, *, tolerance: float = 1e-4
) -> float:
    """Write a network as an ONNX file, in float32 and evaluation mode.

    All its tensors are outputs of the file, by their names if they have any.
    The file takes any batch size; if the network can't be exported so, it keeps the example's, with
    a warning in the log. It is run by ONNX Runtime on random inputs of two batch sizes, and its
    outputs are compared with torch's.

    Args:
        network: what to export; it is left as it is.
        example: an input, ``(N, ...)``, of which only the shape counts.
        file: the ONNX file; it keeps its old content if something fails.
        tolerance: largest difference, as a share of the largest output (or of 1).

    Returns:
        The largest difference of any output.

    Raises:
        ValueError: if the network can't be exported, or an output differs by more.
        MissingPackage: if one of ONNX's packages is not installed.
    """
    with needed("export to ONNX"), whole(file) as part:
        program, dynamic = traced(network, example)
        if sum(p.nbytes for p in program.state_dict.values()) > _LARGEST:
            raise ValueError(
                f"{file}: expected less than {_LARGEST >> 20} MiB of weights, "
                "which is what one ONNX file holds"
            )
        with quietly():
            try:
                exported = torch.onnx.export(
                    program,
                    (),
                    dynamo=True,
                    optimize=True,
                    verbose=False,
                    opset_version=_OPSET,
                    output_names=names_of(program),
                )
            except torch.onnx.errors.OnnxExporterError as error:
                # The error itself only says which step failed.
                reason = error.__cause__ if isinstance(error.__cause__, Exception) else error
                raise ValueError(
                    f"{file}: the network can't be exported to ONNX: {first_line(reason)}"
                ) from None
            assert exported is not None
            exported.save(part, external_data=False)
        return checked(network, OnnxNetwork(part), example, dynamic, file, tolerance)


def quantize_onnx(source: str | Path, images: Tensor, file: str | Path, **options: Any) -> None:
    """Write an ONNX file in 8 bits, by ONNX Runtime's static quantization.

    Weights have a scale for each channel.

    Args:
        source: the ONNX file in float32.
        images: training images, not augmented, ``(N, ...)``; they give each activation's range.
        file: the new ONNX file; it keeps its old content if something fails.
        options: others of `onnxruntime.quantization.quantize_static`.

    Raises:
        ValueError: if ``source`` can't be quantized, or there are no images.
        MissingPackage: if one of ONNX's packages is not installed.
    """
    if not len(images):
        raise ValueError("quantization: expected training images to calibrate on, found none")
    file = Path(file)
    with needed("quantization"), whole(file) as part:
        network = OnnxNetwork(source)
        # A smaller last batch is left out if the file takes only one batch size.
        batches = [
            {network.input: batch.contiguous().numpy()}
            for batch in images.split(network.batch or _CALIBRATION_BATCH)
            if network.batch in (None, len(batch))
        ]
        try:
            quantize_model(source, batches, part, **options)
            outputs = OnnxNetwork(part)(images[: network.batch or 1])
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{source}: {first_line(error)}") from None
        if not all(y.isfinite().all() for y in pytree.tree_leaves(outputs)):
            raise ValueError(f"{source}: quantized, it computes numbers that are not finite")


def deployed_onnx(network: nn.Module, example: Tensor, stem: Path) -> Path:
    """Return a network's ONNX file for runtimes to run, and write it unless it is there.

    Args:
        network: the network.
        example: an input, ``(N, ...)``, of which only the shape counts.
        stem: path of the file, without its ending.

    Raises:
        ValueError: if the network can't be exported.
        MissingPackage: if one of ONNX's packages is not installed.
    """
    file = stem.with_name(f"{stem.name}.onnx")
    if not file.is_file():
        export_onnx(network, example, file)
    return file


def needed(what: str) -> AbstractContextManager[None]:
    """Return a context in which ONNX, ONNX Script and ONNX Runtime are installed.

    They are imported at once, because torch notices late, and says so in several lines.

    Args:
        what: what needs them, for the message.

    Raises:
        MissingPackage: if one of them is not installed.
    """
    packages = ("onnx", "onnxscript", "onnxruntime")
    return needs(*packages, what=what, install="nni-haloc[onnx]")
