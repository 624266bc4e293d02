"""Nested candidates: one set of factors a layer, of which each rank takes the leading part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from nni_haloc.space.layers import Factorised, LayerSpec, layout_of
from nni_haloc.space.reduced_rank import falling, roots
from nni_haloc.space.tucker import LowRank, Tucker2, low_rank


def nested_factors(
    weights: Tensor, inputs: Tensor | None, outputs: Tensor, rank: tuple[int, ...]
) -> Tucker2 | LowRank:
    """Compute factors of kernels whose leading parts approximate them well at every smaller rank.

    Let ``M`` be the root of the inputs' moments, ``L`` the eigenvectors, by falling value, of
    ``M (sum_k W_k^T W_k) M``, and ``U`` those of the outputs' moments. Then ``factor_in`` is
    ``D^-1 L^T M^-1`` with rows of unit norm, ``factor_out`` is ``U``, and the core at position k is
    ``U^T W_k M L D``. At full rank their product is the kernel. The coordinates ``factor_in x`` are
    uncorrelated over the positions, so that cutting the trailing ones leaves the least-squares
    coefficients of the others as they are.

    Args:
        weights: L kernels ``(L, F, C, k1, k2)`` or matrices ``(L, F, C)``.
        inputs: their inputs' moments, summed over the kernel's positions, ``(L, C, C)``; matrices
            need none.
        outputs: their outputs' moments, ``(L, F, F)``.
        rank: the largest, ``(r1, r2)`` or ``(r,)``.

    Returns:
        The factors of all kernels, float64.
    """
    w = weights.detach().double()
    out = falling(outputs.double())[1][..., : rank[0]]
    if w.dim() == 3:
        right = out.mT @ w
        scales = right.norm(dim=-1, keepdim=True).clamp_min(1e-30).sqrt()
        return LowRank(out * scales.mT, right / scales)
    root, inverse_root = roots(cast(Tensor, inputs).double())
    by_input = w.transpose(1, 2).flatten(2)
    leading = falling(root @ (by_input @ by_input.mT) @ root)[1][..., : rank[1]]
    inn = leading.mT @ inverse_root
    norms = inn.norm(dim=-1, keepdim=True)
    right_inverse = root @ leading * norms.mT
    core = torch.einsum("lfr,lfcij,lcs->lrsij", out, w, right_inverse)
    return Tucker2(out, core, inn / norms)


def shared_factors(
    spec: LayerSpec,
    weight: Tensor,
    moments: tuple[Tensor | None, Tensor] | None,
    rank: tuple[int, ...],
) -> Tucker2 | LowRank:
    """Compute `nested_factors` of one layer.

    Args:
        spec: the layer.
        weight: its kernel or matrix; of one on torch's device ``meta``, the factors have no values.
        moments: see `nni_haloc.space.covariances.channel_moments`; None takes all directions to be
            alike, so that the weights alone decide.
        rank: the largest, ``(r1, r2)`` or ``(r,)``.
    """
    kernel = weight if spec.kind == "conv" else weight.flatten(1)
    if weight.is_meta:
        f, c = kernel.shape[:2]
        if len(rank) == 1:
            return LowRank(kernel.new_empty(f, rank[0]), kernel.new_empty(rank[0], c))
        core = kernel.new_empty(*rank, *kernel.shape[2:])
        return Tucker2(kernel.new_empty(f, rank[0]), core, kernel.new_empty(rank[1], c))
    if moments is None:
        flat = kernel.double().flatten(1)
        moments = torch.eye(kernel.shape[1]).to(flat), flat @ flat.T
    inputs, outputs = moments
    some = None if inputs is None else inputs[None]
    found = nested_factors(kernel.to(outputs.device)[None], some, outputs[None], rank)
    return type(found)(*(value[0] for value in found))


def lost_energies(
    spec: LayerSpec, weight: Tensor, inputs: Tensor | None, outputs: Tensor
) -> Tensor:
    """Estimate the share of the output's energy that each rank loses, for all ranks at once.

    In the basis of `nested_factors` the input's coordinates are uncorrelated, and each element of
    the core has an energy of its own: its square times the variance of its coordinate. A rank keeps
    a leading block of them. (Correlations between the kernel's positions are left out.)

    Args:
        spec: the layer.
        weight: its kernel or matrix.
        inputs, outputs: its moments, see `nni_haloc.space.covariances.channel_moments`.

    Returns:
        For a convolution ``(F, C)``, at ``[r1 - 1, r2 - 1]`` that of the ranks ``(r1, r2)``; for a
        matrix ``(F, F)``, the same along the diagonal.
    """
    kernel = weight.detach().double().to(outputs.device)
    if inputs is not None:
        full = (spec.out_channels, spec.in_channels)
        factors = nested_factors(kernel[None], inputs[None], outputs[None], full)
        assert isinstance(factors, Tucker2)
        _, core, inn = (factor[0] for factor in factors)
        variances = ((inn @ inputs) * inn).sum(1)
        energies = core.square().sum((2, 3)) * variances
    else:
        energies = torch.diag(falling(outputs)[0].clamp_min(0))
    kept = energies.cumsum(0).cumsum(1)
    return (1 - kept / kept[-1, -1].clamp_min(1e-300)).clamp_min(0)


def leading(factors: Tucker2 | LowRank, rank: Sequence[int]) -> Tucker2 | LowRank:
    """Return the leading part of factors: views of them at a smaller rank."""
    if isinstance(factors, LowRank):
        return LowRank(factors.left[:, : rank[0]], factors.right[: rank[0]])
    out, core, inn = factors
    return Tucker2(out[:, : rank[0]], core[: rank[0], : rank[1]], inn[: rank[1]])


def balanced(factors: Tucker2 | LowRank) -> Tucker2 | LowRank:
    """Return factors of the same product that train well on their own.

    The outer factors of a kernel become orthonormal; a matrix's two share its singular values.
    """
    if isinstance(factors, LowRank):
        product = factors.left.detach().double() @ factors.right.detach().double()
        (even,) = low_rank(product[None], [factors.right.shape[0]])
        return LowRank(even.left[0], even.right[0])
    out, core, inn = (factor.detach().double() for factor in factors)
    q_out, r_out = torch.linalg.qr(out)
    q_in, r_in = torch.linalg.qr(inn.T)
    return Tucker2(q_out, torch.einsum("ar,rsij,bs->abij", r_out, core, r_in), q_in.T)


class SharedFactors(nn.Module):
    """Hold a layer's factors at its largest rank, of which all low-rank candidates take a part.

    Args:
        spec: the layer.
        factors: at the largest rank.
        bias: the layer's, ``(F,)``, or None.
        like: a tensor whose device, precision and memory format the factors get.
        ranks: those of all low-rank candidates, in their order.
    """

    def __init__(
        self,
        spec: LayerSpec,
        factors: Tucker2 | LowRank,
        bias: Tensor | None,
        like: Tensor,
        ranks: Sequence[Sequence[int]],
    ) -> None:
        super().__init__()
        self.spec, self.form = spec, type(factors)
        layout = layout_of(like)
        for name, value in factors._asdict().items():
            own = value.to(like).contiguous(
                memory_format=layout if value.dim() == 4 else torch.contiguous_format
            )
            self.register_parameter(name, nn.Parameter(own.clone()))
        own_bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.register_parameter("bias", own_bias)
        corners = torch.tensor([[rank[0] - 1, rank[-1] - 1] for rank in ranks], device=like.device)
        self.register_buffer("corners", corners, persistent=False)

    bias: nn.Parameter | None
    corners: Tensor
    """Each candidate's last row and column, ``(candidates, 2)``."""

    def factors(self) -> Tucker2 | LowRank:
        """Return the factors at the largest rank."""
        return self.form(*(getattr(self, name) for name in self.form._fields))


class NestedLayer(Factorised):
    """Run the leading part of factors that a layer's candidates share.

    Args:
        shared: the factors.
        rank: ``(r1, r2)`` or ``(r,)``.
    """

    def __init__(self, shared: SharedFactors, rank: tuple[int, ...]) -> None:
        super().__init__()
        self.shared, self.rank = shared, rank

    def factors(self) -> Tucker2 | LowRank:
        return leading(self.shared.factors(), self.rank)

    @property
    def layout(self) -> torch.memory_format:
        return layout_of(self.shared.factors()[1])

    @property
    def output_bias(self) -> Tensor | None:
        return self.shared.bias

    def forward(self, x: Tensor) -> Tensor:
        spec, rank, factors = self.shared.spec, self.rank, self.factors()
        left, middle = factors[0], factors[1]
        if spec.kind == "linear":
            return nn.functional.linear(x @ middle.T, left, self.output_bias)
        if isinstance(factors, Tucker2):
            middle = middle.contiguous(memory_format=self.layout)
            x = nn.functional.conv2d(x, factors.factor_in[:, :, None, None])
        inner = replace(spec, in_channels=x.shape[1], out_channels=rank[0])
        x = inner.run(x, middle, None)
        return nn.functional.conv2d(x, left[:, :, None, None], self.output_bias)

    def alone(self) -> nn.Module:
        """Return a plain layer of the same function, with balanced weights of its own."""
        like = self.shared.factors()[1]
        if like.is_meta:
            with torch.device("meta"):
                return self.shared.spec.build(self.rank).to(like.dtype)
        with torch.random.fork_rng(devices=[]):  # a new layer's first weights are random
            layer = self.shared.spec.build(self.rank).to(like)
        assert isinstance(layer, Factorised)
        with torch.no_grad():
            for target, value in zip(layer.factors(), balanced(self.factors()), strict=True):
                target.copy_(value.reshape(target.shape))
            if self.output_bias is not None:
                bias = cast(Tensor, layer.output_bias)
                bias.copy_(self.output_bias).requires_grad_(self.output_bias.requires_grad)
        return layer.to(memory_format=self.layout)
