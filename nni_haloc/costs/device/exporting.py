"""Export a network by torch.export, and check what is written of it against torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nni_haloc.space.modules import copy_of, set_precision
from nni_haloc.space.outputs import NAMES
from nni_haloc.space.outputs import plain as plain_output
from nni_haloc.utils.errors import first_line
from nni_haloc.utils.files import whole
from nni_haloc.utils.log import logger
from nni_haloc.utils.quiet import quietly


def export_program(
    network: nn.Module, example: Tensor, file: str | Path, *, tolerance: float = 1e-4
) -> float:
    """Write a network as a program of torch.export (``.pt2``), which only torch runs.

    For arguments, result and errors see `export_onnx`.
    """
    with whole(file) as part:
        program, dynamic = traced(network, example)
        with quietly():
            torch.export.save(program, part)
            loaded = torch.export.load(part).module()
        return checked(network, loaded, example, dynamic, file, tolerance)


def traced(network: nn.Module, example: Tensor) -> tuple[Any, bool]:
    """Return a network as an exported program, and whether that takes any batch size.

    Args:
        network: what to export; it is left as it is.
        example: an input, ``(N, ...)``, of which only the shape counts.

    Raises:
        ValueError: if torch can't export it.
    """
    copied, name, reasons = plain_copy(network, example), type(network).__name__, []
    for size, shapes in ((2, ({0: torch.export.Dim("batch")},)), (len(example), None)):
        try:
            with quietly():
                program = torch.export.export(
                    copied, (random_images(example, size),), dynamic_shapes=shapes
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


def plain_copy(network: nn.Module, example: Tensor) -> nn.Module:
    """Copy to the processor, in float32, evaluation mode and the default memory format.

    The copy returns a tensor, or tensors in plain containers.

    Args:
        network: what to copy.
        example: an input, ``(N, ...)``, of which only the shape counts.
    """
    copied = copy_of(network).eval().cpu()
    set_precision(copied, torch.float32)
    copied = copied.to(memory_format=torch.contiguous_format)
    with suppress(Exception), torch.inference_mode():  # an exporter has a message of its own
        if not isinstance(copied(random_images(example, len(example))), Tensor):
            return _Plain(copied)
    return copied


class OpenedNetwork(nn.Module):
    """Computes a network's outputs by another runtime.

    Called with a tensor ``(N, ...)`` it returns a tensor, or a tuple or dict as `outputs_as` does.

    Args:
        run: computes the outputs, as arrays of numpy, of images as an array.
        names: of the outputs.
        batch: the only batch size that ``run`` takes (None: any).
    """

    def __init__(
        self, run: Callable[[Any], Sequence[Any]], names: Sequence[str], batch: int | None = None
    ) -> None:
        super().__init__()
        self._run, self._names, self.batch = run, names, batch

    def forward(self, x: Tensor) -> Any:
        outputs = self._run(x.detach().cpu().contiguous().numpy())
        return outputs_as(self._names, [torch.tensor(y, device=x.device) for y in outputs])


def outputs_as(names: Sequence[str], tensors: Sequence[Tensor]) -> Any:
    """Return a file's outputs as a network returns them: a tensor, a tuple, or a dict.

    Args:
        names: of the outputs. If one of them is called as logits are (see
            `nni_haloc.space.outputs.logits_of`), the result is a dict.
        tensors: the outputs.
    """
    if set(names) & set(NAMES):
        return dict(zip(names, tensors, strict=True))
    return tensors[0] if len(tensors) == 1 else tuple(tensors)


def names_of(program: Any) -> list[str] | None:
    """Return the names of an exported program's outputs, if all of them have one.

    Args:
        program: the exported program.
    """
    spec = program.call_spec.out_spec
    output = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    named = isinstance(output, dict) and all(isinstance(place, int) for place in output.values())
    return list(output) if named else None


def random_images(example: Tensor, size: int) -> Tensor:
    """Return random images of an example's shape, the same ones for each batch size."""
    return torch.randn((size, *example.shape[1:]), generator=torch.Generator().manual_seed(size))


def checked(
    network: nn.Module,
    written: Callable[[Tensor], Any],
    example: Tensor,
    dynamic: bool,
    file: str | Path,
    tolerance: float,
) -> float:
    """Return the largest difference of the outputs from torch's, on random inputs.

    Args:
        network: the network in torch.
        written: what was made of it: called with images, it returns the same tensors.
        example: an input, ``(N, ...)``, of which only the shape counts.
        dynamic: whether ``written`` takes any batch size.
        file: what messages name.
        tolerance: largest difference, as a share of the largest output (or of 1).

    Raises:
        ValueError: if an output has another shape, or differs by more.
    """
    copied, difference, largest = plain_copy(network, example), 0.0, 1.0
    for size in (1, 3) if dynamic else (len(example),):
        x = random_images(example, size)
        with torch.inference_mode():
            pairs = list(
                zip(pytree.tree_leaves(copied(x)), pytree.tree_leaves(written(x)), strict=True)
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


def difference_of(
    network: Callable[[Tensor], Any],
    written: Callable[[Tensor], Any],
    batches: Sequence[Tensor],
    file: str | Path,
) -> float:
    """Return the largest difference of a quantized network's outputs from torch's.

    Args:
        network: the network in torch, in evaluation mode.
        written: what was made of it in 8 bits.
        batches: images.
        file: what messages name.

    Raises:
        ValueError: if an output is not finite.
    """
    difference = 0.0
    with torch.inference_mode():
        for images in batches:
            leaves = pytree.tree_leaves(network(images)), pytree.tree_leaves(written(images))
            for expected, output in zip(*leaves, strict=True):
                largest = float((expected - output).abs().max().nan_to_num(torch.inf))
                difference = max(difference, largest)
    if not math.isfinite(difference):
        raise ValueError(f"{file}: quantized, it computes numbers that are not finite")
    return difference
