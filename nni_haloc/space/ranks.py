"""The rank space: the layers that are searched and their candidate ranks (principles 1 and 2)."""

from __future__ import annotations

import fnmatch
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Literal

from torch import nn

from nni_haloc.inputs.options import Kind
from nni_haloc.space.frozen import is_for_inference
from nni_haloc.space.layers import LayerSpec
from nni_haloc.space.modules import Example, materialised
from nni_haloc.space.names import DENSE, Rank, is_rank, rank_name
from nni_haloc.space.replaceable import (
    LAYERS,
    irreplaceable,
    is_scripted_layer,
    obstacle,
    watched_pass,
)
from nni_haloc.utils.errors import matches_none


class UnfitPattern(ValueError):
    """A pattern of ``exclude`` or ``pin`` matches no layer, or its rank fits none."""


@dataclass(frozen=True)
class AllowedRanks:
    """The layers to search and the ranks that they may take.

    Patterns are those of `fnmatch`; `find_layers` refuses one that matches no layer.

    Attributes:
        step: distance between candidate ranks. None takes it from the smaller channel count: the
            largest power of two that is an eighth of it or less, at least 2 and at most 32; from
            1024 channels on, 32 for each 512. "paper" is coarser: 2 at 16 channels or fewer, 4 up
            to 32, 8 up to 64, then 32, and the same from 1024 on. "every" is 1; of pairs, which
            would be too many, those at None's step and every one with r1 = r2.
        dense: whether the dense layer is a candidate.
        equal: only ranks with r1 = r2 (design principle 2); otherwise every pair of steps.
        kinds: the kinds of layer to search, of ``conv``, ``pointwise`` (1x1 convolutions) and
            ``linear``.
        exclude: name patterns of layers to leave alone.
        pin: name pattern to the only candidate of the layers that it matches: a rank, ``(r1, r2)``
            or ``"dense"``. The first pattern that matches a layer counts.
        stairs: layer name to the width of its device's stairs (see `rank_stairs`); from that width
            on only its multiples are candidates.
    """

    step: int | Literal["paper", "every"] | None = None
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
        """Return the pins whose patterns match a layer.

        Args:
            layer: the layer's name.

        Returns:
            Ranks, pairs ``(r1, r2)`` or ``"dense"``; the first one counts.
        """
        return [value for pattern, value in self.pin.items() if fnmatch.fnmatchcase(layer, pattern)]

    def step_of(self, spec: LayerSpec) -> int:
        """Return the distance between a layer's candidate ranks.

        Args:
            spec: the layer.
        """
        size = min(spec.in_channels, spec.out_channels)
        if isinstance(self.step, int) and self.step > 0:
            return self.step
        if self.step not in (None, "paper", "every"):
            expected = "expected a number, 'paper', 'every' or None"
            raise ValueError(f"step: {expected}, found {self.step!r}")
        if self.step == "every":
            return 1
        wide = size // 512 * 32 if size >= 1024 else 0
        if self.step == "paper":
            return max(32, wide) if size > 64 else 8 if size > 32 else 4 if size > 16 else 2
        eighth = 2 ** max(1, (size // 8).bit_length() - 1)
        return max(min(32, eighth), wide)

    def candidates(self, spec: LayerSpec) -> list[Rank]:
        """List the candidate ranks of one layer, None (dense) first, then falling.

        Ranks with as many MACs as the dense layer are dropped. A pinned layer has only its pinned
        rank, whatever it costs.

        Args:
            spec: the layer.

        Returns:
            Ranks ``(r1, r2)`` for convolutions, ``(r,)`` for 1x1 convolutions and linear layers.

        Raises:
            UnfitPattern: if a pinned rank does not fit the layer.
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
                raise UnfitPattern(f"pin: {error}") from None
            return [rank]
        size = min(spec.in_channels, spec.out_channels)
        step, pairs = self.step_of(spec), spec.kind == "conv" and not self.equal
        ranks: set[tuple[int, ...]] = set()
        if not pairs or self.step == "every":
            single = [(r, r) if spec.kind == "conv" else (r,) for r in self._grid(spec, size, step)]
            ranks.update(single)
        if pairs:
            step = replace(self, step=None).step_of(spec) if self.step == "every" else step
            sides = (self._grid(spec, n, step) for n in (spec.out_channels, spec.in_channels))
            ranks.update(product(*sides))
        dense = macs(spec, None)
        costs = {rank: macs(spec, rank) for rank in ranks}
        cheaper = (rank for rank, cost in costs.items() if cost < dense)
        falling = sorted(cheaper, key=lambda rank: (-costs[rank], rank))
        return [None, *falling] if self.dense else [*falling]

    def _grid(self, spec: LayerSpec, channels: int, step: int) -> list[int]:
        """List the ranks of one side: multiples of the step, and of the stairs from theirs on."""
        width = self.stairs.get(spec.name, 1)
        return [
            r
            for r in range(1, channels + 1)
            if (r % step == 0 and r < width) or r % (step if width == 1 else width) == 0
        ]


def macs(spec: LayerSpec, rank: Rank) -> int:
    """Count the multiply-accumulates of one layer for one image, over all its calls.

    Biases are not counted.

    >>> conv = LayerSpec("c", "conv", 64, 64, ((1, 64, 56, 56),), False, (3, 3), padding=(1, 1))
    >>> macs(conv, None) == 56 * 56 * 64 * 64 * 9
    True
    """
    return sum(w.inputs * w.outputs * w.kernel * w.after for w in spec.work(rank))


def params(spec: LayerSpec, rank: Rank) -> int:
    """Count the parameters of one layer at one rank, its bias included."""
    return sum(math.prod(part) for part in spec.parts(rank)) + (
        spec.out_channels if spec.bias else 0
    )


@dataclass(frozen=True)
class Layers:
    """The layers of one network that can be searched, and the others.

    Attributes:
        specs: the searchable layers by name, in the order of their first call.
        left_alone: name of each other layer to the reason.
    """

    specs: dict[str, LayerSpec]
    left_alone: dict[str, str]

    def candidates(self, allowed: AllowedRanks) -> dict[str, dict[str, Rank]]:
        """Map each layer that may have a low rank, or is pinned, to its candidates.

        Returns:
            Layer name to candidate name to rank.
        """
        ranks_of = {name: allowed.candidates(spec) for name, spec in self.specs.items()}
        return {
            name: {rank_name(r): r for r in ranks}
            for name, ranks in ranks_of.items()
            if any(ranks) or allowed.pins(name)
        }


def find_layers(
    model: nn.Module,
    example_input: Example,
    allowed: AllowedRanks = AllowedRanks(),
    *,
    frozen: bool = True,
) -> Layers:
    """Find the layers of a network that can be searched, by running copies of it.

    One pass sees the calls, another one has other layers in place. Both are in evaluation mode and
    without gradients, and the model itself is left as it was, whatever it does when it is called.

    Args:
        model: the network.
        example_input: a tensor, a tuple of inputs, or a dict of keyword inputs.
        allowed: the rank space.
        frozen: whether to leave layers with a frozen weight alone.

    Raises:
        ValueError: if the model can't be copied.
        UnfitPattern: if a pattern of ``allowed`` matches no layer, or its rank does not fit one.
    """
    model = materialised(model, example_input)
    frozen = frozen and not is_for_inference(model)
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
        reason = obstacle(modules[name], shapes, holders, frozen) or seen.reasons.get(name)
        judged = _judged(name, modules[name], tuple(shapes), allowed, reason)
        if isinstance(judged, str):
            reasons[name] = judged
        else:
            specs[name] = judged
    named = [name for name in specs if name]
    for name, reason in irreplaceable(model, example_input, named, seen).items():
        reasons[name] = reason
        del specs[name]
    _check_patterns("exclude", allowed.exclude, modules, reasons, model)
    _check_patterns("pin", allowed.pin, specs, reasons, model, " that can be searched")
    return Layers(specs, reasons)


def check_names(model: nn.Module, allowed: AllowedRanks) -> None:
    """Check that every pattern of a rank space matches a layer's name; no input is needed.

    Raises:
        UnfitPattern: names the option and the layers that there are.
    """
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, LAYERS) or is_scripted_layer(module)
    ]
    for option, patterns in (("exclude", allowed.exclude), ("pin", allowed.pin)):
        _check_patterns(option, patterns, names, {}, model)


def _judged(
    name: str,
    module: nn.Module,
    shapes: tuple[tuple[int, ...], ...],
    allowed: AllowedRanks,
    reason: str | None,
) -> LayerSpec | str:
    """Return a layer's geometry if it is searched, else the reason why not.

    ``reason`` is why it can't be a low-rank layer in any rank space, or None.
    """
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in allowed.exclude):
        return "excluded by name"
    if reason:
        return reason
    spec = LayerSpec.of(name, module, shapes)
    if spec.kind not in allowed.kinds:
        return f"kind {spec.kind!r} is not among the searched kinds"
    if any(allowed.candidates(spec)) or allowed.pins(name):
        return spec
    some = any(replace(allowed, step=1).candidates(spec))
    finer = " (of a smaller rank_space.step some are)" if some else ""
    return f"no rank on the step grid is cheaper than the dense layer{finer}"


def _check_patterns(
    option: str,
    patterns: Iterable[str],
    names: Iterable[str],
    reasons: Mapping[str, str],
    model: nn.Module,
    which: str = "",
) -> None:
    """Raise `UnfitPattern` for a pattern of an option that matches none of the names.

    ``which`` says which layers of the network those of the names are.
    """
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            why = "".join(f"; {name}: {reasons[name]}" for name in fnmatch.filter(reasons, pattern))
            known = matches_none(pattern, () if why else names)
            kind = type(model).__name__
            raise UnfitPattern(f"{option}: no layer of {kind}{which} matches {known}{why}")
