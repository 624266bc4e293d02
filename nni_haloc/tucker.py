"""Eq. 1: Tucker-2 decomposition of a convolution kernel, and low-rank factors of a matrix.

A kernel ``W`` of shape ``(F, C, k1, k2)`` becomes ``factor_out (F, r1)``, ``core (r1, r2, k1, k2)`` and ``factor_in (r2, C)``;
a matrix ``(F, C)`` (linear layers, 1x1 convolutions) becomes ``left (F, r)`` and ``right (r, C)``.

Two aims. *By the weights* minimises ``||W - W'||``. *By the data* minimises ``E ||W x - W' x||^2`` over the input patches ``x`` that
the trained network really sees, given their covariance ``S = E[x x^T]`` (uncentred). All work is done in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Method = Literal["hosvd", "hooi", "data"]


class Tucker2(NamedTuple):
    """Factors of one kernel: ``factor_out (F, r1)``, ``core (r1, r2, k1, k2)``, ``factor_in (r2, C)``."""

    factor_out: Tensor
    core: Tensor
    factor_in: Tensor


class LowRank(NamedTuple):
    """Factors of one matrix: ``left (F, r)``, ``right (r, C)``."""

    left: Tensor
    right: Tensor


def reconstruct(factors: Tucker2 | LowRank) -> Tensor:
    """Eq. (1): the dense kernel ``(F, C, k1, k2)`` or matrix ``(F, C)`` that the factors stand for.

    >>> W = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    >>> torch.allclose(reconstruct(hosvd(W, [(4, 3)])[0]), W)
    True
    """
    if isinstance(factors, LowRank):
        return factors.left @ factors.right
    out, core, inn = factors
    r1, r2, k1, k2 = core.shape
    right = core.permute(0, 2, 3, 1).reshape(-1, r2) @ inn  # (r1 k1 k2, C); two plain matrix products, for this runs at every step
    return (out @ right.reshape(r1, -1)).reshape(out.shape[0], k1, k2, inn.shape[1]).permute(0, 3, 1, 2)


def output_error(weight: Tensor, approximation: Tensor, covariance: Tensor | None = None) -> float:
    """Relative error ``||(W - W') S^{1/2}|| / ||W S^{1/2}||``; with ``covariance=None``, S is the identity (the weight error).

    Shapes: both kernels ``(F, C, k1, k2)`` or ``(F, C)``; ``covariance (C k1 k2, C k1 k2)``, channels slowest, as ``unfold`` orders them.
    """
    w = weight.detach().double().flatten(1)
    d = w - approximation.detach().double().flatten(1)
    if covariance is None:
        return float(d.norm() / w.norm().clamp_min(1e-300))
    s = covariance.double()
    numerator, denominator = ((d @ s) * d).sum(), ((w @ s) * w).sum()
    return float((numerator.clamp_min(0) / denominator.clamp_min(1e-300)).sqrt())


def hosvd(weight: Tensor, ranks: Sequence[tuple[int, int]]) -> list[Tucker2]:
    """Truncated higher-order SVD of ``weight (F, C, k1, k2)`` for every ``(r1, r2)``; the eigenvectors are shared by all ranks."""
    w = weight.detach().double()
    u = _leading(w.flatten(1) @ w.flatten(1).T)  # (F, F), columns by falling eigenvalue
    wc = w.transpose(0, 1).flatten(1)
    v = _leading(wc @ wc.T)  # (C, C)
    return [_project(w, u[:, :r1], v[:, :r2].T) for r1, r2 in ranks]


def hooi(weight: Tensor, ranks: Sequence[tuple[int, int]]) -> list[Tucker2]:
    """Higher-order orthogonal iteration through tensorly, one run a rank."""
    from tensorly.decomposition import partial_tucker
    from tensorly.tenalg import multi_mode_dot

    w = weight.detach().double().cpu().numpy()
    found = []
    for r1, r2 in ranks:
        (_, (out, inn)), _ = partial_tucker(w, rank=[r1, r2], modes=[0, 1], init="svd")
        core = multi_mode_dot(w, [out.T, inn.T], modes=[0, 1])
        found.append(Tucker2(*(torch.from_numpy(a.copy()) for a in (out, core, inn.T))))
    return found


def data_aware(weight: Tensor, ranks: Sequence[tuple[int, int]], covariance: Tensor) -> list[Tucker2]:
    """Tucker-2 factors that keep the layer's *output* on the data, for every ``(r1, r2)``.

    ``covariance (C k1 k2, C k1 k2)`` is that of the input patches (see `output_error` for the order). ``factor_in`` comes from a closed
    form that ignores correlation between kernel positions; core and ``factor_out`` are then the optimum (reduced-rank regression).
    The closed form is not always the better ``factor_in``, so HOSVD's is tried too, and the plain HOSVD stands wherever the solve does not
    beat it: the error on the covariance is never above HOSVD's. Raises ValueError if the covariance has the wrong shape.
    """
    w = weight.detach().double()
    _f, c, k1, k2 = w.shape
    s = covariance.to(w).double()
    if s.shape != (c * k1 * k2, c * k1 * k2):
        raise ValueError(f"covariance must be {(c * k1 * k2,) * 2} for a kernel {tuple(w.shape)}, found {tuple(s.shape)}")
    s_in = s.reshape(c, k1 * k2, c, k1 * k2).diagonal(dim1=1, dim2=3).sum(-1)  # (C, C), summed over kernel positions
    root, inverse_root = _roots(s_in)
    weighted = torch.einsum("fcij,cd->dfij", w, root).flatten(1)
    v = _leading(weighted @ weighted.T)  # (C, C)

    found = []
    for (r1, r2), plain in zip(ranks, hosvd(weight, ranks), strict=True):
        best, best_error = plain, output_error(w, reconstruct(plain), s)
        for factor_in in (v[:, :r2].T @ inverse_root, plain.factor_in):
            try:
                fitted = _balance(reduced_rank_fit(w, factor_in, r1, s))
            except torch.linalg.LinAlgError:
                continue
            error = output_error(w, reconstruct(fitted), s)
            if error < best_error:
                best, best_error = fitted, error
        found.append(best)
    return found


def reduced_rank_fit(weight: Tensor, factor_in: Tensor, rank_out: int, covariance: Tensor) -> Tucker2:
    """The best core and ``factor_out`` behind a given ``factor_in (r2, C)``: least squares in the covariance, then reduced-rank regression.

    With ``A = factor_in (x) I``: ``B = W S A^T (A S A^T)^-1``; ``factor_out`` is the leading eigenvectors of ``B (A S A^T) B^T`` and
    the core is ``factor_out^T B``. A ridge relative to the mean eigenvalue keeps dead channels and short samples solvable.
    """
    _f, c, k1, k2 = weight.shape
    r2, kk = factor_in.shape[0], k1 * k2
    s4 = covariance.reshape(c, kk, c, kk)
    sa = torch.einsum("ckdl,rd->ckrl", s4, factor_in).reshape(c * kk, r2 * kk)  # S A^T
    asa = torch.einsum("rc,ckn->rkn", factor_in, sa.reshape(c, kk, -1)).reshape(r2 * kk, r2 * kk)
    asa = (asa + asa.T) / 2
    ridge = 1e-10 * asa.diagonal().mean().clamp_min(1e-300)
    asa_ridge = asa + ridge * torch.eye(r2 * kk, dtype=asa.dtype)
    b = torch.cholesky_solve((weight.flatten(1) @ sa).T, torch.linalg.cholesky(asa_ridge)).T  # (F, r2 kk)
    out = _leading(b @ asa @ b.T)[:, :rank_out]
    return Tucker2(out, (out.T @ b).reshape(rank_out, r2, k1, k2), factor_in)


def low_rank(weight: Tensor, ranks: Sequence[int], covariance: Tensor | None = None) -> list[LowRank]:
    """The optimal rank-r factors of ``weight (F, C)`` for every rank: truncated SVD or, with ``covariance (C, C)``, of ``W S^{1/2}``.

    The two factors share the singular values evenly, so that neither is much larger than the other in training.
    """
    w = weight.detach().double()
    gram = w @ (covariance.to(w).double() @ w.T if covariance is not None else w.T)
    u = _leading(gram)
    found = []
    for r in ranks:
        p, sigma, q = torch.linalg.svd(u[:, :r].T @ w, full_matrices=False)  # a small problem: r x C
        found.append(LowRank(u[:, :r] @ p * sigma.sqrt(), sigma.sqrt()[:, None] * q))
    return found


def decompose(
    weight: Tensor, ranks: Sequence[tuple[int, ...]], method: Method = "hosvd", covariance: Tensor | None = None
) -> list[Tucker2 | LowRank]:
    """Factors of one kernel for every rank, by ``method``: ``hosvd``, ``hooi``, or ``data`` (needs the patch covariance).

    A kernel ``(F, C, k1, k2)`` takes ranks ``(r1, r2)``; a matrix ``(F, C)`` takes ``(r,)``, where all methods by the weights agree.
    """
    if method not in get_args(Method):
        raise ValueError(f"decomposition: expected one of {', '.join(get_args(Method))}, found {method!r}")
    if method == "data" and covariance is None:
        raise ValueError("decomposition by the data needs the covariance of the layer's input patches")
    if weight.dim() == 2:
        return list(low_rank(weight, [r[0] for r in ranks], covariance if method == "data" else None))
    pairs = [(r[0], r[1]) for r in ranks]
    if method == "data":
        assert covariance is not None
        return list(data_aware(weight, pairs, covariance))
    return list(hosvd(weight, pairs) if method == "hosvd" else hooi(weight, pairs))


def _leading(symmetric: Tensor) -> Tensor:
    """Eigenvectors as columns, by falling eigenvalue."""
    return torch.linalg.eigh((symmetric + symmetric.T) / 2).eigenvectors.flip(-1)


def _project(w: Tensor, out: Tensor, inn: Tensor) -> Tucker2:
    core = torch.einsum("fr,fcij,sc->rsij", out, w, inn)
    return Tucker2(out, core, inn)


def _roots(symmetric: Tensor, ridge: float = 1e-8) -> tuple[Tensor, Tensor]:
    """Square root and inverse square root, with eigenvalues lifted to ``ridge`` times their mean."""
    values, vectors = torch.linalg.eigh((symmetric + symmetric.T) / 2)
    values = values.clamp_min(ridge * float(values.mean().clamp_min(1e-300)))
    return (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T


def _balance(factors: Tucker2) -> Tucker2:
    """The same kernel with orthonormal outer factors: an ill-scaled ``factor_in`` trains badly."""
    q, r = torch.linalg.qr(factors.factor_in.T)  # factor_in = r^T q^T
    return Tucker2(factors.factor_out, torch.einsum("rsij,ts->rtij", factors.core, r), q.T)
