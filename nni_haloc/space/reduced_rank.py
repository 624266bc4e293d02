"""Reduced-rank regression for many ranks at once; linear algebra that the decompositions share.

All matrices may have leading dimensions: one for each of several layers. What is computed stays on
their device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

_BYTES = 2**24
"""About as much memory is taken by matrices whose eigenvectors are computed in one call."""


class ReducedRankFit:
    """Fit the best core and ``factor_out`` for a given ``factor_in``, at many ranks at once.

    Let ``A`` be the first r2 rows of ``factor_in``, repeated for each kernel position. Least
    squares gives ``B = W S A^T (A S A^T)^-1``; ``factor_out`` is the leading eigenvectors of
    ``B (A S A^T) B^T`` and the core is ``factor_out^T B`` (reduced-rank regression).

    With ``A S A^T = L L^T`` and ``P = W S A^T L^-T`` that matrix is ``P P^T``. Because the rank is
    the slow index, a leading block of L belongs to the leading rows of ``factor_in``, and ``P P^T``
    is a sum over those rows. So one Cholesky factorisation at the largest r2 serves every r2; only
    the eigenvectors ``(F, F)`` are computed for each, all in one call. A ridge (see `_cholesky`)
    keeps dead channels and short samples solvable.

    Args:
        wsa: ``W S A^T`` at the largest r2, ``(..., F, r2 k)`` with k the number of kernel
            positions.
        asa: ``A S A^T`` at the largest r2, ``(..., r2 k, r2 k)``.
        factor_in: ``(..., r2, C)``.
        ranks_in: the values of r2, rising.

    Raises:
        torch.linalg.LinAlgError: if ``asa`` is not finite.
    """

    def __init__(
        self, wsa: Tensor, asa: Tensor, factor_in: Tensor, ranks_in: Sequence[int]
    ) -> None:
        self.factor_in, self.k = factor_in, wsa.shape[-1] // factor_in.shape[-2]
        self.cholesky = _cholesky(asa)
        self.p = torch.linalg.solve_triangular(self.cholesky, wsa.mT, upper=False).mT
        # In float64, because an energy is compared with what is left of the whole by another.
        p, done = self.p.double(), 0
        gram = p.new_zeros(*p.shape[:-1], p.shape[-2])
        self._energies: dict[int, Tensor] = {}
        self._factors_out: dict[int, Tensor] = {}
        at_once = max(1, _BYTES // gram.nbytes)
        for start in range(0, len(ranks_in), at_once):
            some, grams = ranks_in[start : start + at_once], []
            for r2 in some:
                block, done = p[..., done : r2 * self.k], r2 * self.k
                gram = gram + block @ block.mT
                grams.append(gram)
            values, vectors = falling(torch.stack(grams))
            self._energies.update(zip(some, values.cumsum(-1), strict=True))
            self._factors_out.update(zip(some, vectors.to(wsa), strict=True))

    def energies(self, ranks: Sequence[tuple[int, int]]) -> Tensor:
        """Return ``tr(W S W^T)`` minus the squared error on the covariance, a lower bound.

        The ridge makes it slightly smaller than the factors really reach.

        Args:
            ranks: pairs ``(r1, r2)``.

        Returns:
            ``(..., len(ranks))``, float64.
        """
        return torch.stack([self._energies[r2][..., r1 - 1] for r1, r2 in ranks], -1)

    def factors(self, r1: int, r2: int) -> tuple[Tensor, Tensor]:
        """Return ``factor_out (..., F, r1)`` and the core ``(..., r1, r2 k)``."""
        out, n = self._factors_out[r2][..., :r1], r2 * self.k
        core = torch.linalg.solve_triangular(
            self.cholesky[..., :n, :n], out.mT @ self.p[..., :n], upper=False, left=False
        )
        return out, core


def falling(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues, largest first, and the eigenvectors as columns in that order."""
    values, vectors = torch.linalg.eigh(symmetric)
    return values.flip(-1), vectors.flip(-1)


def rotate(x: Tensor, basis: Tensor) -> Tensor:
    """Express the channels of ``x (..., n, C k)`` in the columns of ``basis (..., C, r)``.

    Returns:
        ``(..., n, r k)``.
    """
    by_channel = x.unflatten(-1, (basis.shape[-2], -1))
    return torch.einsum("...nck,...cr->...nrk", by_channel, basis).flatten(-2)


def truncation_errors(core: Tensor, covariance: Tensor, channels: int) -> Tensor:
    """Compute HOSVD's squared error on the covariance for all ranks at once.

    Truncation to ``(r1, r2)`` loses the rows from r1 on entirely, and of the other rows the input
    channels from r2 on. With ``e_i(r2)`` the energy of row i's tail the squared error is
    ``sum_(i < r1) e_i(r2) + sum_(i >= r1) e_i(0)``. The tails' energies are running sums over one
    matrix product.

    Args:
        core: the kernel in HOSVD's bases, ``(..., F, C k)``.
        covariance: the input patches' covariance in those bases, ``(..., C k, C k)``.
        channels: C.

    Returns:
        ``(..., F, C + 1)``; the error of ``(r1, r2)`` is at ``[..., r1 - 1, r2]``.
    """
    diagonal = covariance.diagonal(dim1=-2, dim2=-1)
    both = 2 * core @ covariance.triu().mT - core * diagonal[..., None, :]
    shares = (core.double() * both.double()).unflatten(-1, (channels, -1)).sum(-1)  # (..., F, C)
    tails = F.pad(shares.flip(-1).cumsum(-1).flip(-1), (0, 1))  # (..., F, C + 1)
    whole = tails[..., :1]
    lost = whole.sum(-2, keepdim=True) - whole.cumsum(-2)  # (..., F, 1): the rows from r1 on
    return (tails.cumsum(-2) + lost).clamp_min(0)


def _cholesky(symmetric: Tensor) -> Tensor:
    """Return the lower Cholesky factors of matrices, each with the smallest ridge that suffices.

    The ridge starts at 1e-10 (float64) or 1e-6 of the mean eigenvalue, but never below the rounding
    error of the largest one: where a few patches leave most eigenvalues at zero, a smaller ridge
    divides rounding errors by each other, and the core came out 140 times as large as its kernel.
    """
    precision = torch.finfo(symmetric.dtype)
    mean = symmetric.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(precision.tiny)
    share = 1e-10 if symmetric.dtype == torch.float64 else 1e-6
    rounding = precision.eps / 2 * torch.linalg.matrix_norm(symmetric)
    ridge = torch.maximum(share * mean, rounding)
    while True:
        damped = symmetric.clone()
        damped.diagonal(dim1=-2, dim2=-1).add_(ridge[..., None])
        factor, info = torch.linalg.cholesky_ex(damped)
        failed = info > 0
        finite = ridge < 1e3 * mean  # where the matrix is finite, less is enough
        # The one wait for the device.
        some_failed, none_helps = torch.stack([failed.any(), ~finite.all()]).tolist()
        if none_helps:
            raise torch.linalg.LinAlgError("no ridge makes the covariance positive definite")
        if not some_failed:
            return factor
        ridge = torch.where(failed, 10 * ridge, ridge)


def roots(symmetric: Tensor, ridge: float = 1e-8) -> tuple[Tensor, Tensor]:
    """Return the square root and its inverse, with eigenvalues of at least ``ridge * mean``."""
    values, vectors = torch.linalg.eigh(symmetric)
    least = ridge * values.mean(-1, keepdim=True).clamp_min(1e-300)
    scales = values.clamp_min(least).sqrt()[..., None, :]
    return (vectors * scales) @ vectors.mT, (vectors / scales) @ vectors.mT


@contextmanager
def exact_products() -> Iterator[None]:
    """Multiply matrices in their own precision for a block's time, or as a function's decorator.

    A job allows CUDA devices to multiply float32 matrices in TF32, with 10 bits of precision: good
    for training, but eigenvalues of a covariance differ by more than that.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
