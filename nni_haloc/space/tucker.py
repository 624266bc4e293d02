"""Tucker-2 decomposition of a convolution kernel, Eq. (1), and low-rank factors of a matrix.

A kernel ``W`` of shape ``(F, C, k1, k2)`` becomes ``factor_out (F, r1)``, ``core (r1, r2, k1, k2)``
and ``factor_in (r2, C)``; a matrix ``(F, C)`` (linear layers, 1x1 convolutions) becomes
``left (F, r)`` and ``right (r, C)``.

There are two aims. *By the weights* minimises ``||W - W'||``. *By the data* minimises
``E ||W x - W' x||^2`` over the input patches ``x`` that the trained network really sees, given
their covariance ``S = E[x x^T]`` (uncentred).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from nni_haloc.inputs.options import Decomposition
from nni_haloc.space.reduced_rank import ReducedRankFit, falling, roots, rotate, truncation_errors


class Tucker2(NamedTuple):
    """The factors of one kernel.

    Attributes:
        factor_out: ``(F, r1)``.
        core: ``(r1, r2, k1, k2)``.
        factor_in: ``(r2, C)``.
    """

    factor_out: Tensor
    core: Tensor
    factor_in: Tensor


class FallbackTucker(Tucker2):
    """HOSVD's factors, kept because a decomposition by the data gave nothing better."""

    __slots__ = ()


class LowRank(NamedTuple):
    """The factors of one matrix.

    Attributes:
        left: ``(F, r)``.
        right: ``(r, C)``.
    """

    left: Tensor
    right: Tensor


def reconstruct(factors: Tucker2 | LowRank) -> Tensor:
    """Multiply the factors out, Eq. (1): a kernel ``(F, C, k1, k2)`` or a matrix ``(F, C)``.

    >>> W = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    >>> torch.allclose(reconstruct(hosvd(W, [(4, 3)])[0]), W)
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


def output_error(weight: Tensor, approximation: Tensor, covariance: Tensor | None = None) -> float:
    """Compute the relative error ``||(W - W') S^{1/2}|| / ||W S^{1/2}||`` of an approximation.

    Args:
        weight: the kernel W, ``(F, C, k1, k2)`` or ``(F, C)``.
        approximation: W', of the same shape.
        covariance: S of the input patches, ``(C k1 k2, C k1 k2)``, channels slowest as ``unfold``
            orders them (None: the identity, which gives the error of the weights).
    """
    w = weight.detach().double().flatten(1)
    d = w - approximation.detach().double().flatten(1)
    if covariance is None:
        return float(d.norm() / w.norm().clamp_min(1e-300))
    s = covariance.double()
    numerator, denominator = ((d @ s) * d).sum(), ((w @ s) * w).sum()
    return float((numerator.clamp_min(0) / denominator.clamp_min(1e-300)).sqrt())


def hosvd(weight: Tensor, ranks: Sequence[tuple[int, int]]) -> list[Tucker2]:
    """Compute the truncated higher-order SVD at many ranks, cut from one in float64.

    Args:
        weight: the kernel, ``(F, C, k1, k2)``.
        ranks: pairs ``(r1, r2)``.
    """
    w = weight.detach().double()
    u, v, core = _hosvd_bases(w)
    core = core.reshape(w.shape)
    return [Tucker2(u[:, :r1], core[:r1, :r2], v[:, :r2].T) for r1, r2 in ranks]


def warm_hooi(weight: Tensor, ranks: Sequence[tuple[int, int]]) -> list[Tucker2]:
    """Run higher-order orthogonal iteration (HOOI) along a chain of falling ranks.

    Each rank starts from the input factors of the rank above. Half a sweep takes the leading
    eigenvectors of the Gram matrix of the kernel projected on the other side. The iteration ends
    once the second half of a sweep lowers the error by less than 0.5 % of itself at 512 channels,
    in proportion less at fewer. On random kernels, the worst case, the error is then within 0.5 %
    of tensorly's, in wide layers after one sweep. HOSVD's factors are kept wherever they are as
    good. The precision is that of ``weight``, float32 or wider.

    Args:
        weight: the kernel, ``(F, C, k1, k2)``.
        ranks: pairs ``(r1, r2)``.
    """
    w = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    f, c, k1, k2 = w.shape
    by_position = w.flatten(2).permute(2, 0, 1).contiguous()  # (k1 k2, F, C)
    sides = _Sides(by_position, by_position.transpose(1, 2).contiguous(), *_grams(w))
    u0, v0, core0 = _hosvd_bases(w, (sides.gram_out, sides.gram_in))
    hosvd_energy = core0.square().reshape(f, c, -1).sum(-1, dtype=torch.float64).cumsum(0).cumsum(1)
    by_rank = {}
    v = v0
    for r1, r2 in sorted(set(ranks), key=lambda r: (r[0] + r[1], r), reverse=True):
        starts = [v, v0] if min(f, c) <= 64 else [v]  # with few channels, optima differ
        energy, u, core, v = max(
            (_sweeps(sides, start, r1, r2) for start in starts), key=lambda result: result[0]
        )
        if energy > hosvd_energy[r1 - 1, r2 - 1]:
            by_rank[r1, r2] = Tucker2(
                u, core.reshape(k1, k2, r1, r2).permute(2, 3, 0, 1), v[:, :r2].T
            )
        else:
            by_rank[r1, r2] = Tucker2(u0[:, :r1], core0.reshape(w.shape)[:r1, :r2], v0[:, :r2].T)
    return [by_rank[rank] for rank in ranks]


class _Sides(NamedTuple):
    """A kernel's slices by position, ``(k1 k2, F, C)`` and transposed, and its two Gram matrices.

    The Gram matrices are ``(F, F)`` and ``(C, C)``.
    """

    slices: Tensor
    transposed: Tensor
    gram_out: Tensor
    gram_in: Tensor


def _projected_gram(slices: Tensor, whole: Tensor, vectors: Tensor, r: int) -> Tensor:
    """Return the Gram matrix of a kernel projected on the leading ``r`` orthonormal vectors.

    If the other vectors are fewer, their part is subtracted from the whole.
    """
    fewer, sign = (vectors[:, :r], 1) if 2 * r <= len(vectors) else (vectors[:, r:], -1)
    q = (slices @ fewer).transpose(1, 2).flatten(0, 1)
    return q.T @ q if sign > 0 else whole - q.T @ q


def _sweeps(sides: _Sides, v: Tensor, r1: int, r2: int) -> tuple[float, Tensor, Tensor, Tensor]:
    """Run HOOI's sweeps from the input vectors ``v (C, C)``.

    Returns the core's energy, ``u (F, r1)``, the core ``(k1 k2 r1, r2)`` and the next ``v``.
    """
    total, tolerance = float(sides.gram_out.trace()), 1e-5 * min(len(sides.gram_out), len(v))
    for _ in range(10):
        values, u = falling(_projected_gram(sides.slices, sides.gram_out, v, r2))
        half_way = float(values[:r1].sum())
        values, v = falling(_projected_gram(sides.transposed, sides.gram_in, u, r1))
        energy = float(values[:r2].sum())
        if (
            total - energy > (total - half_way) * (1 - tolerance) ** 2
            or total - energy < 1e-6 * total
        ):
            break
    core = (u[:, :r1].T @ sides.slices).flatten(0, 1) @ v[:, :r2]
    return float(core.square().sum(dtype=torch.float64)), u[:, :r1], core, v


def hooi(weight: Tensor, ranks: Sequence[tuple[int, int]]) -> list[Tucker2]:
    """Run higher-order orthogonal iteration by tensorly, once for each rank."""
    from tensorly.decomposition import partial_tucker
    from tensorly.tenalg import multi_mode_dot

    w = weight.detach().double().cpu().numpy()
    factors = []
    for r1, r2 in ranks:
        (_, (out, inn)), _ = partial_tucker(w, rank=[r1, r2], modes=[0, 1], init="svd")
        core = multi_mode_dot(w, [out.T, inn.T], modes=[0, 1])
        factors.append(Tucker2(*(torch.from_numpy(a.copy()) for a in (out, core, inn.T))))
    return factors


def data_aware(
    weight: Tensor, ranks: Sequence[tuple[int, int]], covariance: Tensor
) -> list[Tucker2]:
    """Compute Tucker-2 factors that keep the layer's *output* on the data, at many ranks.

    ``factor_in`` comes from a closed form that ignores correlation between kernel positions; core
    and ``factor_out`` are then optimal (reduced-rank regression). The closed form is not always the
    better ``factor_in``: in a layer where it loses to plain HOSVD at any rank, HOSVD's is tried
    too. Where HOSVD itself is still as good, its factors are returned as `FallbackTucker`. The
    error on the covariance is never above HOSVD's, up to the precision of ``covariance``, float32
    or wider, in which the work is done.

    Args:
        weight: the kernel, ``(F, C, k1, k2)``.
        ranks: pairs ``(r1, r2)``.
        covariance: of the input patches, ``(C k1 k2, C k1 k2)``; for the order see `output_error`.

    Raises:
        ValueError: if the covariance has the wrong shape.
    """
    _f, c, k1, k2 = weight.shape
    if covariance.shape != (c * k1 * k2,) * 2:
        raise ValueError(
            f"covariance must be {(c * k1 * k2,) * 2} for a kernel {tuple(weight.shape)}, "
            f"found {tuple(covariance.shape)}"
        )
    s = covariance.to(weight.device, torch.promote_types(covariance.dtype, torch.float32))
    w = weight.detach().to(s)
    ws = w.flatten(1) @ s
    u, v, core = (t.to(s) for t in _hosvd_bases(weight.detach().double()))
    ranks_in = sorted({r2 for _, r2 in ranks})

    # (C, C), summed over kernel positions.
    s_in = s.reshape(c, k1 * k2, c, k1 * k2).diagonal(dim1=1, dim2=3).sum(-1).double()
    root, inverse_root = roots(s_in)
    wc = weight.detach().double().transpose(0, 1).flatten(1)
    leading = falling(root @ (wc @ wc.T) @ root)[1][:, : ranks_in[-1]]
    # Orthonormal, because an ill-scaled factor_in trains badly.
    basis = torch.linalg.qr(inverse_root @ leading).Q.to(s)
    fits = [ReducedRankFit(rotate(ws, basis), rotate(rotate(s, basis).T, basis), basis.T, ranks_in)]
    total = float((ws.double() * w.flatten(1).double()).sum())

    # The output rows that HOSVD loses entirely bound its error from below. That bound needs no
    # rotation of the covariance.
    rows = ((u.T @ ws).double() * (u.T @ w.flatten(1)).double()).sum(1)
    plain = (rows.sum() - rows.cumsum(0))[:, None].expand(-1, c + 1)
    if any(total - fits[0].energy(r1, r2) >= plain[r1 - 1, r2] for r1, r2 in ranks):
        rotated = rotate(rotate(s, v).T, v)
        plain = truncation_errors(core, rotated, c)
        if any(total - fits[0].energy(r1, r2) >= plain[r1 - 1, r2] for r1, r2 in ranks):
            n = ranks_in[-1]
            fits.append(
                ReducedRankFit(
                    rotate(ws, v[:, :n]),
                    rotated[: n * k1 * k2, : n * k1 * k2],
                    v[:, :n].T,
                    ranks_in,
                )
            )
    factors: list[Tucker2] = []
    for r1, r2 in ranks:
        best = max(fits, key=lambda candidate: candidate.energy(r1, r2))
        if total - best.energy(r1, r2) < plain[r1 - 1, r2]:
            out, best_core = best.factors(r1, r2)
            factors.append(Tucker2(out, best_core.reshape(r1, r2, k1, k2), best.factor_in[:r2]))
        else:
            factors.append(FallbackTucker(u[:, :r1], core.reshape(w.shape)[:r1, :r2], v[:, :r2].T))
    return factors


def low_rank(
    weight: Tensor, ranks: Sequence[int], covariance: Tensor | None = None
) -> list[LowRank]:
    """Compute the optimal factors of a matrix at many ranks, by truncated SVD.

    The two factors share the singular values evenly, so that neither is much larger than the other
    in training.

    Args:
        weight: W, ``(F, C)``.
        ranks: the values of r.
        covariance: S of the inputs, ``(C, C)``; with it the SVD is of ``W S^{1/2}``.
    """
    w = weight.detach().double()
    gram = w @ (covariance.to(w).double() @ w.T if covariance is not None else w.T)
    u = falling(gram)[1]
    factors = []
    for r in ranks:
        p, sigma, q = torch.linalg.svd(u[:, :r].T @ w, full_matrices=False)  # only r x C
        factors.append(LowRank(u[:, :r] @ p * sigma.sqrt(), sigma.sqrt()[:, None] * q))
    return factors


def decompose(
    weight: Tensor,
    ranks: Sequence[tuple[int, ...]],
    method: Decomposition = "warm_hooi",
    covariance: Tensor | None = None,
) -> list[Tucker2 | LowRank]:
    """Decompose one kernel at many ranks.

    Args:
        weight: a kernel ``(F, C, k1, k2)`` or a matrix ``(F, C)``.
        ranks: pairs ``(r1, r2)`` for a kernel, ``(r,)`` for a matrix.
        method: ``warm_hooi``, ``hosvd``, ``hooi``, or ``data``. For a matrix the first three agree.
        covariance: of the input patches, for ``data``; see `output_error`.

    Raises:
        ValueError: if there is no such method, or ``data`` has no covariance.
    """
    if method not in get_args(Decomposition):
        raise ValueError(
            f"decomposition: expected one of {', '.join(get_args(Decomposition))}, found {method!r}"
        )
    if method == "data" and covariance is None:
        raise ValueError(
            "decomposition by the data needs the covariance of the layer's input patches"
        )
    if weight.dim() == 2:
        return list(
            low_rank(weight, [r[0] for r in ranks], covariance if method == "data" else None)
        )
    pairs = [(r[0], r[1]) for r in ranks]
    if covariance is not None and method == "data":
        return list(data_aware(weight, pairs, covariance))
    return list({"warm_hooi": warm_hooi, "hosvd": hosvd, "hooi": hooi}[method](weight, pairs))


def _grams(w: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Gram matrices ``(F, F)`` and ``(C, C)``."""
    out, inn = (m.flatten(1) @ m.flatten(1).T for m in (w, w.transpose(0, 1)))
    return out, inn


def _hosvd_bases(
    w: Tensor, grams: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the Gram matrices' eigenvectors ``u (F, F)`` and ``v (C, C)``, and the kernel in them.

    The kernel in these bases is ``(F, C k1 k2)``.
    """
    u, v = (falling(gram)[1] for gram in grams or _grams(w))
    return u, v, rotate(u.T @ w.flatten(1), v)
