"""Reduced-rank regression for many ranks at once; linear algebra that the decompositions share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class ReducedRankFit:
    """Fit the best core and ``factor_out`` for a given ``factor_in``, at many ranks at once.

    Let ``A`` be the first r2 rows of ``factor_in``, repeated for each kernel position. Least
    squares gives ``B = W S A^T (A S A^T)^-1``; ``factor_out`` is the leading eigenvectors of
    ``B (A S A^T) B^T`` and the core is ``factor_out^T B`` (reduced-rank regression).

    With ``A S A^T = L L^T`` and ``P = W S A^T L^-T`` that matrix is ``P P^T``. Because the rank is
    the slow index, a leading block of L belongs to the leading rows of ``factor_in``, and ``P P^T``
    is a sum over those rows. So one Cholesky factorisation at the largest r2 serves every r2; only
    the eigenvectors ``(F, F)`` are computed for each. A ridge (see `_cholesky`) keeps dead channels
    and short samples solvable.

    Args:
        wsa: ``W S A^T`` at the largest r2, ``(F, r2 k)`` with k the number of kernel positions.
        asa: ``A S A^T`` at the largest r2, ``(r2 k, r2 k)``.
        factor_in: ``(r2, C)``.
        ranks_in: the values of r2, rising.

    Raises:
        torch.linalg.LinAlgError: if ``asa`` is not finite.
    """

    def __init__(
        self, wsa: Tensor, asa: Tensor, factor_in: Tensor, ranks_in: Sequence[int]
    ) -> None:
        self.factor_in, self.k = factor_in, wsa.shape[1] // factor_in.shape[0]
        self.cholesky = _cholesky(asa)
        self.p = torch.linalg.solve_triangular(self.cholesky, wsa.T, upper=False).T  # (F, r2 k)
        p, done = self.p.double(), 0
        gram = p.new_zeros(len(p), len(p))
        self.energies: dict[int, Tensor] = {}
        self.factors_out: dict[int, Tensor] = {}
        for r2 in ranks_in:
            block, done = p[:, done : r2 * self.k], r2 * self.k
            gram = gram + block @ block.T
            values, vectors = falling(gram)
            self.energies[r2], self.factors_out[r2] = values.cumsum(0), vectors.to(wsa)

    def energy(self, r1: int, r2: int) -> float:
        """Return ``tr(W S W^T)`` minus the squared error on the covariance, a lower bound.

        The ridge makes it slightly smaller than the factors really reach.
        """
        return float(self.energies[r2][r1 - 1])

    def factors(self, r1: int, r2: int) -> tuple[Tensor, Tensor]:
        """Return ``factor_out (F, r1)`` and the core ``(r1, r2 k)``."""
        out, n = self.factors_out[r2][:, :r1], r2 * self.k
        core = torch.linalg.solve_triangular(
            self.cholesky[:n, :n], out.T @ self.p[:, :n], upper=False, left=False
        )
        return out, core


def falling(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues, largest first, and the eigenvectors as columns in that order."""
    values, vectors = torch.linalg.eigh((symmetric + symmetric.T) / 2)
    return values.flip(0), vectors.flip(-1)


def rotate(x: Tensor, basis: Tensor) -> Tensor:
    """Express the channels of ``x (n, C k)`` in the columns of ``basis (C, r)``: ``(n, r k)``."""
    return torch.einsum("nck,cr->nrk", x.reshape(len(x), len(basis), -1), basis).flatten(1)


def truncation_errors(core: Tensor, covariance: Tensor, channels: int) -> Tensor:
    """Compute HOSVD's squared error on the covariance for all ranks at once.

    Truncation to ``(r1, r2)`` loses the rows from r1 on entirely, and of the other rows the input
    channels from r2 on. With ``e_i(r2)`` the energy of row i's tail the squared error is
    ``sum_(i < r1) e_i(r2) + sum_(i >= r1) e_i(0)``. The tails' energies are running sums over one
    matrix product.

    Args:
        core: the kernel in HOSVD's bases, ``(F, C k)``.
        covariance: the input patches' covariance in those bases, ``(C k, C k)``.
        channels: C.

    Returns:
        ``(F, C + 1)``; the error of ``(r1, r2)`` is at ``[r1 - 1, r2]``.
    """
    both = 2 * core @ covariance.triu().T - core * covariance.diagonal()
    shares = (core.double() * both.double()).reshape(len(core), channels, -1).sum(-1)  # (F, C)
    tails = F.pad(shares.flip(1).cumsum(1).flip(1), (0, 1))  # (F, C + 1)
    lost = tails[:, 0].sum() - tails[:, 0].cumsum(0)  # (F,): the rows from r1 on
    return (tails.cumsum(0) + lost[:, None]).clamp_min(0)


def _cholesky(symmetric: Tensor) -> Tensor:
    """Return the lower Cholesky factor of ``symmetric`` with the smallest ridge that suffices.

    The ridge starts at 1e-10 (float64) or 1e-6 of the mean eigenvalue, but never below the rounding
    error of the largest one: where a few patches leave most eigenvalues at zero, a smaller ridge
    divides rounding errors by each other, and the core came out 140 times as large as its kernel.
    """
    precision = torch.finfo(symmetric.dtype)
    mean = float(symmetric.diagonal().mean().clamp_min(precision.tiny))
    share = 1e-10 if symmetric.dtype == torch.float64 else 1e-6
    ridge = max(share * mean, precision.eps / 2 * float(symmetric.norm()))
    while ridge < 1e3 * mean:  # where the matrix is finite, less is enough
        factor, failed = torch.linalg.cholesky_ex(
            symmetric + ridge * torch.eye(len(symmetric)).to(symmetric)
        )
        if not failed:
            return factor
        ridge *= 10
    raise torch.linalg.LinAlgError("no ridge makes the covariance positive definite")


def roots(symmetric: Tensor, ridge: float = 1e-8) -> tuple[Tensor, Tensor]:
    """Return the square root and its inverse, with eigenvalues of at least ``ridge * mean``."""
    values, vectors = torch.linalg.eigh((symmetric + symmetric.T) / 2)
    values = values.clamp_min(ridge * float(values.mean().clamp_min(1e-300)))
    return (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T
