"""The supernet's mixed layer: one sampled candidate in each pass, gate gradients in the architecture step, feature maps in the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from nni.nas.nn.pytorch import LayerChoice
from nni.nas.oneshot.pytorch.supermodule.base import BaseSuperNetModule
from torch import Tensor, nn

from ..gates import RunningMean, contract, conv_weight_gradient, gate, linear_weight_gradient, sample
from ..layers import LayerSpec, dense_kernel, last_bias


class MixedRankLayer(LayerChoice, BaseSuperNetModule):
    """All candidates of one layer; a pass runs the sampled one alone.

    ``alpha (candidates,)`` holds the layer's logits. With ``searching`` on, the output carries the gate gradients back to alpha; with it
    off, alpha takes no part. ``observe``, where set, is called with the layer's name and output.
    """

    def __init__(self, candidates: dict[str, nn.Module], alpha: nn.Parameter, spec: LayerSpec) -> None:
        super().__init__(candidates, label=spec.name)
        self.alpha = alpha
        self.spec = spec
        self.temperature = 1.0
        self.searching = False
        self.sampled = 0
        self.observe: Callable[[str, Tensor], None] | None = None
        self.task_gradient = RunningMean(len(candidates))
        self._pending: Tensor | None = None

    @property
    def probs(self) -> Tensor:
        """``p = softmax(alpha / temperature)``, in the order of ``names``."""
        return torch.softmax(self.alpha / self.temperature, dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        y = self[self.names[self.sampled]](x)
        if self.searching and torch.is_grad_enabled():
            y = gate(y, self.probs, x, self._gate_gradients)
        if self.observe is not None:
            self.observe(self.label, y)
        return y

    def _gate_gradients(self, x: Tensor, grad_y: Tensor) -> Tensor:
        """``g_j = <dL/dy, tau_j(x)>`` of every candidate; summed over the calls of one pass until `record`."""
        spec = self.spec
        if spec.kind == "linear":
            weight_gradient, others = linear_weight_gradient(x, grad_y), tuple(range(grad_y.dim() - 1))
        else:
            shape = (spec.out_channels, spec.in_channels, *spec.kernel_size)
            weight_gradient, others = conv_weight_gradient(spec.pad(x), grad_y, shape, spec.stride, spec.dilation), (0, 2, 3)
            weight_gradient = weight_gradient if spec.kind == "conv" else weight_gradient.flatten(1)
        bias_gradient = grad_y.sum(others)
        g = []
        for candidate in self:
            kernel = dense_kernel(candidate)
            value = contract(weight_gradient, kernel if spec.kind == "conv" else tuple(t.flatten(1) for t in kernel))
            bias = last_bias(candidate)
            g.append(value if bias is None else value + bias_gradient.to(value.dtype) @ bias.to(value.dtype))
        result = torch.stack(g).to(self.alpha.dtype)
        self._pending = result if self._pending is None else self._pending + result
        return result

    def record(self) -> None:
        """Take the last pass's gate gradients into the running mean that scores the candidates."""
        if self._pending is not None:
            self.task_gradient.add(self._pending, self.probs)
        self._pending = None

    def draw(self, generator: torch.Generator) -> None:
        """Sample the candidate of the next pass."""
        self.sampled = sample(self.probs, generator)

    def resample(self, memo: dict[str, Any]) -> dict[str, Any]:
        """NNI's hook; the strategy samples with `draw`, from its own generator."""
        return {self.label: self.names[self.sampled]}

    def export(self, memo: dict[str, Any]) -> dict[str, Any]:
        """The most probable candidate (the paper's choice)."""
        return {self.label: self.names[int(self.alpha.argmax())]}

    def export_probs(self, memo: dict[str, Any]) -> dict[str, Any]:
        return {self.label: dict(zip(self.names, self.probs.detach().cpu().tolist(), strict=True))}

    def arch_parameters(self) -> Sequence[nn.Parameter]:
        return [self.alpha]

    @classmethod
    def mutate(cls, module: nn.Module, name: str, memo: dict[str, Any], mutate_kwargs: dict[str, Any]) -> MixedRankLayer | None:
        """NNI's mutation hook: every `LayerChoice` of a rank space becomes a mixed layer."""
        if type(module) is not LayerChoice:
            return None
        choice: Any = module
        return cls(choice.candidates, memo[choice.label], mutate_kwargs["specs"][choice.label])
