"""A network as a file for other runtimes, checked against torch: ONNX, in float and in int8, and torch's exported program."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nni_haloc.costs.device.onnx_runtime import clear_errors, open_session
from nni_haloc.space.modules import copy_of
from nni_haloc.utils.errors import first_line
from nni_haloc.utils.files import whole
from nni_haloc.utils.log import logger

_OPSET = 20
_LARGEST = 3 << 29
"""Bytes of weights from which torch puts them into a file of their own."""
_CALIBRATION_BATCH = 32


class OnnxNetwork(nn.Module):
    """An ONNX file as a network, run by ONNX Runtime on the processor with ``threads`` threads (its own choice where None).

    Called with a tensor ``(N, ...)`` it gives a tensor, or as many as the file has outputs. ValueError where the file is none of ONNX.
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
        """The one batch size that the file takes; None: any."""

    def forward(self, x: Tensor) -> Any:
        with clear_errors():
            outputs = self._session.run(
                None, {self._input.name: x.detach().cpu().contiguous().numpy()}
            )
        results = tuple(torch.from_numpy(y).to(x.device) for y in outputs)
        return results[0] if len(results) == 1 else results


def export_onnx(
    network: nn.Module, example: Tensor, file: str | Path, *, tolerance: float = 1e-4
) -> float:
    """Write ``network`` as an ONNX file in float32 and evaluation mode, with any batch size; returns the largest difference to torch.

    ``example (N, ...)``: an input, of which the shape alone counts. The file is run by ONNX Runtime on random inputs of two batch sizes;
    the difference is of any output. Where it is above ``tolerance`` times the largest output (or 1), or the network can't be exported,
    ValueError, and ``file`` is what it was before. A network that can't do with any batch size keeps that of ``example``, with a warning
    in the log.
    """
    with needed("export to ONNX"), whole(file, shared=True) as part:
        program, dynamic = _traced(network, example)
        if sum(p.nbytes for p in program.state_dict.values()) > _LARGEST:
            raise ValueError(
                f"{file}: expected less than {_LARGEST >> 20} MiB of weights, which is what one ONNX file holds"
            )
        with _quietly():
            try:
                exported = torch.onnx.export(
                    program, (), dynamo=True, optimize=True, verbose=False, opset_version=_OPSET
                )
            except torch.onnx.errors.OnnxExporterError as error:
                reason = (
                    error.__cause__ if isinstance(error.__cause__, Exception) else error
                )  # its own line says which step it was
                raise ValueError(
                    f"{file}: the network can't be exported to ONNX: {first_line(reason)}"
                ) from None
            assert exported is not None
            exported.save(part, external_data=False)
        return _checked(network, OnnxNetwork(part), example, dynamic, file, tolerance)


def export_program(
    network: nn.Module, example: Tensor, file: str | Path, *, tolerance: float = 1e-4
) -> float:
    """Write ``network`` as a program of torch.export (``.pt2``), which torch alone runs; everything else as for `export_onnx`."""
    with whole(file, shared=True) as part:
        program, dynamic = _traced(network, example)
        with _quietly():
            torch.export.save(program, part)
            loaded = torch.export.load(part).module()
        return _checked(network, loaded, example, dynamic, file, tolerance)


def quantize_onnx(source: str | Path, images: Tensor, file: str | Path, **options: Any) -> None:
    """Write the ONNX file ``source`` in 8 bits, by ONNX Runtime's static quantization.

    ``images (N, ...)``: training images, not augmented, on which the range of every activation is found. Weights have a scale for each
    channel. ``options``: others of `onnxruntime.quantization.quantize_static`. ValueError where ``source`` can't be quantized; ``file`` is
    then what it was before.
    """
    if not len(images):
        raise ValueError("quantization: expected training images to calibrate on, found none")
    with needed("quantization"), whole(file, shared=True) as part, _quietly():
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
            # A processor without VNNI adds pairs of products in 16 bits, which overflow unless weights have 7. Other types are slower.
            "activation_type": QuantType.QUInt8,
            "weight_type": QuantType.QInt8,
            "reduce_range": True,
            "calibrate_method": CalibrationMethod.MinMax,
        }
        prepared = part.with_name(f"prepared-{part.name}")
        try:
            quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
            with clear_errors():
                quantize_static(prepared, part, _Reader(network, images), **{**defaults, **options})
            found = OnnxNetwork(part)(images[: network.batch or 1])
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
            raise ValueError(f"{source}: can't be quantized: {first_line(error)}") from None
        finally:
            prepared.unlink(missing_ok=True)
        if not all(y.isfinite().all() for y in pytree.tree_leaves(found)):
            raise ValueError(f"{source}: quantized, it computes numbers that are not finite")


class _Reader:
    """What ONNX Runtime asks for calibration data, batch by batch; a smaller one is left out where the file takes one size alone."""

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


@contextmanager
def needed(what: str) -> Iterator[None]:
    """ONNX and ONNX Runtime; a package that is missing is one line. Asked for at once: torch does so late and in several lines."""
    try:
        for package in ("onnx", "onnxscript", "onnxruntime"):
            import_module(package)
        yield
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{what}: needs the package {error.name}, which is not installed (pip install 'nni-haloc[onnx]')"
        ) from None


def _traced(network: nn.Module, example: Tensor) -> tuple[Any, bool]:
    """The exported program, and whether it takes any batch size."""
    plain, name, reasons = _plain(network), type(network).__name__, []
    for size, shapes in ((2, ({0: torch.export.Dim("batch")},)), (len(example), None)):
        try:
            with _quietly():
                program = torch.export.export(
                    plain, (_random(example, size),), dynamic_shapes=shapes
                )
        except Exception as error:  # of many kinds, those of the network's own code among them
            reasons.append(first_line(error).split(" For more information")[0])
            continue
        if shapes is None:
            logger.warning(
                "%s: exported for batches of %d alone, because of: %s", name, size, reasons[0]
            )
        return program, shapes is not None
    raise ValueError(f"{name}: torch can't export it: {reasons[-1]}")


def _plain(network: nn.Module) -> nn.Module:
    """A copy on the processor, in float32, evaluation mode and the default memory format."""
    return (
        copy_of(network).eval().to("cpu", torch.float32).to(memory_format=torch.contiguous_format)
    )


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
    """The largest difference between two networks on random inputs; ValueError where it is above the tolerance."""
    plain, difference, largest = _plain(network), 0.0, 1.0
    for size in (1, 3) if dynamic else (len(example),):
        x = _random(example, size)
        with torch.inference_mode():
            pairs = list(
                zip(pytree.tree_leaves(plain(x)), pytree.tree_leaves(written(x)), strict=True)
            )
        for expected, found in pairs:
            if expected.shape != found.shape:
                raise ValueError(
                    f"{file}: expected outputs of shape {tuple(expected.shape)}, as torch's, found {tuple(found.shape)}"
                )
            difference = max(
                difference, float((expected - found).abs().max().nan_to_num(torch.inf))
            )
            largest = max(largest, float(expected.abs().max()))
    if not difference <= tolerance * largest:
        raise ValueError(
            f"{file}: expected torch's outputs, at most {largest:.4g}, to a share of {tolerance:g}; they differ by {difference:.4g}"
        )
    return difference


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the exporters' advice to their developers."""
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
