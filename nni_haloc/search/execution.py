"""Choose the cheapest of several exact ways to run a candidate and to take the gate gradients.

A decomposed layer is a linear map, so it may run as its small convolutions or as one convolution
with its dense kernel: the same function, the same gradients. Convolutions of few channels are bound
by memory, not by arithmetic, so work counts both: multiply-accumulates, and elements read and
written at `BALANCE` multiply-accumulates each. Work is counted, never timed, because a search must
repeat exactly.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from math import prod

from nni_haloc.space.layers import LayerSpec
from nni_haloc.space.names import Rank
from nni_haloc.space.ranks import macs, params

BALANCE = 64
"""Multiply-accumulates in the time that moving one element takes.

From training passes of ResNet-20's layers, oneDNN on x86 (docs/benchmarks.md).
"""


@lru_cache(maxsize=4096)
def work(spec: LayerSpec, rank: Rank, shape: tuple[int, ...]) -> int:
    """Count the work of one pass of a candidate.

    Args:
        spec: the layer.
        rank: the candidate's rank; None is the dense layer.
        shape: of the batch that it runs on, ``(N, C, H, W)`` or ``(N, ..., C)``.

    Returns:
        Work in multiply-accumulates.
    """
    out = spec.output_shape(shape)
    if spec.kind == "linear":
        before = after = prod(shape[:-1])
    else:
        before, after = shape[0] * prod(shape[2:]), out[0] * prod(out[2:])
    moved = before * spec.in_channels + after * spec.out_channels
    if rank is not None:  # what lies between the factors is written and read
        moved += 2 * (after * rank[0] + (before * rank[1] if spec.kind == "conv" else 0))
    return shape[0] * macs(replace(spec, input_shapes=(shape,)), rank) + BALANCE * moved


@lru_cache(maxsize=4096)
def contraction_work(spec: LayerSpec, rank: Rank) -> int:
    """Count the work of ``<G, W_j>`` from the factors; forming ``W_j`` takes the same products."""
    kernel = spec.out_channels * spec.in_channels * prod(spec.kernel_size)
    if rank is None:
        return kernel
    moved = BALANCE * (kernel + params(spec, rank))
    if spec.kind != "conv":
        return kernel * rank[0] + moved
    return kernel * rank[0] + rank[0] * rank[1] * prod(spec.kernel_size) * spec.in_channels + moved


def runs_dense(spec: LayerSpec, rank: Rank, shape: tuple[int, ...]) -> bool:
    """Tell whether a candidate runs cheaper with its dense kernel, the forming of that included."""
    if rank is None:
        return True
    return work(spec, None, shape) + contraction_work(spec, rank) < work(spec, rank, shape)


def contracts(spec: LayerSpec, ranks: Iterable[Rank], shape: tuple[int, ...]) -> bool:
    """Tell whether gate gradients are cheaper from the dense weight gradient.

    The alternative is to run every candidate. The work of the first way does not shrink with the
    batch, that of the second does not shrink with the kernel.
    """
    ranks = list(ranks)
    contraction = work(spec, None, shape) + sum(contraction_work(spec, rank) for rank in ranks)
    return contraction <= sum(work(spec, rank, shape) for rank in ranks)
