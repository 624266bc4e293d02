"""Take the logits from whatever a network returns; compare them with labels or another's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from nni_haloc.inputs.labels import IGNORED
from nni_haloc.utils.errors import HalocError, printable

NAMES = ("logits", "out", "output")
"""Names of the logits among several outputs; the first that is there counts."""


_DEEPEST = 50
"""Containers that a tensor of an output may be in, one in another."""


def logits_of(output: Any) -> Tensor:
    """Return the logits of a network's output.

    A tensor is the logits. Of outputs with names (a dict, a named tuple, a dataclass, any object
    with attributes) they are ``logits``, ``out`` or ``output``; of a dict or a dataclass without
    these names, its only tensor. Of a tuple or list they are the first tensor that has classes
    (two dimensions or more: a loss may come first).

    >>> import torch
    >>> logits_of({"features": torch.zeros(2, 8), "logits": torch.ones(2, 3)}).shape
    torch.Size([2, 3])

    Args:
        output: what the network has returned.

    Returns:
        ``(N, classes)``, or ``(N, classes, ...)`` with a place for each position.

    Raises:
        HalocError: if it is not clear which tensor they are, or the tensor has another form.
    """
    logits = _found(output)
    if logits is None or logits.dim() < 2:
        shape = None if logits is None else tuple(logits.shape)
        found = f"a tensor of shape {shape}" if shape is not None else _described(output)
        raise HalocError(
            "the network's output: expected logits (N, classes) or (N, classes, ...), a tensor or"
            f" an entry {', '.join(NAMES[:-1])} or {NAMES[-1]}, found {found}"
        )
    return logits


def plain(output: Any) -> Any:
    """Return an output's tensors in plain containers, which files for other runtimes can have.

    Named tuples, dataclasses and other objects become dicts; what holds no tensor goes.

    Args:
        output: what a network has returned.

    Returns:
        A tensor, or a tuple or dict of such; None if it holds no tensor.

    Raises:
        HalocError: if it contains itself, or is nested too deeply.
    """
    return _plain(output, ())


def _plain(output: Any, around: Sequence[Any]) -> Any:
    """Return `plain` of what is inside other containers."""
    if isinstance(output, Tensor):
        return output
    around = _within(output, around)
    if isinstance(output, tuple | list) and not hasattr(output, "_asdict"):
        return tuple(p for part in output if (p := _plain(part, around)) is not None) or None
    found = {str(name): _plain(value, around) for name, value in _entries(output).items()}
    return {name: value for name, value in found.items() if value is not None} or None


def _within(output: Any, around: Sequence[Any]) -> Sequence[Any]:
    """Return the containers around what is in an output.

    Raises:
        HalocError: if an output is inside itself, or too deep.
    """
    if len(around) == _DEEPEST or any(output is each for each in around):
        kind = type(output).__name__
        what = f"nested more than {_DEEPEST} times" if len(around) == _DEEPEST else "inside itself"
        raise HalocError(f"the network's output: expected tensors, found a {kind} {what}")
    return (*around, output)


def _found(output: Any, around: Sequence[Any] = ()) -> Tensor | None:
    """Return the tensor that the rule of `logits_of` leads to, if there is one."""
    if output is None or isinstance(output, Tensor):
        return output
    around, named = _within(output, around), _entries(output)
    for name in NAMES:
        if named.get(name) is not None:
            return _found(named[name], around)
    if isinstance(output, tuple | list):
        inner = (found for part in output if (found := _found(part, around)) is not None)
        return next((tensor for tensor in inner if tensor.dim() > 1), None)
    tensors = [value for value in named.values() if isinstance(value, Tensor)]
    return tensors[0] if len(tensors) == 1 else None


def _entries(output: Any) -> Mapping[str, Any]:
    """Return an output's named entries."""
    if isinstance(output, Mapping):
        return output
    if hasattr(output, "_asdict"):
        return output._asdict()
    slots = getattr(type(output), "__slots__", ())
    others = {name: getattr(output, name) for name in (*slots, *NAMES) if hasattr(output, name)}
    return {**getattr(output, "__dict__", {}), **others}


def _described(output: Any) -> str:
    """Say what an output is, for a message."""
    names = ", ".join(map(str, _entries(output)))
    kind = type(output).__name__
    return printable(f"a {kind} with {names}" if names else f"a {kind}", 200)


def divergence(logits: Tensor, target: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence of probabilities from a target's.

    Logits of a single class are those of its probability.

    Args:
        logits: ``(N, classes, ...)``.
        target: those of the target, of the same shape.

    Returns:
        The divergence at each position, ``(N, ...)``.

    Raises:
        ValueError: if the shapes differ.
    """
    if logits.shape != target.shape:
        shapes = f"{tuple(logits.shape)} and {tuple(target.shape)}"
        raise ValueError(f"the two networks' outputs: expected logits of one shape, found {shapes}")
    if logits.shape[1] == 1:
        p = target.sigmoid()
        least = F.binary_cross_entropy_with_logits(target, p, reduction="none")
        return (F.binary_cross_entropy_with_logits(logits, p, reduction="none") - least).squeeze(1)
    log_q, log_p = logits.log_softmax(1), target.log_softmax(1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy over the labels that count; 0 where none does.

    Args:
        logits: ``(N, classes, ...)``.
        labels: class indices ``(N, ...)``, of which those that are `IGNORED` do not count, or
            class probabilities ``(N, classes, ...)``.
    """
    if labels.is_floating_point():
        return F.cross_entropy(logits, labels.to(logits.dtype))
    if labels.dim() < 2:  # no positions, so all of them count
        return F.cross_entropy(logits, labels)
    total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


def hits(logits: Tensor, labels: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """Count the labels that are among the k classes of the largest logits. No device is waited for.

    >>> import torch
    >>> logits = torch.tensor([[0.1, 0.9], [0.8, 0.2]])
    >>> hits(logits, torch.tensor([1, 1]))
    (tensor(1), tensor(2))

    Args:
        logits: ``(N, classes, ...)``.
        labels: see `cross_entropy`; of probabilities the largest is the label.
        k: how many classes.

    Returns:
        The number of hits and that of labels that count.

    Raises:
        ValueError: if there are fewer classes than ``k``.
    """
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"top-{k}: expected at least {k} classes, found {logits.shape[1]}")
    if labels.is_floating_point():
        labels = labels.argmax(1)
    best = logits.topk(k, 1).indices if k > 1 else logits.argmax(1, keepdim=True)
    counted = labels != IGNORED
    return ((best == labels.unsqueeze(1)).any(1) & counted).sum(), counted.sum()
