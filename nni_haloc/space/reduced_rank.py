"""Reduced-rank regression in a covariance, for many ranks at once, and the linear algebra that the decompositions share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class ReducedRankFit:
    """The best core and ``factor_out`` behind the leading rows of a ``factor_in``, for many ranks from one Cholesky factorisation.

    With ``A`` the first r2 rows of ``factor_in`` for each kernel position, least squares gives ``B = W S A^T (A S A^T)^-1``;
    ``factor_out`` is the leading eigenvectors of ``B (A S A^T) B^T`` and the core is ``factor_out^T B`` (reduced-rank regression). With
    ``A S A^T = L L^T`` and ``P = W S A^T L^-T`` that matrix is ``P P^T``. In rank-slow order a leading block of L belongs to the leading
    rows of ``factor_in``, and ``P P^T`` is a sum over them, so L and P at the largest r2 serve every r2; only the eigenvectors ``(F, F)``
    are taken for each.
    A ridge relative to the mean eigenvalue, raised until the factorisation succeeds, keeps dead channels and short samples solvable.

    ``wsa (F, r2 k)`` and ``asa (r2 k, r2 k)`` are ``W S A^T`` and ``A S A^T`` at the largest r2, k the number of kernel positions;
    ``ranks_in`` rises.
    """

    def __init__(
        self, wsa: Tensor, asa: Tensor, factor_in: Tensor, ranks_in: Sequence[int]
    ) -> None:
        self.factor_in, self.k = factor_in, wsa.shape[1] // factor_in.shape[0]
        self.cholesky = _cholesky(asa)
        self.p = torch.linalg.solve_triangular(self.cholesky, wsa.T, upper=False).T  # (F, r2 k)
        p, gram, done = (
            self.p.double(),
            wsa.new_zeros(wsa.shape[0], wsa.shape[0], dtype=torch.float64),
            0,
        )
        self.energies: dict[int, Tensor] = {}
        self.factors_out: dict[int, Tensor] = {}
        for r2 in ranks_in:
            block, done = p[:, done : r2 * self.k], r2 * self.k
            gram = gram + block @ block.T
            values, vectors = falling(gram)
            self.energies[r2], self.factors_out[r2] = values.cumsum(0), vectors.to(wsa)

    def energy(self, r1: int, r2: int) -> float:
        """``tr(W S W^T)`` less the squared error on the covariance, by which the ridge makes it no larger than it is."""
        return float(self.energies[r2][r1 - 1])

    def factors(self, r1: int, r2: int) -> tuple[Tensor, Tensor]:
        """``factor_out (F, r1)`` and the core ``(r1, r2 k)``."""
        out, n = self.factors_out[r2][:, :r1], r2 * self.k
        core = torch.linalg.solve_triangular(
            self.cholesky[:n, :n], out.T @ self.p[:, :n], upper=False, left=False
        )
        return out, core


def falling(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues by falling size and their eigenvectors as columns."""
    values, vectors = torch.linalg.eigh((symmetric + symmetric.T) / 2)
    return values.flip(0), vectors.flip(-1)


def rotate(x: Tensor, basis: Tensor) -> Tensor:
    """Columns of ``x (n, C k)`` from channels to the columns of ``basis (C, r)``: ``(n, r k)``."""
    return torch.einsum("nck,cr->nrk", x.reshape(len(x), len(basis), -1), basis).flatten(1)


def truncation_errors(core: Tensor, covariance: Tensor, channels: int) -> Tensor:
    """Squared errors of HOSVD on the covariance for all ranks at once, ``(F, C + 1)``: that of ``(r1, r2)`` at ``[r1 - 1, r2]``.

    ``core (F, C k)`` and ``covariance (C k, C k)`` are in HOSVD's bases. At ``(r1, r2)`` rows from r1 on are lost whole, the others from
    input channel r2 on: with ``e_i(r2)`` the energy of row i's tail, the error is ``sum_(i < r1) e_i(r2) + sum_(i >= r1) e_i(0)``, and
    the tails' energies are running sums over one matrix product.
    """
    both = 2 * core @ covariance.triu().T - core * covariance.diagonal()
    shares = (core.double() * both.double()).reshape(len(core), channels, -1).sum(-1)  # (F, C)
    tails = F.pad(shares.flip(1).cumsum(1).flip(1), (0, 1))  # (F, C + 1)
    lost = tails[:, 0].sum() - tails[:, 0].cumsum(0)  # (F,): the rows from r1 on
    return (tails.cumsum(0) + lost[:, None]).clamp_min(0)


def _cholesky(symmetric: Tensor) -> Tensor:
    """Lower factor of ``symmetric`` with the smallest sufficient ridge, from 1e-10 (float64) or 1e-6 of the mean eigenvalue on."""
    mean = float(symmetric.diagonal().mean().clamp_min(torch.finfo(symmetric.dtype).tiny))
    ridge = 1e-10 if symmetric.dtype == torch.float64 else 1e-6
    while ridge < 1e3:  # where the matrix is finite, less is enough
        factor, failed = torch.linalg.cholesky_ex(
            symmetric + ridge * mean * torch.eye(len(symmetric)).to(symmetric)
        )
        if not failed:
            return factor
        ridge *= 10
    raise torch.linalg.LinAlgError("no ridge makes the covariance positive definite")


def roots(symmetric: Tensor, ridge: float = 1e-8) -> tuple[Tensor, Tensor]:
    """Square root and inverse square root, with eigenvalues lifted to ``ridge`` times their mean."""
    values, vectors = torch.linalg.eigh((symmetric + symmetric.T) / 2)
    values = values.clamp_min(ridge * float(values.mean().clamp_min(1e-300)))
    return (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T
