"""Step 2: ProxylessNAS's gradient of the path probabilities, without running every path.

Let a layer be ``y = sum_j z_j tau_j(x)`` with one-hot gates ``z``. ProxylessNAS takes
``g_j = dL/dz_j = <dL/dy, tau_j(x)>`` and from it ``dL/dalpha = p * (g - <p, g>)``. Every candidate
here is linear with a dense kernel ``W_j`` and bias ``b_j``, so that

    g_j = <G, W_j> + <sum dL/dy, b_j>,

where ``G`` is the weight gradient of the *dense* convolution at ``(x, dL/dy)``: computed once, the
same for all candidates. This is exactly ProxylessNAS's estimator with every candidate run; it is
not the gradient of the expected loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from nni_haloc.search.execution import contracts
from nni_haloc.space.layers import LayerSpec, kernel_factors, last_bias, rank_of
from nni_haloc.space.nested import NestedLayer
from nni_haloc.space.reduced_rank import exact_products

Kernel = tuple[Tensor, ...]
"""The factors whose product is the kernel.

``(weight,)``, ``(left, right)`` or ``(factor_out, core, factor_in)``.
"""


def weight_gradient(spec: LayerSpec, x: Tensor, grad_y: Tensor) -> Tensor:
    """Return ``G``, the dense layer's weight gradient.

    Args:
        spec: the layer.
        x: its input, ``(N, C, H, W)`` or ``(N, ..., C)``.
        grad_y: the loss's gradient at its output, ``(N, F, H', W')`` or ``(N, ..., F)``.

    Returns:
        ``(F, C, k1, k2)``, or for linear and 1x1 layers ``(F, C)``.
    """
    if spec.kind == "linear":
        return grad_y.flatten(0, -2).T @ x.flatten(0, -2)
    shape = [spec.out_channels, spec.in_channels, *spec.kernel_size]
    if spec.padding_mode == "zeros" and not isinstance(spec.padding, str):
        gradient = conv2d_weight(
            x, shape, grad_y, stride=spec.stride, padding=spec.padding, dilation=spec.dilation
        )
    else:
        gradient = conv2d_weight(
            spec.pad(x), shape, grad_y, stride=spec.stride, padding=0, dilation=spec.dilation
        )
    return gradient if spec.kind == "conv" else gradient.flatten(1)


def contract(weight_gradient: Tensor, kernels: Sequence[Kernel]) -> Tensor:
    """Return ``<G, W_j>`` of a dense gradient and every kernel, without forming the kernels.

    The outer factors are applied to G first, then the core.

    Args:
        weight_gradient: ``G``, ``(F, C, k1, k2)`` or ``(F, C)``.
        kernels: each kernel's factors.

    Returns:
        ``(kernels,)``.

    >>> G, out, inn = torch.randn(4, 3, 3, 3), torch.randn(4, 2), torch.randn(2, 3)
    >>> core = torch.randn(2, 2, 3, 3)
    >>> W = torch.einsum("fr,rsij,sc->fcij", out, core, inn)
    >>> torch.allclose(contract(G, [(out, core, inn)]), (G * W).sum(), atol=1e-4)
    True
    """
    dtype = torch.promote_types(weight_gradient.dtype, torch.float32)
    g = weight_gradient.to(dtype)
    c = g.shape[1]
    # (F, k1 k2 C), once for all kernels
    channels_last = g.permute(0, 2, 3, 1).reshape(len(g), -1) if g.dim() == 4 else g
    products = []
    for kernel in kernels:
        outer, *rest = (t.to(dtype) for t in kernel)
        if not rest:
            products.append((g * outer).sum())
        elif len(rest) == 1:
            products.append(((outer.T @ g) * rest[0]).sum())
        else:
            core, inn = rest
            projected = (outer.T @ channels_last).reshape(-1, c) @ inn.T  # (r1 k1 k2, r2)
            spread = projected.reshape(len(core), -1, len(inn))
            products.append((spread * core.flatten(2).transpose(1, 2)).sum())
    return torch.stack(products)


def contract_nested(weight_gradient: Tensor, factors: Kernel, corners: Tensor) -> Tensor:
    """Return ``<G, W_j>`` of kernels that are the products of leading parts of the same factors.

    With ``P = factor_out^T G factor_in^T`` and ``M = sum_k P * core``, the product with the kernel
    at ranks ``(r1, r2)`` is the sum of M's leading ``r1 x r2`` block: one contraction and a
    two-dimensional running sum give all of them.

    Args:
        weight_gradient: ``G``, ``(F, C, k1, k2)`` or ``(F, C)``.
        factors: at the largest rank.
        corners: each kernel's ``(r1 - 1, r2 - 1)``, ``(kernels, 2)``.

    Returns:
        ``(kernels,)``.
    """
    dtype = torch.promote_types(weight_gradient.dtype, torch.float32)
    g, (outer, *rest) = weight_gradient.to(dtype), (t.to(dtype) for t in factors)
    if len(rest) == 1:
        blocks = ((outer.T @ g) * rest[0]).sum(1).double().cumsum(0)
        return blocks[corners[:, 0]].to(dtype)
    core, inn = rest
    rows = g.permute(0, 2, 3, 1).reshape(len(g), -1)  # (F, k1 k2 C)
    projected = (outer.T @ rows).reshape(-1, g.shape[1]) @ inn.T  # (r1 k1 k2, r2)
    spread = projected.reshape(len(core), -1, len(inn))
    products = (spread * core.flatten(2).transpose(1, 2)).sum(1)  # (r1, r2)
    blocks = products.double().cumsum(0).cumsum(1)
    return blocks[corners[:, 0], corners[:, 1]].to(dtype)


def gate_gradients(
    spec: LayerSpec, candidates: Sequence[nn.Module], x: Tensor, grad_y: Tensor
) -> Tensor:
    """Return ``g_j = <dL/dy, tau_j(x)>`` of every candidate.

    Computed from the dense weight gradient, which runs no candidate; or, where the kernel is large
    and the batch small, by running every candidate. Both are exact; counted work decides.

    Args:
        spec: the layer.
        candidates: all of its candidates.
        x, grad_y: see `weight_gradient`.

    Returns:
        ``(candidates,)``.
    """
    nested = isinstance(candidates[-1], NestedLayer)
    if not nested and not contracts(spec, map(rank_of, candidates), tuple(x.shape)):
        weight = kernel_factors(candidates[0])[0]
        x, grad_y = x.to(weight), grad_y.to(weight)
        return torch.stack([(candidate(x) * grad_y).sum() for candidate in candidates])
    bias_gradient = None
    if spec.bias:
        places = (0, 2, 3) if spec.kind != "linear" else tuple(range(grad_y.dim() - 1))
        bias_gradient = grad_y.sum(places)
    return gates_of(spec, candidates, weight_gradient(spec, x, grad_y), bias_gradient)


def gates_of(
    spec: LayerSpec,
    candidates: Sequence[nn.Module],
    weight_gradient: Tensor,
    bias_gradient: Tensor | None,
) -> Tensor:
    """Return every candidate's gate gradient, from the dense layer's gradients.

    Args:
        spec: the layer.
        candidates: all of its candidates.
        weight_gradient: ``G``, ``(F, C, k1, k2)`` or ``(F, C)``.
        bias_gradient: ``(F,)``; None for a layer without bias.

    Returns:
        ``g_j = <G, W_j> + <dL/db, b_j>``, ``(candidates,)``.
    """
    if spec.kind != "conv":
        weight_gradient = weight_gradient.flatten(1)
    apart = [kernel_factors(each) for each in candidates if not isinstance(each, NestedLayer)]
    parts = [contract(weight_gradient, apart)] if apart else []
    last = candidates[-1]  # the dense layer is the first
    if isinstance(last, NestedLayer):
        parts.append(contract_nested(weight_gradient, last.shared.factors(), last.shared.corners))
    g = torch.cat(parts)
    if bias_gradient is None:
        return g
    biases = [cast(Tensor, last_bias(candidate)) for candidate in candidates]
    return g + torch.stack(biases).to(g) @ bias_gradient.to(g)


class _Gate(torch.autograd.Function):
    """Return ``y`` unchanged, and give ``probs`` the gate gradients in the backward pass.

    ``x`` gets its gradient through ``y`` alone.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        probs: Tensor,
        x: Tensor,
        gate_gradients: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.gate_gradients = gate_gradients
        ctx.mark_dirty(y)  # y itself, not a view: what follows may write into it in place
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        grads = None
        if ctx.needs_input_grad[1]:
            (x,) = ctx.saved_tensors
            with torch.autocast(grad_y.device.type, enabled=False), exact_products():
                grads = ctx.gate_gradients(x.to(grad_y.dtype), grad_y)
        return grad_y, grads, None, None


def gate(
    y: Tensor, probs: Tensor, x: Tensor, gate_gradients: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Make the sampled candidate's output give the probabilities their gradient.

    With ``probs = softmax(alpha)``, autograd's softmax does the rest.

    Args:
        y: the sampled candidate's output on ``x``.
        probs: ``(candidates,)``.
        x: the layer's input.
        gate_gradients: called in the backward pass with ``x`` and ``dL/dy``; returns ``g``,
            ``(candidates,)``.

    Returns:
        ``y``.
    """
    return _Gate.apply(y, probs, x.detach(), gate_gradients)


def sample(probs: np.ndarray, generator: np.random.Generator) -> int:
    """Draw one candidate's index.

    Probabilities and random numbers are the processor's, so that no device is waited for and all
    processes agree.

    Args:
        probs: ``(candidates,)``.
        generator: of the random numbers.
    """
    cumulative = probs.cumsum()
    drawn = np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right")
    return min(int(drawn), len(probs) - 1)


class RunningMean:
    """The mean of the centred gate gradients ``g - <p, g>`` over the iterations.

    It says what each candidate does to the task's loss, free of cost.
    """

    def __init__(self, size: int) -> None:
        self.total, self.count = np.zeros(size), 0

    def add(self, gate_gradients: np.ndarray, probs: np.ndarray) -> None:
        """Add an iteration, unless its numbers are not finite; both ``(candidates,)``."""
        centred = gate_gradients - probs @ gate_gradients
        if np.isfinite(centred).all():
            self.total = self.total + centred
            self.count += 1

    @property
    def mean(self) -> np.ndarray:
        """The mean so far, ``(candidates,)``; 0 before the first iteration."""
        return self.total / max(self.count, 1)
