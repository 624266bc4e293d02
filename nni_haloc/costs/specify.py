"""Make a `Specification`, which a device measures without the model or its rank space."""

from __future__ import annotations

import json
from dataclasses import asdict

from torch import nn

from nni_haloc.costs.device.replay import record
from nni_haloc.costs.device.spec import Entry, Specification
from nni_haloc.space.modules import Example, materialised, only_tensor
from nni_haloc.space.names import DENSE, Rank
from nni_haloc.space.ranks import AllowedRanks, find_layers


def specify(
    model: nn.Module,
    example_input: Example,
    allowed: AllowedRanks = AllowedRanks(),
    name: str = "",
    *,
    program: bool = True,
) -> Specification:
    """List every distinct (layer shape, rank) of the rank space.

    Args:
        model: the original network.
        example_input: the batch that is timed, ``(N, ...)``.
        allowed: the rank space.
        name: the model's name (empty: its class's).
        program: whether to record the network's operations, for a device without the model.

    Raises:
        ValueError: if the model takes more than one tensor.
    """
    example_input = only_tensor(example_input)
    model = materialised(model, example_input)
    layers = find_layers(model, example_input, allowed)
    numbers: dict[tuple[str, Rank], int] = {}
    entries: list[Entry] = []
    rows: dict[str, dict[str, int]] = {}
    for layer, candidates in layers.candidates(allowed).items():
        fields = json.loads(json.dumps(asdict(layers.specs[layer])))  # as read from the file
        del fields["name"]
        rows[layer] = {}
        for candidate, rank in {DENSE: None, **candidates}.items():
            key = (json.dumps(fields), rank)
            if key not in numbers:
                numbers[key] = len(entries)
                entries.append(Entry(fields, rank))
            rows[layer][candidate] = numbers[key]
    recorded = record(model, example_input, rows) if program else None
    return Specification(
        name or type(model).__name__, tuple(example_input.shape), rows, tuple(entries), recorded
    )
