"""Step 2: ProxylessNAS's gradient of the path probabilities, without running any path that was not sampled.

Let a layer be ``y = sum_j z_j tau_j(x)`` with one-hot gates ``z``. ProxylessNAS takes ``g_j = dL/dz_j = <dL/dy, tau_j(x)>`` and from it
``dL/dalpha = p * (g - <p, g>)``. Every candidate here is linear with a dense kernel ``W_j`` and bias ``b_j``, so that

    g_j = <G, W_j> + <sum dL/dy, b_j>,

where ``G`` is the weight gradient of the *dense* convolution at ``(x, dL/dy)``: computed once, the same for all candidates.
This is exactly ProxylessNAS's estimator with every candidate run; it is not the gradient of the expected loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

Kernel = tuple[Tensor, ...]
"""``(weight,)``, ``(left, right)`` or ``(factor_out, core, factor_in)``: the factors whose product is the kernel."""


def conv_weight_gradient(x: Tensor, grad_y: Tensor, kernel_shape: Sequence[int], stride: Any, dilation: Any) -> Tensor:
    """Weight gradient ``(F, C, k1, k2)`` of the dense convolution; ``x (N, C, H, W)`` is already padded."""
    return conv2d_weight(x, list(kernel_shape), grad_y, stride=stride, padding=0, dilation=dilation)


def linear_weight_gradient(x: Tensor, grad_y: Tensor) -> Tensor:
    """Weight gradient ``(F, C)`` of the dense linear layer; ``x (..., C)``, ``grad_y (..., F)``."""
    return grad_y.flatten(0, -2).T @ x.flatten(0, -2)


def contract(weight_gradient: Tensor, kernel: Kernel) -> Tensor:
    """``<G, W>`` of a dense gradient and a kernel given by its factors, without forming the kernel.

    Shapes: ``G (F, C, k1, k2)`` or ``(F, C)``; the outer factors are applied to G first, then the core.

    >>> G, out, core, inn = torch.randn(4, 3, 3, 3), torch.randn(4, 2), torch.randn(2, 2, 3, 3), torch.randn(2, 3)
    >>> W = torch.einsum("fr,rsij,sc->fcij", out, core, inn)
    >>> torch.allclose(contract(G, (out, core, inn)), (G * W).sum(), atol=1e-4)
    True
    """
    dtype = torch.promote_types(weight_gradient.dtype, torch.float32)
    g, *factors = (t.to(dtype) for t in (weight_gradient, *kernel))
    if len(factors) == 1:
        return (g.flatten() @ factors[0].flatten()).reshape(())
    if len(factors) == 2:
        left, right = factors
        return ((left.T @ g.flatten(1)) * right.flatten(1)).sum()
    out, core, inn = factors
    r1, r2 = core.shape[:2]
    projected = (out.T @ g.flatten(1)).reshape(r1, g.shape[1], -1)  # (r1, C, k1 k2)
    return ((inn @ projected) * core.reshape(r1, r2, -1)).sum()


class _Gate(torch.autograd.Function):
    """Hands ``y`` through; in backward gives ``probs`` the gate gradients. ``x`` gets its gradient through ``y`` alone."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, probs: Tensor, x: Tensor, gate_gradients: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
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


def gate(y: Tensor, probs: Tensor, x: Tensor, gate_gradients: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
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
