"""Run the sampled path as one dense network whose shapes never change, so that it can be compiled.

Every candidate is a linear map with a dense kernel, so a path is a network of plain dense layers.
Their kernels are written anew for each path. The kernels' gradients go on to the sampled
candidates' factors or, in alpha's step, to the gates of all candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nni_haloc.search.approach import first_images
from nni_haloc.search.gates import gates_of
from nni_haloc.search.space import RankSpace
from nni_haloc.search.supernet import MixedRankLayer
from nni_haloc.space.layers import Factorised, LayerSpec, kernel_factors, last_bias
from nni_haloc.space.modules import copy_of
from nni_haloc.space.reduced_rank import exact_products
from nni_haloc.training.compiled import Compiled, Replayed


class DensePath:
    """Run a supernet's sampled path as a dense network, compiled.

    Args:
        supernet: its modules, other than the mixed layers, are shared with the dense network.
        layers: its mixed layers.
        share: the part of the batch, its first images, that Eq. (8) is taken over: above 0 to 1;
            None where no feature maps are compared.
    """

    def __init__(
        self, supernet: RankSpace, layers: Sequence[MixedRankLayer], share: float | None
    ) -> None:
        self.supernet, self.layers = supernet, list(layers)
        modules = dict(supernet.original.named_modules())
        originals: list[Any] = [modules[layer.label] for layer in layers]
        self.dense = [
            _DenseLayer(layer.spec, module.weight, last_bias(module))
            for layer, module in zip(layers, originals, strict=True)
        ]
        network = _shared_copy(supernet.model, dict(zip(layers, self.dense, strict=True)))
        self._plain = Compiled(network.train(), "the supernet")
        self._compared: Compiled | None = None
        if share is not None:
            frozen = [
                _DenseLayer(x.spec, x.kernel, x.bias).requires_grad_(False) for x in self.dense
            ]
            original = _shared_copy(supernet.original, dict(zip(originals, frozen, strict=True)))
            both = _Compared(network, self.dense, original.eval(), frozen, share)
            self._compared = Compiled(both.train(), "the supernet beside the original")
        self._terms: list[Tensor] | None = None
        self._gates = Replayed(self._gradients_of_alpha)
        self._called: tuple[bool, ...] = ()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Have the supernet's forward passes run the sampled path as the dense network."""
        with self._exactly():
            for layer, dense in zip(self.layers, self.dense, strict=True):
                dense.write(layer[layer.names[layer.sampled]])
        object.__setattr__(self.supernet, "forward", self._forward)
        try:
            yield
        finally:
            object.__delattr__(self.supernet, "forward")

    @contextmanager
    def compared(self) -> Iterator[list[Tensor]]:
        """Yield a list that receives Eq. (8), a scalar, for each forward pass while `running`."""
        self._terms = []
        try:
            yield self._terms
        finally:
            self._terms = None

    def _forward(self, *inputs: Any, **named: Any) -> Any:
        if self._terms is None or self._compared is None:
            return self._plain(*inputs, **named)
        result, distance = self._compared(*inputs, **named)
        self._terms.append(distance)
        return result

    def give_gradients(self) -> None:
        """Give the gradients of the dense kernels to the sampled candidates' own parameters."""
        with self._exactly():
            for layer, dense in zip(self.layers, self.dense, strict=True):
                if dense.kernel.grad is not None:
                    dense.give_gradients(layer[layer.names[layer.sampled]])

    def alpha_gradients(self, ce: Tensor) -> list[Tensor | None]:
        """Return alpha's gradients of a loss, and leave the gates' as ``pending``.

        The dense kernel's gradient is the weight gradient that all gates are computed from, see
        `nni_haloc.search.gates`.

        Args:
            ce: the loss of a pass while `running`, a scalar.

        Returns:
            ``(candidates,)`` for each layer; None for one that the pass has not called, and for one
            that has no choice.
        """
        parameters = [list(dense.parameters()) for dense in self.dense]
        flat = [parameter for row in parameters for parameter in row]
        gradients = iter(torch.autograd.grad(ce, flat, allow_unused=True))
        rows = [[next(gradients) for _ in row] for row in parameters]
        chosen = tuple(
            row[0] is not None and len(layer) > 1
            for layer, row in zip(self.layers, rows, strict=True)
        )
        if chosen != self._called:  # usually once: the first time
            self._called, self._gates = chosen, Replayed(self._gradients_of_alpha)
        used = [row for row, is_chosen in zip(rows, chosen, strict=True) if is_chosen]
        found: list[Tensor | None] = [None] * len(self.layers)
        if used:
            sizes = [
                len(layer) for layer, called in zip(self.layers, chosen, strict=True) if called
            ]
            with self._exactly():
                numbers = self._gates(*(cast(Tensor, g) for row in used for g in row))
            both = iter(zip(*(part.split(sizes) for part in numbers), strict=True))
            for i, layer in enumerate(self.layers):
                if chosen[i]:
                    layer.pending, found[i] = next(both)
        return found

    @contextmanager
    def _exactly(self) -> Iterator[None]:
        """Leave out gradients, and mixed precision: factors would be rounded at each product."""
        kind = self.dense[0].kernel.device.type
        with torch.no_grad(), torch.autocast(kind, enabled=False), exact_products():
            yield

    def _gradients_of_alpha(self, *gradients: Tensor) -> Tensor:
        """Return the gates' gradients and alpha's, of all called layers in a row, ``(2, n)``.

        Args:
            gradients: those of each called layer's dense kernel and, where it has one, bias.
        """
        given, gates, alphas = iter(gradients), [], []
        for layer, dense, called in zip(self.layers, self.dense, self._called, strict=True):
            if called:
                by_kernel = next(given)
                by_bias = None if dense.bias is None else next(given)
                g = gates_of(layer.spec, list(layer), by_kernel, by_bias).to(layer.alpha.dtype)
                p = layer.probs
                gates.append(g)
                alphas.append(p * (g - p @ g) / layer.temperature)
        return torch.stack([torch.cat(gates), torch.cat(alphas)])


class _DenseLayer(nn.Module):
    """Run a layer by a kernel that is written from outside.

    ``outputs``, where set, receives what the layer computes.

    Args:
        spec: the layer.
        kernel: ``(F, C, k1, k2)`` or ``(F, C)``; its values are copied.
        bias: ``(F,)`` or None; likewise.
    """

    def __init__(self, spec: LayerSpec, kernel: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.spec = spec
        self.kernel = nn.Parameter(kernel.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.outputs: list[Tensor] | None = None
        self._core = self._right = torch.empty(0)

    def write(self, candidate: nn.Module) -> None:
        """Take over a candidate's function; the products are those of `reconstruct`."""
        self.kernel.grad = None
        if self.bias is not None:
            self.bias.grad = None
            self.bias.copy_(cast(Tensor, last_bias(candidate)))
        factors = kernel_factors(candidate)
        if len(factors) == 1:
            kernel = factors[0]
        elif len(factors) == 2:
            kernel = factors[0] @ factors[1]
        else:
            out, core, inn = factors
            self._core = _rows(core)
            self._right = self._core @ inn  # (r1 k1 k2, C)
            kernel = (out @ self._right.reshape(len(core), -1)).reshape(
                self.spec.out_channels, *self.spec.kernel_size, -1
            )
            kernel = kernel.permute(0, 3, 1, 2)
        self.kernel.copy_(kernel.reshape(self.kernel.shape))

    def give_gradients(self, candidate: nn.Module) -> None:
        """Add to a candidate's gradients what the dense kernel's and bias's mean for it.

        Args:
            candidate: the one of the last `write`.
        """
        g = cast(Tensor, self.kernel.grad)
        if not isinstance(candidate, Factorised):
            weight = cast(Tensor, candidate.weight)
            self._hand_on([weight], [g.reshape(weight.shape)], candidate)
            return
        with torch.enable_grad():
            factors = candidate.factors()
        g = _rows(g).reshape(len(g), -1)  # (F, k1 k2 C)
        if len(factors) == 2:
            left, right = factors
            self._hand_on(factors, [g @ right.T, left.T @ g], candidate)
            return
        out, core, inn = factors
        by_right = (out.T @ g).reshape(self._right.shape)
        by_core = (by_right @ inn.T).reshape(len(core), *core.shape[2:], -1)
        gradients = [
            g @ self._right.reshape(len(core), -1).T,
            by_core.permute(0, 3, 1, 2),
            self._core.T @ by_right,
        ]
        self._hand_on(factors, gradients, candidate)

    def _hand_on(
        self, tensors: Sequence[Tensor], gradients: Sequence[Tensor], candidate: nn.Module
    ) -> None:
        """Add gradients to those of the parameters that a candidate's tensors are made from."""
        own, given = list(tensors), list(gradients)
        if self.bias is not None and self.bias.grad is not None:
            own.append(cast(Tensor, last_bias(candidate)))
            given.append(self.bias.grad)
        trained = [place for place, tensor in enumerate(own) if tensor.requires_grad]
        torch.autograd.backward([own[i] for i in trained], [given[i] for i in trained])

    def forward(self, x: Tensor) -> Tensor:
        y = self.spec.run(x, self.kernel, self.bias)
        if self.outputs is not None:
            self.outputs.append(y.clone())  # what follows may write into it
        return y


class _Compared(nn.Module):
    """Run the dense network, and the original on the batch's first images beside it, Eq. (8).

    Args:
        network: the dense network.
        layers: its dense layers.
        original: the original network, frozen, with dense layers in the same places.
        targets: those layers.
        share: the part of the batch that is compared, above 0 to 1.
    """

    def __init__(
        self,
        network: nn.Module,
        layers: list[_DenseLayer],
        original: nn.Module,
        targets: list[_DenseLayer],
        share: float,
    ) -> None:
        super().__init__()
        self.network, self.layers, self.targets, self.share = network, layers, targets, share
        self.original = [original]  # in a list: this module's mode is not the original's

    def forward(self, *inputs: Any, **named: Any) -> tuple[Any, Tensor]:
        for layer in (*self.layers, *self.targets):
            layer.outputs = []
        with torch.no_grad():
            few, few_named = first_images(inputs, named, self.share)
            self.original[0](*few, **few_named)
        result = self.network(*inputs, **named)
        terms = [
            F.mse_loss(y[: len(target)], target)
            for layer, other in zip(self.layers, self.targets, strict=True)
            for y, target in zip(layer.outputs or [], other.outputs or [], strict=False)
        ]
        for layer in (*self.layers, *self.targets):
            layer.outputs = None
        nothing = self.layers[0].kernel.new_zeros(())  # where no layer was called
        return result, torch.stack(terms).sum() if terms else nothing


def _shared_copy(network: nn.Module, new: dict[Any, Any]) -> nn.Module:
    """Return a copy of a network that has the same parameters and buffers, and other layers.

    Args:
        network: it is left as it is.
        new: module to what stands in its place.
    """
    tensors = {id(value): value for value in (*network.parameters(), *network.buffers())}
    return copy_of(network, tensors | {id(old): module for old, module in new.items()})


def _rows(kernel: Tensor) -> Tensor:
    """Return a kernel ``(F, C, k1, k2)`` as ``(F k1 k2, C)``; a matrix is left as it is."""
    return kernel if kernel.dim() == 2 else kernel.permute(0, 2, 3, 1).flatten(0, 2)
