"""The `Specification` of a model and its rank space: what a device measures without either."""

from __future__ import annotations

import json
from dataclasses import asdict

from torch import nn

from nni_haloc.costs.device.replay import record
from nni_haloc.costs.device.spec import Entry, Specification
from nni_haloc.space.modules import Example, materialised, only_tensor
from nni_haloc.space.names import DENSE, Rank
from nni_haloc.space.ranks import RankRules, find_layers


def specify(
    model: nn.Module,
    example_input: Example,
    rules: RankRules = RankRules(),
    name: str = "",
    *,
    program: bool = True,
) -> Specification:
    """Every distinct (layer shape, rank) of the rank space; ``name``: the model's, by default its class's.

    ``example_input (N, ...)``: the batch that is timed; ValueError where the model takes more than one tensor. ``program``: whether the
    network's operations are recorded, for a device without the model.
    """
    example_input = only_tensor(example_input)
    model = materialised(model, example_input)
    layers = find_layers(model, example_input, rules)
    numbers: dict[tuple[str, Rank], int] = {}
    entries: list[Entry] = []
    rows: dict[str, dict[str, int]] = {}
    for layer, candidates in layers.candidates(rules).items():
        fields = json.loads(json.dumps(asdict(layers.specs[layer])))  # as it will be read back
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
