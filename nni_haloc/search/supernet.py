"""The supernet's mixed layer: all candidates of a layer, one of which runs in each pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from nni.nas.nn.pytorch import LayerChoice
from nni.nas.oneshot.pytorch.supermodule.base import BaseSuperNetModule
from scipy.special import softmax
from torch import Tensor, nn

from nni_haloc.search.execution import runs_dense
from nni_haloc.search.gates import RunningMean, gate, gate_gradients, sample
from nni_haloc.space.layers import LayerSpec, last_bias, rank_of
from nni_haloc.space.tucker import reconstruct
from nni_haloc.utils.placement import Mirror


class MixedRankLayer(LayerChoice, BaseSuperNetModule):
    """All candidates of one layer; a pass runs the sampled one alone.

    With ``searching`` on, the output carries the gate gradients back to alpha; with it off, alpha
    takes no part. ``observe``, where set, is called with the layer's name and output, and gives
    back the output.

    Args:
        candidates: candidate name to module.
        alpha: the layer's logits, ``(candidates,)``.
        spec: the layer's specification.
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
        self._mirror = Mirror()

    @property
    def probs(self) -> Tensor:
        """``p = softmax(alpha / temperature)``, in the order of ``names``."""
        return torch.softmax(self.alpha / self.temperature, dim=-1)

    @property
    def logits(self) -> np.ndarray:
        """Alpha over the temperature, ``(candidates,)``, in float64 on the processor."""
        return self._mirror.of(self.alpha) / self.temperature

    def forget_alpha(self) -> None:
        """Read alpha from its device again, whatever has or has not changed it."""
        self._mirror.forget()

    def know_alpha(self, alpha: np.ndarray) -> None:
        """Take note of alpha's values ``(candidates,)``, which are on the processor now."""
        self._mirror.know(self.alpha, alpha)

    def put_logits(self, logits: np.ndarray) -> None:
        """Set alpha to the temperature times ``logits (candidates,)``."""
        self._mirror.put(self.alpha, logits * self.temperature)

    def forward(self, x: Tensor) -> Tensor:
        chooses = len(self) > 1  # a pinned layer does not
        if self.searching and chooses and torch.is_grad_enabled():
            with torch.no_grad():  # alpha alone learns in this step
                kernel = self._cheaper_kernel(x)
            y = gate(self._run(x, kernel), self.probs, x, self._gate_gradients)
        else:
            y = self._run(x, self._cheaper_kernel(x))
        if self.observe is not None:
            y = self.observe(self.label, y)
        return y

    def kernel(self) -> Tensor:
        """Return the sampled candidate's dense kernel, differentiable in its weights.

        Returns:
            ``(F, C, k1, k2)`` or ``(F, C)``.
        """
        candidate: Any = self[self.names[self.sampled]]
        if rank_of(candidate) is None:
            return candidate.weight
        # Without autocast: it would be rounded at each product, and again when it runs. In the
        # factors' memory format: in another one the output would change its own.
        with torch.autocast(self.alpha.device.type, enabled=False):
            return reconstruct(candidate.factors()).contiguous(memory_format=candidate.layout)

    def _cheaper_kernel(self, x: Tensor) -> Tensor | None:
        """Return the dense kernel, if running with it costs less than running the factors."""
        rank = rank_of(self[self.names[self.sampled]])
        return self.kernel() if runs_dense(self.spec, rank, tuple(x.shape)) else None

    def _run(self, x: Tensor, kernel: Tensor | None) -> Tensor:
        """Run the sampled candidate, with its dense kernel if there is one."""
        candidate = self[self.names[self.sampled]]
        return candidate(x) if kernel is None else self.spec.run(x, kernel, last_bias(candidate))

    def _gate_gradients(self, x: Tensor, grad_y: Tensor) -> Tensor:
        """Return every candidate's gate gradient; a pass's calls add up in ``pending``."""
        g = gate_gradients(self.spec, list(self), x, grad_y).to(self.alpha.dtype)
        self.pending = g if self.pending is None else self.pending + g
        return g

    def draw(self, generator: np.random.Generator) -> int:
        """Sample a candidate by the probabilities, and return its place among the candidates."""
        return sample(softmax(self.logits), generator)

    def resample(self, memo: dict[str, Any]) -> dict[str, Any]:
        """Return the current sample, for NNI; a search samples with `draw`."""
        return {self.label: self.names[self.sampled]}

    def export(self, memo: dict[str, Any]) -> dict[str, Any]:
        """Return the most probable candidate, the paper's choice."""
        return {self.label: self.names[int(self.logits.argmax())]}

    def export_probs(self, memo: dict[str, Any]) -> dict[str, Any]:
        """Return the layer's label to candidate to probability."""
        return {self.label: dict(zip(self.names, softmax(self.logits).tolist(), strict=True))}

    def arch_parameters(self) -> Sequence[nn.Parameter]:
        """Return alpha, for NNI."""
        return [self.alpha]

    @classmethod
    def mutate(
        cls, module: nn.Module, name: str, memo: dict[str, Any], mutate_kwargs: dict[str, Any]
    ) -> MixedRankLayer | None:
        """Make a mixed layer of a `LayerChoice`: NNI's mutation hook."""
        if type(module) is not LayerChoice:
            return None
        choice: Any = module
        return cls(choice.candidates, memo[choice.label], mutate_kwargs["specs"][choice.label])
