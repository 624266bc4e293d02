"""Tucker-2 decomposition of convolution kernels, Eq. (1), and low-rank factors of matrices.

A kernel ``W`` of shape ``(F, C, k1, k2)`` becomes ``factor_out (F, r1)``, ``core (r1, r2, k1, k2)``
and ``factor_in (r2, C)``; a matrix ``(F, C)`` (linear layers, 1x1 convolutions) becomes
``left (F, r)`` and ``right (r, C)``.

There are two aims. *By the weights* minimises ``||W - W'||``. *By the data* minimises
``E ||W x - W' x||^2`` over the input patches ``x`` that the trained network really sees, given
their covariance ``S = E[x x^T]`` (uncentred).

Each method takes L kernels of one shape at once, on any device, and makes the factors of all of
them for a rank: the device gets a few large pieces of work instead of many small ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from nni_haloc.inputs.options import Decomposition
from nni_haloc.space.reduced_rank import (
    ReducedRankFit,
    exact_products,
    falling,
    roots,
    rotate,
    truncation_errors,
)


class Tucker2(NamedTuple):
    """The factors of one kernel; of several, with a first dimension L.

    Attributes:
        factor_out: ``(F, r1)``.
        core: ``(r1, r2, k1, k2)``.
        factor_in: ``(r2, C)``.
    """

    factor_out: Tensor
    core: Tensor
    factor_in: Tensor


class LowRank(NamedTuple):
    """The factors of one matrix; of several, with a first dimension L.

    Attributes:
        left: ``(F, r)``.
        right: ``(r, C)``.
    """

    left: Tensor
    right: Tensor


def reconstruct(factors: Tucker2 | LowRank) -> Tensor:
    """Multiply the factors out, Eq. (1): a kernel ``(F, C, k1, k2)`` or a matrix ``(F, C)``.

    >>> W = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    >>> torch.allclose(reconstruct(decompose(W, [(4, 3)], "hosvd")[0]), W)
    True
    """
    if isinstance(factors, LowRank):
        return factors.left @ factors.right
    out, core, inn = factors
    r1, r2, k1, k2 = core.shape
    # Two plain matrix products, because this runs at every step; the first is (r1 k1 k2, C).
    right = core.permute(0, 2, 3, 1).reshape(-1, r2) @ inn
    return (
        (out @ right.reshape(r1, -1))
        .reshape(out.shape[0], k1, k2, inn.shape[1])
        .permute(0, 3, 1, 2)
    )


def output_errors(
    weight: Tensor, approximations: Iterable[Tensor], covariance: Tensor | None = None
) -> Tensor:
    """Compute relative errors ``||(W - W') S^{1/2}|| / ||W S^{1/2}||`` of approximations W'.

    Args:
        weight: the kernel W, ``(F, C, k1, k2)`` or ``(F, C)``.
        approximations: some W', each of the same shape; taken one after another.
        covariance: S of the input patches, ``(C k1 k2, C k1 k2)``, channels slowest as ``unfold``
            orders them (None: the identity, which gives the errors of the weights).

    Returns:
        One error for each approximation, float64, on the weight's device.
    """
    w = weight.detach().double().flatten(1)
    s = None if covariance is None else covariance.double()

    def energy(x: Tensor) -> Tensor:
        return ((x if s is None else x @ s) * x).sum().clamp_min(0)

    lost = [energy(w - each.detach().double().flatten(1)) for each in approximations]
    return (torch.stack(lost) / energy(w).clamp_min(1e-300)).sqrt()


def output_error(weight: Tensor, approximation: Tensor, covariance: Tensor | None = None) -> float:
    """Compute the relative error of one approximation, see `output_errors`."""
    return float(output_errors(weight, [approximation], covariance))


def hosvd(weights: Tensor, ranks: Sequence[tuple[int, int]]) -> list[Tucker2]:
    """Compute the truncated higher-order SVD at many ranks, cut from one in float64.

    Args:
        weights: L kernels, ``(L, F, C, k1, k2)``.
        ranks: pairs ``(r1, r2)``.

    Returns:
        For each rank the factors of all kernels.
    """
    w = weights.detach().double()
    u, v, core = _hosvd_bases(w)
    return [_cut(u, core.reshape(w.shape), v, *rank) for rank in ranks]


def _cut(u: Tensor, core: Tensor, v: Tensor, r1: int, r2: int) -> Tucker2:
    """Cut factors from HOSVD's bases and the kernels ``(L, F, C, k1, k2)`` in them."""
    return Tucker2(u[..., :r1], core[:, :r1, :r2], v[..., :r2].mT)


def _choose(condition: Tensor, ours: Tucker2, plain: Tucker2) -> Tucker2:
    """Take a kernel's factors from ``ours`` where its condition ``(L,)`` holds, or ``plain``."""
    return Tucker2(
        *(
            torch.where(condition.reshape(-1, *[1] * (a.dim() - 1)), a, b)
            for a, b in zip(ours, plain, strict=True)
        )
    )


def warm_hooi(weights: Tensor, ranks: Sequence[tuple[int, int]]) -> list[Tucker2]:
    """Run higher-order orthogonal iteration (HOOI) along a chain of falling ranks.

    Each rank starts from the input factors of the rank above. Half a sweep takes the leading
    eigenvectors of the Gram matrix of the kernel projected on the other side. The iteration ends
    once the second half of a sweep lowers the error by less than 0.5 % of itself at 512 channels,
    in proportion less at fewer. On random kernels, the worst case, the error is then within 0.5 %
    of tensorly's, in wide layers after one sweep. HOSVD's factors are kept wherever they are as
    good. The precision is that of ``weights``, float32 or wider.

    Args:
        weights: L kernels, ``(L, F, C, k1, k2)``.
        ranks: pairs ``(r1, r2)``.

    Returns:
        For each rank the factors of all kernels.
    """
    w = weights.detach().to(torch.promote_types(weights.dtype, torch.float32))
    f, c, k1, k2 = w.shape[1:]
    grams = _grams(w)
    u0, v0, core0 = _hosvd_bases(w, grams)
    energies = core0.square().unflatten(-1, (c, -1)).sum(-1, dtype=torch.float64)
    hosvd_energy, core0 = energies.cumsum(1).cumsum(2), core0.reshape(w.shape)
    by_position = w.flatten(3).transpose(2, 3)  # (L, F, k1 k2, C)
    sides = _Sides(by_position.flatten(1, 2), by_position.transpose(1, 3).flatten(1, 2), *grams)
    few = min(f, c) <= 64  # with few channels, optima differ
    if few:
        sides = _Sides(*(torch.cat([side, side]) for side in sides))
    by_rank, v = {}, v0
    for r1, r2 in sorted(set(ranks), key=lambda r: (r[0] + r[1], r), reverse=True):
        u, v = _sweeps(sides, torch.cat([v, v0]) if few else v, r1, r2)
        core = u[..., :r1].mT @ (sides.rows_out @ v[..., :r2]).reshape(len(u), f, -1)
        energy = core.square().sum((1, 2), dtype=torch.float64)
        if few:
            best = energy.reshape(2, -1).argmax(0) * len(w) + torch.arange(len(w), device=w.device)
            u, v, core, energy = u[best], v[best], core[best], energy[best]
        ours = Tucker2(
            u[..., :r1],
            core.reshape(-1, r1, k1, k2, r2).permute(0, 1, 4, 2, 3),
            v[..., :r2].mT,
        )
        better = energy > hosvd_energy[:, r1 - 1, r2 - 1]
        by_rank[r1, r2] = _choose(better, ours, _cut(u0, core0, v0, r1, r2))
    return [by_rank[rank] for rank in ranks]


class _Sides(NamedTuple):
    """Kernels seen from both sides, and their Gram matrices.

    The rows are ``(L, F k1 k2, C)`` and ``(L, C k1 k2, F)``, the Gram matrices ``(L, F, F)`` and
    ``(L, C, C)``.
    """

    rows_out: Tensor
    rows_in: Tensor
    gram_out: Tensor
    gram_in: Tensor


def _projected_gram(rows: Tensor, whole: Tensor, vectors: Tensor, r: int) -> Tensor:
    """Return the Gram matrices of kernels projected on the leading ``r`` orthonormal vectors.

    If the other vectors are fewer, their part is subtracted from the whole.
    """
    leading = 2 * r <= vectors.shape[-1]
    fewer = vectors[..., :r] if leading else vectors[..., r:]
    q = (rows @ fewer).reshape(*whole.shape[:2], -1)
    return q @ q.mT if leading else whole - q @ q.mT


def _sweeps(sides: _Sides, v: Tensor, r1: int, r2: int, most: int = 10) -> tuple[Tensor, Tensor]:
    """Run HOOI's sweeps from the input vectors ``v (L, C, C)``.

    Kernels whose iteration has ended take no part in what sweeps are left, ``most`` at the
    beginning.

    Returns:
        The output vectors ``(L, F, F)`` and the input vectors.
    """
    tolerance = 1e-5 * min(sides.gram_out.shape[-1], v.shape[-1])
    values, u = falling(_projected_gram(sides.rows_out, sides.gram_out, v, r2))
    total = sides.gram_out.diagonal(dim1=1, dim2=2).sum(-1, dtype=torch.float64)
    half_way = total - values[:, :r1].sum(-1, dtype=torch.float64)
    values, v = falling(_projected_gram(sides.rows_in, sides.gram_in, u, r1))
    error = total - values[:, :r2].sum(-1, dtype=torch.float64)
    ended = (error > half_way * (1 - tolerance) ** 2) | (error < 1e-6 * total)
    if most > 1:
        left = (~ended).nonzero().flatten()
        if len(left) == len(v):
            return _sweeps(sides, v, r1, r2, most - 1)
        if len(left):
            rest = _Sides(*(side[left] for side in sides))
            u[left], v[left] = _sweeps(rest, v[left], r1, r2, most - 1)
    return u, v


def hooi(weights: Tensor, ranks: Sequence[tuple[int, int]]) -> list[Tucker2]:
    """Run higher-order orthogonal iteration by tensorly, once for each kernel and rank.

    Args:
        weights: L kernels, ``(L, F, C, k1, k2)``.
        ranks: pairs ``(r1, r2)``.

    Returns:
        For each rank the factors of all kernels, on the processor.
    """
    from tensorly.decomposition import partial_tucker
    from tensorly.tenalg import multi_mode_dot

    kernels, factors = weights.detach().double().cpu().numpy(), []
    for r1, r2 in ranks:
        found = []
        for w in kernels:
            (_, (out, inn)), _ = partial_tucker(w, rank=[r1, r2], modes=[0, 1], init="svd")
            core = multi_mode_dot(w, [out.T, inn.T], modes=[0, 1])
            found.append([torch.from_numpy(a.copy()) for a in (out, core, inn.T)])
        factors.append(Tucker2(*map(torch.stack, zip(*found, strict=True))))
    return factors


def data_aware(
    weights: Tensor, ranks: Sequence[tuple[int, int]], covariances: Tensor
) -> tuple[list[Tucker2], Tensor]:
    """Compute Tucker-2 factors that keep the layers' *outputs* on the data, at many ranks.

    ``factor_in`` comes from a closed form that ignores correlation between kernel positions; core
    and ``factor_out`` are then optimal (reduced-rank regression). The closed form is not always the
    better ``factor_in``: in a layer where it loses to plain HOSVD at any rank, HOSVD's is tried
    too. Where HOSVD itself is still as good, its factors are returned. The error on the covariance
    is never above HOSVD's, up to the precision of ``covariances``, float32 or wider, in which the
    work is done.

    Args:
        weights: L kernels, ``(L, F, C, k1, k2)``.
        ranks: pairs ``(r1, r2)``.
        covariances: of the input patches, ``(L, C k1 k2, C k1 k2)``; for the order see
            `output_errors`.

    Returns:
        For each rank the factors of all kernels, and ``(L, len(ranks))``: whether they are plain
        HOSVD's.

    Raises:
        ValueError: if a covariance has the wrong shape.
    """
    c, k1, k2 = weights.shape[2:]
    if covariances.shape[1:] != (c * k1 * k2,) * 2:
        raise ValueError(
            f"covariance must be {(c * k1 * k2,) * 2} for a kernel {tuple(weights.shape[1:])}, "
            f"found {tuple(covariances.shape[1:])}"
        )
    s = covariances.to(weights.device, torch.promote_types(covariances.dtype, torch.float32))
    # The bases are those of `hosvd`, in float64. Products with covariances, the most work, are not:
    # more precision changed no error (docs/benchmarks.md).
    double = weights.detach().double()
    grams = _grams(double)
    u, v, core = (t.to(s) for t in _hosvd_bases(double, grams))
    w = double.flatten(2).to(s)
    ws = w @ s
    ranks_in = sorted({r2 for _, r2 in ranks})
    n = ranks_in[-1]

    # (L, C, C), summed over kernel positions; in float64 because it is inverted.
    s_in = s.unflatten(2, (c, -1)).unflatten(1, (c, -1)).diagonal(dim1=2, dim2=4).sum(-1).double()
    root, inverse_root = roots(s_in)
    leading = falling(root @ grams[1] @ root)[1][..., :n]
    # Orthonormal, because an ill-scaled factor_in trains badly.
    basis = torch.linalg.qr(inverse_root @ leading).Q.to(s)
    fit = ReducedRankFit(rotate(ws, basis), rotate(rotate(s, basis).mT, basis), basis.mT, ranks_in)
    found = [_fitted(fit, k1, k2, *rank) for rank in ranks]
    total = (ws.double() * w.double()).sum((1, 2))[:, None]
    lost = total - fit.energies(ranks)  # (L, len(ranks))

    # The output rows that HOSVD loses entirely bound its error from below. That bound needs no
    # rotation of the covariance.
    rows = ((u.mT @ ws).double() * (u.mT @ w).double()).sum(2)
    bound = rows.sum(1, keepdim=True) - rows.cumsum(1)
    plain = torch.stack([bound[:, r1 - 1] for r1, _ in ranks], 1)
    if (lost >= plain).any():
        rotated = rotate(rotate(s, v).mT, v)
        errors = truncation_errors(core, rotated, c)
        plain = torch.stack([errors[:, r1 - 1, r2] for r1, r2 in ranks], 1)
        behind = (lost >= plain).any(1).nonzero().flatten()
        if len(behind):
            basis, size = v[behind, :, :n], n * k1 * k2
            other = ReducedRankFit(
                rotate(ws[behind], basis), rotated[behind, :size, :size], basis.mT, ranks_in
            )
            lost_then = total[behind] - other.energies(ranks)
            for i, rank in enumerate(ranks):
                first = Tucker2(*(t[behind] for t in found[i]))
                better = lost_then[:, i] < lost[behind, i]
                best = _choose(better, _fitted(other, k1, k2, *rank), first)
                found[i] = Tucker2(
                    *(t.index_copy(0, behind, b) for t, b in zip(found[i], best, strict=True))
                )
            lost[behind] = torch.minimum(lost[behind], lost_then)
    kept_plain = ~(lost < plain)
    core = core.reshape(weights.shape)
    for i, rank in enumerate(ranks):
        found[i] = _choose(kept_plain[:, i], _cut(u, core, v, *rank), found[i])
    return found, kept_plain


def _fitted(fit: ReducedRankFit, k1: int, k2: int, r1: int, r2: int) -> Tucker2:
    """Return the factors of a fit."""
    out, core = fit.factors(r1, r2)
    return Tucker2(out, core.unflatten(-1, (r2, k1, k2)), fit.factor_in[..., :r2, :])


def low_rank(
    weights: Tensor, ranks: Sequence[int], covariances: Tensor | None = None
) -> list[LowRank]:
    """Compute the optimal factors of matrices at many ranks, by truncated SVD.

    The two factors share the singular values evenly, so that neither is much larger than the other
    in training.

    Args:
        weights: L matrices W, ``(L, F, C)``.
        ranks: the values of r.
        covariances: S of the inputs, ``(L, C, C)``; with it the SVD is of ``W S^{1/2}``.

    Returns:
        For each rank the factors of all matrices.
    """
    w = weights.detach().double()  # because Gram matrices square the singular values
    u = falling(w @ (w.mT if covariances is None else covariances.to(w) @ w.mT))[1]
    projected = u[..., : max(ranks)].mT @ w
    gram = projected @ projected.mT
    factors = []
    for r in ranks:
        # The SVD of the projected matrix, (r, C), by its Gram matrix. Its small singular values
        # are imprecise, but all that they decide is how evenly the factors share them.
        squares, p = falling(gram[..., :r, :r])
        least = (1e-16 * squares[..., :1]).clamp_min(1e-300)
        scales = squares.clamp_min(least) ** 0.25  # roots of the singular values
        right = p.mT @ projected[..., :r, :] / scales[..., None]
        factors.append(LowRank(u[..., :r] @ p * scales[..., None, :], right))
    return factors


@exact_products()
def decompose_all(
    weights: Tensor,
    ranks: Sequence[tuple[int, ...]],
    method: Decomposition = "warm_hooi",
    covariances: Tensor | None = None,
) -> tuple[list[Tucker2 | LowRank], Tensor]:
    """Decompose several kernels of one shape at many ranks, on their device.

    Args:
        weights: kernels ``(L, F, C, k1, k2)`` or matrices ``(L, F, C)``.
        ranks: pairs ``(r1, r2)`` for kernels, ``(r,)`` for matrices.
        method: ``warm_hooi``, ``hosvd``, ``hooi``, or ``data``. For a matrix the first three agree.
        covariances: of the input patches, for ``data``, ``(L, C k1 k2, C k1 k2)``; see
            `output_errors`.

    Returns:
        For each rank the factors of all kernels, and ``(L, len(ranks))``: whether they are by the
        weights because the data gave nothing better.

    Raises:
        ValueError: if there is no such method, or ``data`` has no covariances.
    """
    if method not in get_args(Decomposition):
        raise ValueError(
            f"decomposition: expected one of {', '.join(get_args(Decomposition))}, found {method!r}"
        )
    if method == "data" and covariances is None:
        raise ValueError(
            "decomposition by the data needs the covariance of the layer's input patches"
        )
    by_data = covariances if method == "data" else None
    plain = torch.zeros(len(weights), len(ranks), dtype=torch.bool)
    if weights.dim() == 3:
        return list(low_rank(weights, [r[0] for r in ranks], by_data)), plain
    pairs = [(r[0], r[1]) for r in ranks]
    if by_data is not None:
        fitted, plain = data_aware(weights, pairs, by_data)
        return list(fitted), plain
    by_weights = {"warm_hooi": warm_hooi, "hosvd": hosvd, "hooi": hooi}[method]
    return list(by_weights(weights, pairs)), plain


def decompose(
    weight: Tensor,
    ranks: Sequence[tuple[int, ...]],
    method: Decomposition = "warm_hooi",
    covariance: Tensor | None = None,
) -> list[Tucker2 | LowRank]:
    """Decompose one kernel at many ranks, see `decompose_all`.

    Args:
        weight: a kernel ``(F, C, k1, k2)`` or a matrix ``(F, C)``.
        ranks: pairs ``(r1, r2)`` for a kernel, ``(r,)`` for a matrix.
        method: how.
        covariance: of the input patches, for ``data``, ``(C k1 k2, C k1 k2)``.
    """
    covariances = None if covariance is None else covariance[None]
    found, _ = decompose_all(weight[None], ranks, method, covariances)
    return [type(factors)(*(t[0] for t in factors)) for factors in found]


def _grams(w: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Gram matrices ``(L, F, F)`` and ``(L, C, C)``."""
    out, inn = (m.flatten(2) @ m.flatten(2).mT for m in (w, w.transpose(1, 2)))
    return out, inn


def _hosvd_bases(
    w: Tensor, grams: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the Gram matrices' eigenvectors ``u (L, F, F)`` and ``v (L, C, C)``, and the kernels.

    The kernels in these bases are ``(L, F, C k1 k2)``.
    """
    u, v = (falling(gram)[1] for gram in grams or _grams(w))
    return u, v, rotate(u.mT @ w.flatten(2), v)
