"""Layers that run a decomposed kernel, Eq. (2)-(4), and `LayerSpec`, a layer without weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nni_haloc.inputs.options import Kind
from nni_haloc.space.tucker import LowRank, Tucker2


class Factorised(nn.Module):
    """A layer that runs the factors of a kernel, one after another."""

    __jit_unused_properties__ = ("layout", "output_bias")  # TorchScript would compile them

    def factors(self) -> Tucker2 | LowRank:
        """Return the factors, differentiable in the layer's weights."""
        raise NotImplementedError

    @property
    def layout(self) -> torch.memory_format:
        """The memory format of its output on an input in the same format."""
        return layout_of(self.factors()[1])

    @property
    def output_bias(self) -> Tensor | None:
        """The bias of its last part, ``(F,)``."""
        return cast("Tensor | None", list(self.children())[-1].bias)


class TuckerConv2d(nn.Sequential, Factorised):
    """Run a convolution as three smaller ones with nothing between them, Eq. (2)-(4).

    ``factor_in`` is 1x1 from C to r2 channels, ``core`` is k1 x k2 from r2 to r1, ``factor_out`` is
    1x1 from r1 to F. The core has the stride, padding, dilation and padding mode, ``factor_out``
    has the bias. All three are ordinary `nn.Conv2d`.
    """

    def __init__(self, conv: LayerSpec, rank_out: int, rank_in: int) -> None:
        super().__init__()
        self.factor_in = nn.Conv2d(conv.in_channels, rank_in, 1, bias=False)
        self.core = nn.Conv2d(rank_in, rank_out, conv.kernel_size, bias=False, **conv.geometry)
        self.factor_out = nn.Conv2d(rank_out, conv.out_channels, 1, bias=conv.bias)

    def factors(self) -> Tucker2:
        return Tucker2(
            self.factor_out.weight.flatten(1), self.core.weight, self.factor_in.weight.flatten(1)
        )


class LowRankConv2d(nn.Sequential, Factorised):
    """Run a 1x1 convolution as two smaller ones.

    ``right`` goes from C to r channels and has the stride and padding; ``left`` goes from r to F
    and has the bias.
    """

    def __init__(self, conv: LayerSpec, rank: int) -> None:
        super().__init__()
        self.right = nn.Conv2d(conv.in_channels, rank, 1, bias=False, **conv.geometry)
        self.left = nn.Conv2d(rank, conv.out_channels, 1, bias=conv.bias)

    def factors(self) -> LowRank:
        return LowRank(self.left.weight.flatten(1), self.right.weight.flatten(1))


class LowRankLinear(nn.Sequential, Factorised):
    """Run a linear layer as two smaller ones.

    ``right`` goes from C to r features; ``left`` goes from r to F and has the bias.
    """

    def __init__(self, linear: LayerSpec, rank: int) -> None:
        super().__init__()
        self.right = nn.Linear(linear.in_channels, rank, bias=False)
        self.left = nn.Linear(rank, linear.out_channels, bias=linear.bias)

    def factors(self) -> LowRank:
        return LowRank(self.left.weight, self.right.weight)


@dataclass(frozen=True)
class LayerSpec:
    """The geometry of one layer and the shapes of its inputs.

    That is enough to build, count or time any of its candidates.

    Attributes:
        name: the layer's name in the network.
        kind: ``conv``, ``pointwise`` (a 1x1 convolution) or ``linear``.
        in_channels: C.
        out_channels: F.
        input_shapes: one shape for each call in a forward pass, batch included.
        bias: whether the layer has a bias.
        kernel_size: rows and columns.
        stride: along rows and columns.
        padding: a pair, or torch's ``"same"`` or ``"valid"``.
        dilation: along rows and columns.
        padding_mode: torch's name of it.
    """

    name: str
    kind: Kind
    in_channels: int
    out_channels: int
    input_shapes: tuple[tuple[int, ...], ...]
    bias: bool
    kernel_size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] | str = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    padding_mode: str = "zeros"

    @classmethod
    def of(
        cls, name: str, module: nn.Module, input_shapes: tuple[tuple[int, ...], ...] = ()
    ) -> LayerSpec:
        """Describe an ungrouped `nn.Conv2d` or an `nn.Linear`.

        Raises:
            TypeError: if the module is anything else, or has no weights yet.
        """
        if isinstance(module, nn.Linear | nn.Conv2d) and is_lazy(module.weight):
            raise TypeError(
                f"{name}: {type(module).__name__} has no weights yet; run the network once"
            )
        bias = getattr(module, "bias", None) is not None
        if isinstance(module, nn.Linear):
            return cls(name, "linear", module.in_features, module.out_features, input_shapes, bias)
        if not isinstance(module, nn.Conv2d) or module.groups != 1:
            groups = f" of {module.groups} groups" if isinstance(module, nn.Conv2d) else ""
            found = f"{type(module).__name__}{groups}"
            raise TypeError(
                f"{name}: expected an nn.Linear or an ungrouped nn.Conv2d, found {found}"
            )
        return cls(
            name,
            "pointwise" if module.kernel_size == (1, 1) else "conv",
            module.in_channels,
            module.out_channels,
            input_shapes,
            bias,
            _pair(module.kernel_size),
            _pair(module.stride),
            module.padding if isinstance(module.padding, str) else _pair(module.padding),
            _pair(module.dilation),
            module.padding_mode,
        )

    @property
    def geometry(self) -> dict:
        """The keyword arguments of the `nn.Conv2d` that does the spatial work."""
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "padding_mode": self.padding_mode,
        }

    def check_rank(self, rank: tuple[int, ...] | None) -> None:
        """Check that the layer can be decomposed at a rank.

        Raises:
            ValueError: if it can't; the message names the layer.
        """
        most = (
            (self.out_channels, self.in_channels)
            if self.kind == "conv"
            else (min(self.out_channels, self.in_channels),)
        )
        if rank is not None and len(rank) != len(most):
            raise ValueError(
                f"layer {self.name!r} is of kind {self.kind!r}, "
                f"which does not take the ranks {list(rank)}"
            )
        if rank is not None and any(r > m for r, m in zip(rank, most, strict=True)):
            raise ValueError(
                f"layer {self.name!r}: ranks {list(rank)} are above its channels {list(most)}"
            )

    def build(self, rank: tuple[int, ...] | None) -> nn.Module:
        """Build a layer of this geometry with random weights.

        Args:
            rank: ``(r1, r2)``, ``(r,)``, or None for the dense layer.
        """
        if rank is not None:
            if self.kind == "conv":
                return TuckerConv2d(self, *rank)
            return (LowRankConv2d if self.kind == "pointwise" else LowRankLinear)(self, *rank)
        if self.kind == "linear":
            return nn.Linear(self.in_channels, self.out_channels, self.bias)
        return nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size, bias=self.bias, **self.geometry
        )

    def assemble(self, factors: Tucker2 | LowRank, bias: Tensor | None) -> Factorised:
        """Build the layer that runs some factors, in torch's default device and precision."""
        layer = self.build(_rank(factors))
        assert isinstance(layer, Factorised)
        with torch.no_grad():
            for target, value in zip(layer.factors(), factors, strict=True):
                target.copy_(value.reshape(target.shape))
            if bias is not None:
                cast(Tensor, last_bias(layer)).copy_(bias)
        return layer

    @property
    def padded(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The rows that are added above and below, and the columns left and right."""
        if self.padding == "valid":
            return (0, 0), (0, 0)
        if self.padding == "same":
            rows, columns = (
                d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)
            )
            return (rows // 2, rows - rows // 2), (columns // 2, columns - columns // 2)
        assert not isinstance(self.padding, str)
        return (self.padding[0],) * 2, (self.padding[1],) * 2

    def pad(self, x: Tensor) -> Tensor:
        """Pad an input as the convolution does, so that it can be run without padding."""
        (top, bottom), (left, right) = self.padded
        if self.kind == "linear" or not any((top, bottom, left, right)):
            return x
        return F.pad(
            x,
            (left, right, top, bottom),
            mode="constant" if self.padding_mode == "zeros" else self.padding_mode,
        )

    def run(self, x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        """Run the layer with a dense kernel, ``(F, C, k1, k2)``, or ``(F, C)`` for a matrix."""
        if self.kind == "linear":
            return F.linear(x, kernel, bias)
        kernel = kernel.reshape(self.out_channels, self.in_channels, *self.kernel_size)
        if self.padding_mode == "zeros":
            return F.conv2d(x, kernel, bias, self.stride, self.padding, self.dilation)
        return F.conv2d(self.pad(x), kernel, bias, self.stride, 0, self.dilation)

    def output_shape(self, input_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the output for one input shape."""
        if self.kind == "linear":
            return (*input_shape[:-1], self.out_channels)
        with torch.device("meta"):
            size = self.pad(torch.empty(1, 1, *input_shape[2:])).shape[2:]
        spatial = [
            (n - d * (k - 1) - 1) // s + 1
            for n, d, k, s in zip(size, self.dilation, self.kernel_size, self.stride, strict=True)
        ]
        return (input_shape[0], self.out_channels, *spatial)

    def parts(self, rank: tuple[int, ...] | None) -> list[tuple[int, int, int]]:
        """List the layers that it becomes at a rank.

        Returns:
            Channels in, channels out and kernel elements of each, in their order.
        """
        c, f, k = self.in_channels, self.out_channels, math.prod(self.kernel_size)
        if rank is None:
            return [(c, f, k)]
        return (
            [(c, rank[1], 1), (rank[1], rank[0], k), (rank[0], f, 1)]
            if self.kind == "conv"
            else [(c, rank[0], 1), (rank[0], f, 1)]
        )

    def work(self, rank: tuple[int, ...] | None) -> list[Work]:
        """List what each of `parts` does for one image, for each call of the layer."""
        parts = self.parts(rank)
        spatial = slice(1, -1) if self.kind == "linear" else slice(2, None)
        strided = 1 if len(parts) == 3 else 0  # the part that carries the geometry
        work = []
        for shape in self.input_shapes:
            before, after = math.prod(shape[spatial]), math.prod(self.output_shape(shape)[spatial])
            for i, part in enumerate(parts):
                work.append(
                    Work(*part, after if i > strided else before, before if i < strided else after)
                )
        return work


class Work(NamedTuple):
    """One convolution or matrix product.

    Attributes:
        inputs: input channels.
        outputs: output channels.
        kernel: kernel elements.
        before: positions of the input.
        after: positions of the output.
    """

    inputs: int
    outputs: int
    kernel: int
    before: int
    after: int


def layout_of(weight: Tensor) -> torch.memory_format:
    """Return the memory format that a weight imposes on its convolution's output."""
    channels_last = (
        weight.dim() == 4
        and weight.is_contiguous(memory_format=torch.channels_last)
        and not weight.is_contiguous()
    )
    return torch.channels_last if channels_last else torch.contiguous_format


def rank_of(module: nn.Module) -> tuple[int, ...] | None:
    """Return the rank of a factorised layer, ``(r1, r2)`` or ``(r,)``; None for a dense one."""
    return _rank(module.factors()) if isinstance(module, Factorised) else None


def kernel_factors(module: nn.Module) -> tuple[Tensor, ...]:
    """Return the tensors whose product is a layer's kernel.

    They are the factors, or a dense layer's weight, which is ``(F, C)`` for linear and 1x1 layers.
    """
    if isinstance(module, Factorised):
        return module.factors()
    weight = cast(Tensor, module.weight)
    return (weight if weight.shape[2:] != (1, 1) else weight.flatten(1),)


def last_bias(module: nn.Module) -> Tensor | None:
    """Return the bias that a dense or factorised layer adds to its output."""
    if isinstance(module, Factorised):
        return module.output_bias
    return cast("Tensor | None", module.bias)


def _rank(factors: Tucker2 | LowRank) -> tuple[int, ...]:
    return (
        tuple(factors.core.shape[:2]) if isinstance(factors, Tucker2) else (factors.left.shape[1],)
    )


def _pair(value: tuple[int, ...]) -> tuple[int, int]:
    a, b = value
    return int(a), int(b)
