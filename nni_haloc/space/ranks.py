"""The rank space (design principles 1 and 2) and `RankPlan`, the chosen rank of every layer, with its file ``ranks.json``."""

from __future__ import annotations

import fnmatch
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from nni_haloc.space.layers import LayerSpec
from nni_haloc.space.modules import Example, materialised
from nni_haloc.space.names import DENSE, Kind, Rank, is_rank, rank_name
from nni_haloc.space.watching import (
    LAYERS,
    irreplaceable,
    is_scripted_layer,
    obstacle,
    watched_pass,
)


@dataclass(frozen=True)
class RankRules:
    """Which layers are searched and which ranks they may take.

    ``step``: distance between candidate ranks; None takes it from the smaller channel count: 2 at 16 or
    fewer, 4 at 32, 8 at 64, 32 below 1024, then 32 for each 512.
    ``dense``: whether the layer as it was is a candidate. ``equal``: r1 = r2 (design principle 2); otherwise every pair of steps.
    ``kinds``: what is searched, of ``conv``, ``pointwise`` (1x1 convolutions), ``linear``. ``exclude``: name patterns of layers left alone.
    ``pin``: name pattern to the one candidate of the layers that it matches: a rank, ``(r1, r2)``, or ``"dense"``; the first pattern that
    matches a layer counts. Patterns are those of `fnmatch`; one that matches no layer is a ValueError of `find_layers`.
    ``stairs``: layer name to the width of its device's stairs (`rank_stairs`): from there on its ranks are the multiples of that.
    """

    step: int | None = None
    dense: bool = True
    equal: bool = True
    kinds: tuple[Kind, ...] = ("conv", "pointwise")
    exclude: tuple[str, ...] = ()
    pin: Mapping[str, int | tuple[int, ...] | str] = field(default_factory=dict)
    stairs: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for pattern, value in self.pin.items():
            if value != DENSE and not is_rank((value,) if isinstance(value, int) else value):
                raise ValueError(
                    f"pin {pattern!r}: expected a rank, (r1, r2) or {DENSE!r}, found {value!r}"
                )

    def pins(self, layer: str) -> list[int | tuple[int, ...] | str]:
        """What ``pin`` says of a layer; the first entry counts."""
        return [value for pattern, value in self.pin.items() if fnmatch.fnmatchcase(layer, pattern)]

    def step_of(self, spec: LayerSpec) -> int:
        """Distance between a layer's candidate ranks."""
        size = min(spec.in_channels, spec.out_channels)
        return self.step or (
            max(32, size // 512 * 32) if size > 64 else 8 if size > 32 else 4 if size > 16 else 2
        )

    def candidates(self, spec: LayerSpec) -> list[Rank]:
        """Candidate ranks of one layer, falling, ``None`` (dense) first; those with as many MACs as the dense layer are dropped.

        A pinned layer has its pinned rank alone, whatever it costs; ValueError if that does not fit the layer.
        """
        for value in self.pins(spec.name):
            rank = (
                (value,) * (2 if spec.kind == "conv" else 1)
                if isinstance(value, int)
                else None
                if isinstance(value, str)
                else value
            )
            try:
                spec.check_rank(rank)
            except ValueError as error:
                raise ValueError(f"pin: {error}") from None
            return [rank]
        size = min(spec.in_channels, spec.out_channels)
        step = self.step_of(spec)
        width = self.stairs.get(spec.name, 1)

        def grid(channels: int) -> list[int]:
            return [
                r
                for r in range(1, channels + 1)
                if (r % step == 0 and r < width) or r % (step if width == 1 else width) == 0
            ]

        ranks: list[Rank] = [(r, r) if spec.kind == "conv" else (r,) for r in grid(size)]
        if spec.kind == "conv" and not self.equal:
            ranks = [(r1, r2) for r1 in grid(spec.out_channels) for r2 in grid(spec.in_channels)]
        dense = macs(spec, None)
        cheaper = sorted((r for r in ranks if macs(spec, r) < dense), key=lambda r: -macs(spec, r))
        return [None, *cheaper] if self.dense else cheaper


def macs(spec: LayerSpec, rank: Rank) -> int:
    """Multiply-accumulates of one layer in a forward pass of one image, summed over its calls; biases are not counted.

    >>> conv = LayerSpec("c", "conv", 64, 64, ((1, 64, 56, 56),), False, (3, 3), padding=(1, 1))
    >>> macs(conv, None) == 56 * 56 * 64 * 64 * 9
    True
    """
    return sum(w.inputs * w.outputs * w.kernel * w.after for w in spec.work(rank))


def params(spec: LayerSpec, rank: Rank) -> int:
    """Number of parameters of one layer at one rank, its bias included."""
    return sum(math.prod(part) for part in spec.parts(rank)) + (
        spec.out_channels if spec.bias else 0
    )


@dataclass(frozen=True)
class Layers:
    """The searchable layers of one model in the order of their first call, and why the others are not."""

    specs: dict[str, LayerSpec]
    left_alone: dict[str, str]

    def candidates(self, rules: RankRules) -> dict[str, dict[str, Rank]]:
        """Candidate name to rank for every layer that has any low rank to offer under the rules, or is pinned."""
        found = {name: rules.candidates(spec) for name, spec in self.specs.items()}
        return {
            name: {rank_name(r): r for r in ranks}
            for name, ranks in found.items()
            if any(ranks) or rules.pins(name)
        }


def find_layers(model: nn.Module, example_input: Example, rules: RankRules = RankRules()) -> Layers:
    """Run ``model`` on ``example_input`` and record every convolution and linear layer: shapes, or why it is left alone.

    ``example_input``: a tensor, a tuple of positional inputs or a dict of keyword inputs. The passes, one to see the calls and one with
    other layers in place, are made by copies, in evaluation mode without gradients: the model is left as it was, whatever it does when it
    is called. Raises ValueError if the model can't be copied, or a pattern of the rules matches no layer.
    """
    model = materialised(model, example_input)
    modules = {n: m for n, m in model.named_modules() if isinstance(m, LAYERS)}
    seen = watched_pass(model, example_input, modules)
    calls: dict[str, list[tuple[int, ...]]] = {}
    for name, shape in seen.calls:
        calls.setdefault(name, []).append(shape)

    holders = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    specs: dict[str, LayerSpec] = {}
    reasons = {name: "not called as a module" for name in modules if name not in calls}
    reasons |= {
        name: "in a scripted or traced module"
        for name, module in model.named_modules()
        if is_scripted_layer(module)
    }
    for name, shapes in calls.items():
        module = modules[name]
        reason = obstacle(module, shapes, holders) or seen.reasons.get(name)
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in rules.exclude):
            reason = "excluded by name"
        if reason:
            reasons[name] = reason
            continue
        spec = LayerSpec.of(name, module, tuple(shapes))
        if spec.kind not in rules.kinds:
            reasons[name] = f"kind {spec.kind!r} is not among the searched kinds"
        elif any(rules.candidates(spec)) or rules.pins(name):
            specs[name] = spec
        else:
            reasons[name] = "no rank on the step grid is cheaper than the dense layer"
    for name, reason in irreplaceable(
        model, example_input, [name for name in specs if name], seen
    ).items():
        reasons[name] = reason
        del specs[name]
    for option, patterns, named in (("exclude", rules.exclude, modules), ("pin", rules.pin, specs)):
        for pattern in patterns:
            if not fnmatch.filter(named, pattern):
                why = "".join(
                    f"; {name}: {reasons[name]}" for name in fnmatch.filter(reasons, pattern)
                )
                raise ValueError(
                    f"{option}: no layer of {type(model).__name__} that can be searched matches {pattern!r}{why}"
                )
    return Layers(specs, reasons)
