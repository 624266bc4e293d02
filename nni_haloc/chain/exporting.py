"""A network as a file for other runtimes: ONNX, in float and in int8, and torch's exported program.

Each file is checked against torch.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import (
    AbstractContextManager,
    contextmanager,
    redirect_stderr,
    redirect_stdout,
    suppress,
)
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nni_haloc.costs.device.onnx_runtime import clear_errors, open_session
from nni_haloc.space.modules import copy_of, set_precision
from nni_haloc.space.outputs import NAMES
from nni_haloc.space.outputs import plain as plain_output
from nni_haloc.utils.errors import first_line, needs
from nni_haloc.utils.files import scratch, whole
from nni_haloc.utils.log import logger

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
        self._input = self._session.get_inputs()[0]
        size = self._input.shape[0] if self._input.shape else None
        self.batch: int | None = size if isinstance(size, int) else None
        """The only batch size that the file takes (None: any)."""

    def forward(self, x: Tensor) -> Any:
        with clear_errors():
            outputs = self._session.run(
                None, {self._input.name: x.detach().cpu().contiguous().numpy()}
            )
        results = tuple(torch.from_numpy(y).to(x.device) for y in outputs)
        names = [output.name for output in self._session.get_outputs()]
        if set(names) & set(NAMES):
            return dict(zip(names, results, strict=True))
        return results[0] if len(results) == 1 else results


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
        program, dynamic = _traced(network, example)
        if sum(p.nbytes for p in program.state_dict.values()) > _LARGEST:
            raise ValueError(
                f"{file}: expected less than {_LARGEST >> 20} MiB of weights, "
                "which is what one ONNX file holds"
            )
        with _quietly():
            try:
                exported = torch.onnx.export(
                    program,
                    (),
                    dynamo=True,
                    optimize=True,
                    verbose=False,
                    opset_version=_OPSET,
                    output_names=_names(program),
                )
            except torch.onnx.errors.OnnxExporterError as error:
                # The error itself only says which step failed.
                reason = error.__cause__ if isinstance(error.__cause__, Exception) else error
                raise ValueError(
                    f"{file}: the network can't be exported to ONNX: {first_line(reason)}"
                ) from None
            assert exported is not None
            exported.save(part, external_data=False)
        return _checked(network, OnnxNetwork(part), example, dynamic, file, tolerance)


def export_program(
    network: nn.Module, example: Tensor, file: str | Path, *, tolerance: float = 1e-4
) -> float:
    """Write a network as a program of torch.export (``.pt2``), which only torch runs.

    For arguments, result and errors see `export_onnx`.
    """
    with whole(file) as part:
        program, dynamic = _traced(network, example)
        with _quietly():
            torch.export.save(program, part)
            loaded = torch.export.load(part).module()
        return _checked(network, loaded, example, dynamic, file, tolerance)


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
    with needed("quantization"), whole(file) as part, scratch(file) as folder, _quietly():
        from onnxruntime.quantization import (
            CalibrationMethod,
            QuantFormat,
            QuantType,
            quantize_static,
        )
        from onnxruntime.quantization.shape_inference import quant_pre_process

        network = OnnxNetwork(source)
        defaults = {
            "quant_format": QuantFormat.QDQ,
            "per_channel": True,
            # A processor without VNNI adds pairs of products in 16 bits, which overflow unless
            # weights have 7 bits. Other types are slower.
            "activation_type": QuantType.QUInt8,
            "weight_type": QuantType.QInt8,
            "reduce_range": True,
            "calibrate_method": CalibrationMethod.MinMax,
        }
        prepared = folder / "prepared.onnx"
        try:
            quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
            with clear_errors():
                quantize_static(prepared, part, _Reader(network, images), **{**defaults, **options})
            outputs = OnnxNetwork(part)(images[: network.batch or 1])
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
            raise ValueError(f"{source}: can't be quantized: {first_line(error)}") from None
        if not all(y.isfinite().all() for y in pytree.tree_leaves(outputs)):
            raise ValueError(f"{source}: quantized, it computes numbers that are not finite")


class _Reader:
    """Hands ONNX Runtime the calibration images, batch by batch.

    A smaller last batch is left out if the file takes only one batch size.
    """

    def __init__(self, network: OnnxNetwork, images: Tensor) -> None:
        size = network.batch or _CALIBRATION_BATCH
        batches = images.split(size)
        self.name = network._input.name
        self.batches: Iterator[Tensor] = iter(
            [b for b in batches if network.batch in (None, len(b))]
        )

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self.batches, None)
        return None if batch is None else {self.name: batch.contiguous().numpy()}


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


def _traced(network: nn.Module, example: Tensor) -> tuple[Any, bool]:
    """Return the exported program, and whether it takes any batch size."""
    plain, name, reasons = _plain(network, example), type(network).__name__, []
    for size, shapes in ((2, ({0: torch.export.Dim("batch")},)), (len(example), None)):
        try:
            with _quietly():
                program = torch.export.export(
                    plain, (_random(example, size),), dynamic_shapes=shapes
                )
        except Exception as error:  # of many kinds; some come from the network's own code
            reasons.append(first_line(error).split(" For more information")[0])
            continue
        if shapes is None:
            logger.warning(
                "%s: exported for batches of %d alone, because of: %s", name, size, reasons[0]
            )
        return program, shapes is not None
    raise ValueError(f"{name}: torch can't export it: {reasons[-1]}")


class _Plain(nn.Module):
    """Returns a network's tensors in plain containers."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Any:
        return plain_output(self.network(x))


def _plain(network: nn.Module, example: Tensor) -> nn.Module:
    """Copy to the processor, in float32, evaluation mode and the default memory format.

    The copy returns a tensor, or tensors in plain containers.
    """
    copied = copy_of(network).eval().cpu()
    set_precision(copied, torch.float32)
    copied = copied.to(memory_format=torch.contiguous_format)
    with suppress(Exception), torch.inference_mode():  # an exporter has a message of its own
        if not isinstance(copied(_random(example, len(example))), Tensor):
            return _Plain(copied)
    return copied


def _names(program: Any) -> list[str] | None:
    """Return the names of an exported program's outputs, if all of them have one."""
    spec = program.call_spec.out_spec
    output = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    named = isinstance(output, dict) and all(isinstance(place, int) for place in output.values())
    return list(output) if named else None


def _random(example: Tensor, size: int) -> Tensor:
    return torch.randn((size, *example.shape[1:]), generator=torch.Generator().manual_seed(size))


def _checked(
    network: nn.Module,
    written: Callable[[Tensor], Any],
    example: Tensor,
    dynamic: bool,
    file: str | Path,
    tolerance: float,
) -> float:
    """Return the largest difference of the outputs on random inputs; refuse one too large."""
    plain, difference, largest = _plain(network, example), 0.0, 1.0
    for size in (1, 3) if dynamic else (len(example),):
        x = _random(example, size)
        with torch.inference_mode():
            pairs = list(
                zip(pytree.tree_leaves(plain(x)), pytree.tree_leaves(written(x)), strict=True)
            )
        for expected, output in pairs:
            if expected.shape != output.shape:
                raise ValueError(
                    f"{file}: expected outputs of shape {tuple(expected.shape)}, as torch's, "
                    f"found {tuple(output.shape)}"
                )
            difference = max(
                difference, float((expected - output).abs().max().nan_to_num(torch.inf))
            )
            largest = max(largest, float(expected.abs().max()))
    if not difference <= tolerance * largest:
        raise ValueError(
            f"{file}: expected torch's outputs, at most {largest:.4g}, to a share of "
            f"{tolerance:g}; they differ by {difference:.4g}"
        )
    return difference


@contextmanager
def _quietly() -> Iterator[None]:
    """Hide the exporters' advice to their developers."""
    noisy = [
        logging.getLogger(name)
        for name in (
            "",
            "torch.onnx",
            "torch.export",
            "torch.fx",
            "torch._dynamo",
            "onnxscript",
            "onnx_ir",
        )
    ]
    levels = [each.level for each in noisy]
    said = StringIO()
    with warnings.catch_warnings(), redirect_stdout(said), redirect_stderr(said):
        warnings.simplefilter("ignore")
        for each in noisy:
            each.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for each, level in zip(noisy, levels, strict=True):
                each.setLevel(level)
