"""The supernet's mixed layer: one sampled candidate in each pass, gate gradients in the architecture step, feature maps in the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from nni.nas.nn.pytorch import LayerChoice
from nni.nas.oneshot.pytorch.supermodule.base import BaseSuperNetModule
from torch import Tensor, nn

from nni_haloc.search.execution import runs_dense
from nni_haloc.search.gates import RunningMean, gate, gate_gradients, sample
from nni_haloc.space.layers import LayerSpec, last_bias, layout_of, rank_of
from nni_haloc.space.tucker import reconstruct


class MixedRankLayer(LayerChoice, BaseSuperNetModule):
    """All candidates of one layer; a pass runs the sampled one alone.

    ``alpha (candidates,)`` holds the layer's logits. With ``searching`` on, the output carries the gate gradients back to alpha; with it
    off, alpha takes no part. ``observe``, where set, is called with the layer's name and output, and gives back the output.
    """

    def __init__(
        self, candidates: dict[str, nn.Module], alpha: nn.Parameter, spec: LayerSpec
    ) -> None:
        super().__init__(candidates, label=spec.name)
        self.alpha = alpha
        self.spec = spec
        self.temperature = 1.0
        self.searching = False
        self.sampled = 0
        self.observe: Callable[[str, Tensor], Tensor] | None = None
        self.task_gradient = RunningMean(len(candidates))
        self.pending: Tensor | None = None

    @property
    def probs(self) -> Tensor:
        """``p = softmax(alpha / temperature)``, in the order of ``names``."""
        return torch.softmax(self.alpha / self.temperature, dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        if (
            self.searching and len(self) > 1 and torch.is_grad_enabled()
        ):  # a pinned layer has nothing to choose
            with torch.no_grad():  # alpha alone learns in this step
                kernel = self._cheaper_kernel(x)
            y = gate(self._run(x, kernel), self.probs, x, self._gate_gradients)
        else:
            y = self._run(x, self._cheaper_kernel(x))
        if self.observe is not None:
            y = self.observe(self.label, y)
        return y

    def kernel(self) -> Tensor:
        """The sampled candidate's dense kernel, ``(F, C, k1, k2)`` or ``(F, C)``, differentiable in its weights."""
        candidate: Any = self[self.names[self.sampled]]
        if rank_of(candidate) is None:
            return candidate.weight
        with torch.autocast(
            self.alpha.device.type, enabled=False
        ):  # or it would be rounded at each product, and again when it runs
            factors = candidate.factors()
            return reconstruct(factors).contiguous(
                memory_format=layout_of(factors[1])
            )  # in another one the output would change its own

    def _cheaper_kernel(self, x: Tensor) -> Tensor | None:
        """The dense kernel, where running with that costs less than running the factors."""
        rank = rank_of(self[self.names[self.sampled]])
        return self.kernel() if runs_dense(self.spec, rank, tuple(x.shape)) else None

    def _run(self, x: Tensor, kernel: Tensor | None) -> Tensor:
        candidate = self[self.names[self.sampled]]
        return candidate(x) if kernel is None else self.spec.run(x, kernel, last_bias(candidate))

    def _gate_gradients(self, x: Tensor, grad_y: Tensor) -> Tensor:
        """Of every candidate; summed over the calls of one pass until `record`."""
        g = gate_gradients(self.spec, list(self), x, grad_y).to(self.alpha.dtype)
        self.pending = g if self.pending is None else self.pending + g
        return g

    def record(self) -> None:
        """Take the last pass's gate gradients into the running mean that scores the candidates."""
        if self.pending is not None:
            self.task_gradient.add(self.pending, self.probs)
        self.pending = None

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
    def mutate(
        cls, module: nn.Module, name: str, memo: dict[str, Any], mutate_kwargs: dict[str, Any]
    ) -> MixedRankLayer | None:
        """NNI's mutation hook: every `LayerChoice` of a rank space becomes a mixed layer."""
        if type(module) is not LayerChoice:
            return None
        choice: Any = module
        return cls(choice.candidates, memo[choice.label], mutate_kwargs["specs"][choice.label])
