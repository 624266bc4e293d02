"""Step 2: ProxylessNAS's gradient of the path probabilities, from one weight gradient instead of running every path.

Let a layer be ``y = sum_j z_j tau_j(x)`` with one-hot gates ``z``. ProxylessNAS takes ``g_j = dL/dz_j = <dL/dy, tau_j(x)>`` and from it
``dL/dalpha = p * (g - <p, g>)``. Every candidate here is linear with a dense kernel ``W_j`` and bias ``b_j``, so that

    g_j = <G, W_j> + <sum dL/dy, b_j>,

where ``G`` is the weight gradient of the *dense* convolution at ``(x, dL/dy)``: computed once, the same for all candidates.
This is exactly ProxylessNAS's estimator with every candidate run; it is not the gradient of the expected loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from nni_haloc.search.execution import contracts
from nni_haloc.space.layers import LayerSpec, kernel_factors, last_bias, rank_of

Kernel = tuple[Tensor, ...]
"""``(weight,)``, ``(left, right)`` or ``(factor_out, core, factor_in)``: the factors whose product is the kernel."""


def weight_gradient(spec: LayerSpec, x: Tensor, grad_y: Tensor) -> Tensor:
    """``G``, the dense layer's weight gradient at ``(x, dL/dy)``: ``(F, C, k1, k2)``, or for linear and 1x1 layers ``(F, C)``."""
    if spec.kind == "linear":
        return grad_y.flatten(0, -2).T @ x.flatten(0, -2)
    shape = [spec.out_channels, spec.in_channels, *spec.kernel_size]
    if spec.padding_mode == "zeros" and not isinstance(spec.padding, str):
        found = conv2d_weight(
            x, shape, grad_y, stride=spec.stride, padding=spec.padding, dilation=spec.dilation
        )
    else:
        found = conv2d_weight(
            spec.pad(x), shape, grad_y, stride=spec.stride, padding=0, dilation=spec.dilation
        )
    return found if spec.kind == "conv" else found.flatten(1)


def contract(weight_gradient: Tensor, kernels: Sequence[Kernel]) -> Tensor:
    """``<G, W_j>`` of a dense gradient and every kernel, given by its factors, without forming the kernels: shape ``(kernels,)``.

    Shapes: ``G (F, C, k1, k2)`` or ``(F, C)``; the outer factors are applied to G first, then the core.

    >>> G, out, core, inn = torch.randn(4, 3, 3, 3), torch.randn(4, 2), torch.randn(2, 2, 3, 3), torch.randn(2, 3)
    >>> W = torch.einsum("fr,rsij,sc->fcij", out, core, inn)
    >>> torch.allclose(contract(G, [(out, core, inn)]), (G * W).sum(), atol=1e-4)
    True
    """
    dtype = torch.promote_types(weight_gradient.dtype, torch.float32)
    g = weight_gradient.to(dtype)
    c = g.shape[1]
    channels_last = (
        g.permute(0, 2, 3, 1).reshape(len(g), -1) if g.dim() == 4 else g
    )  # (F, k1 k2 C), once for all kernels
    found = []
    for kernel in kernels:
        outer, *rest = (t.to(dtype) for t in kernel)
        if not rest:
            found.append((g * outer).sum())
        elif len(rest) == 1:
            found.append(((outer.T @ g) * rest[0]).sum())
        else:
            core, inn = rest
            projected = (outer.T @ channels_last).reshape(-1, c) @ inn.T  # (r1 k1 k2, r2)
            found.append(
                (projected.reshape(len(core), -1, len(inn)) * core.flatten(2).transpose(1, 2)).sum()
            )
    return torch.stack(found)


def gate_gradients(
    spec: LayerSpec, candidates: Sequence[nn.Module], x: Tensor, grad_y: Tensor
) -> Tensor:
    """``g_j = <dL/dy, tau_j(x)>`` of every candidate, shape ``(candidates,)``, in the cheaper of two exact ways by counted work.

    From the dense weight gradient, which runs no candidate; or, where the kernel is large and the batch small, by running every candidate.
    """
    if not contracts(spec, map(rank_of, candidates), tuple(x.shape)):
        weight = kernel_factors(candidates[0])[0]
        x, grad_y = x.to(weight), grad_y.to(weight)
        return torch.stack([(candidate(x) * grad_y).sum() for candidate in candidates])
    g = contract(
        weight_gradient(spec, x, grad_y), [kernel_factors(candidate) for candidate in candidates]
    )
    if spec.bias:
        bias_gradient = grad_y.sum(
            (0, 2, 3) if spec.kind != "linear" else tuple(range(grad_y.dim() - 1))
        ).to(g)
        g = g + torch.stack(
            [bias_gradient @ cast(Tensor, last_bias(candidate)).to(g) for candidate in candidates]
        )
    return g


class _Gate(torch.autograd.Function):
    """Hands ``y`` through; in backward gives ``probs`` the gate gradients. ``x`` gets its gradient through ``y`` alone."""

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
        ctx.mark_dirty(y)  # handed through, not as a view: what follows may write into it in place
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        grads = None
        if ctx.needs_input_grad[1]:
            (x,) = ctx.saved_tensors
            with torch.autocast(grad_y.device.type, enabled=False):
                grads = ctx.gate_gradients(x.to(grad_y.dtype), grad_y)
        return grad_y, grads, None, None


def gate(
    y: Tensor, probs: Tensor, x: Tensor, gate_gradients: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """``y``, the sampled candidate's output on ``x``, made to give ``probs (candidates,)`` its gradient.

    ``gate_gradients(x, dL/dy)`` returns ``g``, one entry a candidate. With ``probs = softmax(alpha)``, autograd's softmax does the rest.
    """
    return _Gate.apply(y, probs, x.detach(), gate_gradients)


def sample(probs: Tensor, generator: torch.Generator) -> int:
    """Index of one candidate drawn from ``probs (candidates,)`` with the given generator, on the CPU so that every device agrees."""
    return int(torch.multinomial(probs.detach().float().cpu(), 1, generator=generator))


class RunningMean:
    """Mean over the iterations of the centred gate gradients ``g - <p, g>``: what each candidate does to the task loss, free of cost."""

    def __init__(self, size: int) -> None:
        self.total, self.count = torch.zeros(size, dtype=torch.float64), 0

    def add(self, gate_gradients: Tensor, probs: Tensor) -> None:
        g, p = gate_gradients.detach().double().cpu(), probs.detach().double().cpu()
        centred = g - (p * g).sum()
        if math.isfinite(float(centred.sum())):
            self.total += centred
            self.count += 1

    @property
    def mean(self) -> Tensor:
        return self.total / max(self.count, 1)
