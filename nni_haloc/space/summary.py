"""Report on a rank space: every layer with its candidates, or the reason why it stays as it is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, fields

from torch import nn

from nni_haloc.space.layers import LayerSpec
from nni_haloc.space.ranks import AllowedRanks, Layers
from nni_haloc.space.replaceable import LAYERS, is_scripted_layer
from nni_haloc.utils.printing import text_table

_OTHERS_OWN = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.Embedding, nn.PReLU)
"""Modules whose parameters nobody expects to be decomposed."""


@dataclass(frozen=True)
class LayerReport:
    """One row of the report.

    Attributes:
        layer: the layer's name.
        kind: its kind, or its class.
        shape: of its weight.
        candidates: their names; none if the layer is left alone.
        reason: why it is left alone; else empty.
    """

    layer: str
    kind: str
    shape: tuple[int, ...]
    candidates: tuple[str, ...]
    reason: str


class SpaceReport:
    """A row for each layer that has a kernel or a matrix, in the model's order.

    As text it is a table.
    """

    def __init__(self, rows: Iterable[LayerReport]) -> None:
        self.rows = tuple(rows)

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        def text(value: object) -> str:
            parts = value if isinstance(value, tuple) else (value,)
            return ("x" if parts and isinstance(parts[0], int) else " ").join(map(str, parts))

        return text_table(
            [field.name for field in fields(LayerReport)],
            [[text(value) for value in astuple(row)] for row in self.rows],
        )

    __repr__ = __str__


def why_nothing(model: nn.Module, left_alone: Mapping[str, str]) -> str:
    """Say on one line why no layer of a model can be searched."""
    why = by_reason(left_alone) or "no convolution or linear layer"
    return f"nothing to search in {type(model).__name__} ({why})"


def by_reason(left_alone: Mapping[str, str]) -> str:
    """List the layers that are left alone on one line, however many there are."""
    layers: dict[str, list[str]] = {}
    for name, reason in left_alone.items():
        layers.setdefault(reason, []).append(name)
    return "; ".join(
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {reason}"
        for reason, names in layers.items()
    )


def space_report(
    model: nn.Module, candidates: Mapping[str, Iterable[str]], left_alone: Mapping[str, str]
) -> SpaceReport:
    """Report on every layer of a model.

    Args:
        model: the network.
        candidates: layer name to the names of its candidates.
        left_alone: layer name to the reason why it has none.
    """
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, LAYERS):
            kind: str
            try:
                kind = LayerSpec.of(name, module).kind
            except TypeError:
                kind = type(module).__name__
            names = tuple(candidates.get(name, ()))
            reason = "" if names else left_alone.get(name, "not searched")
            rows.append(LayerReport(name, kind, tuple(module.weight.shape), names, reason))
        elif is_scripted_layer(module):
            rows.append(
                LayerReport(
                    name,
                    module.original_name,
                    tuple(module.weight.shape),
                    (),
                    left_alone.get(name, "not searched"),
                )
            )
        elif not isinstance(module, _OTHERS_OWN):
            for own, parameter in module.named_parameters(name, recurse=False):
                if parameter.dim() > 1:
                    rows.append(
                        LayerReport(
                            own,
                            "parameter",
                            tuple(parameter.shape),
                            (),
                            f"used by {type(module).__name__} itself, not by a layer",
                        )
                    )
    return SpaceReport(rows)


def space_sizes(
    layers: Layers, allowed: AllowedRanks, kernel: tuple[int, ...] | None = None
) -> dict[str, int]:
    """Count the networks of a rank space.

    A 1x1 convolution or linear layer, whose kernel is a matrix, has a single rank.

    Args:
        layers: the layers that are searched.
        allowed: the rank space.
        kernel: counts only convolutions of this kernel, such as ``(3, 3)``.

    Returns:
        The numbers of networks with any ranks; with ranks that are multiples of the step (design
        principle 1); with r1 = r2, too (principle 2); and of those that are searched: without ranks
        that need as many multiply-accumulates as the dense layer, and with the dense layer.
    """
    sizes = dict.fromkeys(("all ranks", "multiples of the step", "r1 = r2, too"), 1)
    wanted = {
        name: spec
        for name, spec in layers.specs.items()
        if kernel is None or spec.kernel_size == kernel
    }
    for spec in wanted.values():
        step = allowed.step_of(spec)
        channels = (spec.out_channels, spec.in_channels)
        pairs = channels if spec.kind == "conv" else (min(channels),)
        sizes["all ranks"] *= math.prod(pairs)
        sizes["multiples of the step"] *= math.prod(max(1, n // step) for n in pairs)
        sizes["r1 = r2, too"] *= max(1, min(channels) // step)
    candidates = layers.candidates(allowed)
    sizes["searched"] = math.prod(len(candidates[name]) for name in wanted if name in candidates)
    return sizes
