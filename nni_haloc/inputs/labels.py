"""Check that labels are classes of a network's outputs; one line says what does not fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nni_haloc.utils.errors import DataError
from nni_haloc.utils.placement import HostCopy

IGNORED = -100
"""The label of a position without a class, as torch's cross-entropy has it."""

_SUM = 0.01
"""How far class probabilities may be from a sum of 1, as those in bfloat16 are."""
_SOFT = "one-hot labels and probabilities: pass labels.argmax(1)"


def images_and_labels(batch: Any) -> tuple[Any, Any]:
    """Return the two parts of a loader's batch.

    Raises:
        DataError: if it is not a pair.
    """
    if not isinstance(batch, Sequence) or len(batch) != 2:
        kind = type(batch).__name__
        found = f"{kind} of {len(batch)}" if isinstance(batch, Sequence) else kind
        raise DataError(f"loader: expected batches (images, labels), found {found}")
    return batch[0], batch[1]


def check_labels(labels: Any, outputs: Sequence[int], where: str = "labels") -> Tensor:
    """Check that labels are class indices that fit a network's outputs.

    A label is an integer from 0 to the number of outputs - 1: one for each image or, where the
    outputs have positions, one for each position, which may be `IGNORED`. Labels that are on
    another device are waited for.

    Args:
        labels: what a loader gave beside the images; ``(N,)`` or ``(N, ...)`` by positions.
        outputs: shape of the network's outputs, ``(N, classes)`` or ``(N, classes, ...)``.
        where: what the message begins with: ``val_loader``.

    Returns:
        The same labels as int64.

    Raises:
        DataError: says what was expected, what was found, and what to do.
    """
    found = check_form(labels, outputs, where)
    check_range(extremes(found), outputs[1], where)
    return found


def check_form(
    labels: Any, outputs: Sequence[int], where: str = "labels", *, soft: bool = False
) -> Tensor:
    """Check type and shape of labels, as `check_labels` does, but not their values.

    That waits for no device.

    Args:
        labels, outputs, where: see `check_labels`.
        soft: whether they may be class probabilities, floats of the outputs' shape.
    """
    if len(outputs) < 2:
        shape = tuple(outputs)
        raise DataError(f"{where}: expected a network's outputs (N, classes), found shape {shape}")
    if outputs[1] < 2:
        expected = "expected a network with an output for each class, at least 2"
        raise DataError(f"{where}: {expected}, found {outputs[1]}; a single output has no classes")
    classes = f"class indices, integers from 0 to {outputs[1] - 1}"
    if not isinstance(labels, Tensor):
        kind = type(labels).__name__
        raise DataError(f"{where}: expected a tensor of {classes}, found {kind}")
    shape, expected_shape = tuple(labels.shape), (outputs[0], *outputs[2:])
    if soft and labels.is_floating_point() and shape == tuple(outputs):
        return labels
    if labels.is_floating_point() or labels.is_complex():
        kind = str(labels.dtype).removeprefix("torch.")
        remedy = _SOFT if shape == tuple(outputs) else "whole numbers: pass labels.long()"
        raise DataError(f"{where}: expected {classes}, found {kind} of shape {shape}; {remedy}")
    if shape != expected_shape:
        remedy = ""
        if shape == tuple(outputs):
            remedy = "; one-hot labels: pass labels.argmax(1); several classes an image do not fit"
        elif shape == (outputs[0], 1, *outputs[2:]):
            remedy = "; pass labels.squeeze(1)"
        expected = f"expected {classes}, of shape {expected_shape}"
        raise DataError(f"{where}: {expected}, found shape {shape}{remedy}")
    return labels.long()


def extremes(labels: Tensor) -> tuple[int, int]:
    """Return the lowest and the highest label; ``(0, 0)`` where there is none.

    Where labels have positions, those that are `IGNORED` do not count.
    """
    values = HostCopy(labels).get()
    if values.ndim > 1:
        values = values[values != IGNORED]
    return (int(values.min()), int(values.max())) if values.size else (0, 0)


def check_range(found: tuple[int, int], outputs: int, where: str = "labels") -> None:
    """Check the lowest and the highest label against the number of outputs.

    Raises:
        DataError: names the label that has no output.
    """
    lowest, highest = found
    if lowest < 0 or highest >= outputs:
        expected = f"expected class indices from 0 to {outputs - 1}, one for each of the outputs"
        wrong = lowest if lowest < 0 else highest
        remedy = "number the classes as the network's outputs"
        if lowest == 1 and highest == outputs:
            remedy = "these begin at 1: subtract 1"
        raise DataError(f"{where}: {expected}, found {wrong}; {remedy}")


def worst_sum(labels: Tensor) -> float:
    """Return the sum of class probabilities, along axis 1, that is farthest from 1.

    Returns:
        That sum; NaN if a probability is negative or not a number.
    """
    sums = labels.detach().double().sum(1)
    sums = torch.where((labels >= 0).all(1), sums, math.nan).flatten()
    if not len(sums):
        return 1.0
    # NaN is the largest of all to torch.
    return float(sums[(sums - 1).abs().argmax()])


def check_sum(found: float, where: str = "labels") -> None:
    """Check `worst_sum` of class probabilities.

    Raises:
        DataError: says what was found.
    """
    if not abs(found - 1) <= _SUM:
        what = "negative ones or NaN" if math.isnan(found) else f"a sum of {found:.6g}"
        expected = "expected probabilities that sum to 1 for each image or position"
        raise DataError(f"{where}: {expected}, found {what}")


def renumbered(labels: Tensor, places: Tensor) -> Tensor:
    """Return the place of each label: ``places[labels]``, int64.

    Raises:
        DataError: if a label is no class index that has a place.
    """
    found = check_form(labels, (len(labels), max(2, len(places))))
    check_range(extremes(found), len(places))
    return places[found]


class LabelCheck:
    """Check the labels of a training's batches without waiting for a device.

    Values are looked at on the processor, where needed before a batch is moved (`look`); type and
    shape when the outputs are there. Of batches that are made on a device, the values of the first
    two are waited for.

    Args:
        soft: whether labels may be class probabilities of the outputs' shape, as mixup makes them.
    """

    def __init__(self, *, soft: bool = False) -> None:
        self._soft, self._extremes, self._sum = soft, (0, 0), 1.0
        self._unseen = 2
        """Batches on a device whose values are still to be looked at."""

    def look(self, batch: Any) -> None:
        """Take note of the labels in a batch ``(images, labels)`` before it is moved."""
        _, labels = images_and_labels(batch)
        if not isinstance(labels, Tensor) or labels.is_complex():
            return  # told when the outputs are there
        if labels.is_floating_point() and (not self._soft or labels.dim() < 2):
            return
        if labels.device.type != "cpu":
            if not self._unseen:
                return
            self._unseen -= 1
        if labels.is_floating_point():
            if abs(self._sum - 1) <= _SUM:
                self._sum = worst_sum(labels)
            return
        (lowest, highest), (low, high) = self._extremes, extremes(labels)
        self._extremes = min(lowest, low), max(highest, high)

    def __call__(self, labels: Any, outputs: Tensor) -> Tensor:
        """Check the labels of a batch against the network's outputs for it; see `check_labels`."""
        found = check_form(labels, outputs.shape, soft=self._soft)
        if found.is_floating_point():
            check_sum(self._sum)
        elif labels.device.type == "cpu":
            check_range(extremes(found), outputs.shape[1])
        else:
            check_range(self._extremes, outputs.shape[1])
        return found
