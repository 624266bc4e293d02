"""What a run knows of every layer, `KnownLayers`, and its file ``layers.json``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from nni_haloc.inputs.options import Kind
from nni_haloc.space.layers import LayerSpec
from nni_haloc.space.names import parse_rank
from nni_haloc.utils.files import is_number, read_json, write_json

LAYERS_VERSION = 1


@dataclass(frozen=True)
class KnownLayers:
    """What each layer of a network may be, how much that moves the outputs, or why it stays.

    Attributes:
        kinds: layer to its kind.
        candidates: layer to candidate name to its sensitivity: how far it alone, all else left as
            it was, moves the network's outputs (mean Kullback-Leibler divergence); None where that
            was not measured.
        pinned: layers whose only candidate is pinned by the settings.
        left_alone: name of each other layer to the reason why it stays as it is.
    """

    kinds: Mapping[str, Kind]
    candidates: Mapping[str, Mapping[str, float | None]]
    pinned: Collection[str]
    left_alone: Mapping[str, str]

    @classmethod
    def of(
        cls,
        specs: Mapping[str, LayerSpec],
        candidates: Mapping[str, Collection[str]],
        sensitivities: Mapping[str, Mapping[str, float]] | None,
        pinned: Collection[str],
        left_alone: Mapping[str, str],
    ) -> KnownLayers:
        """Gather what is known.

        Args:
            specs: layer to its specification.
            candidates: layer to its candidates' names.
            sensitivities: layer to candidate to sensitivity; None where none was measured.
            pinned: layers whose only candidate is pinned.
            left_alone: layer to the reason why it stays as it is.
        """
        return cls(
            {layer: specs[layer].kind for layer in candidates},
            {
                layer: {name: (sensitivities or {}).get(layer, {}).get(name) for name in names}
                for layer, names in candidates.items()
            },
            [layer for layer in candidates if layer in pinned],
            left_alone,
        )

    @property
    def measured(self) -> bool:
        """Whether every candidate's sensitivity is known."""
        return all(value is not None for row in self.candidates.values() for value in row.values())

    def save(self, path: str | Path) -> None:
        """Write ``layers.json``.

        Raises:
            OSError: if it can't be written.
        """
        layers: dict[str, dict[str, Any]] = {
            layer: {
                "kind": self.kinds[layer],
                **({"pinned": True} if layer in self.pinned else {}),
                "sensitivities": dict(row),
            }
            for layer, row in self.candidates.items()
        }
        layers |= {layer: {"left_alone": reason} for layer, reason in self.left_alone.items()}
        write_json(path, {"version": LAYERS_VERSION, "layers": layers})

    @classmethod
    def load(cls, path: str | Path) -> KnownLayers:
        """Read ``layers.json``.

        Raises:
            OSError: if the file can't be read.
            ValueError: if it holds something else; the message names file and layer.
        """
        layers = read_json(path, "layers", LAYERS_VERSION).get("layers")
        if not isinstance(layers, dict):
            kind = type(layers).__name__
            raise ValueError(f"{path}: layers: expected layers and their facts, found {kind}")
        known = cls({}, {}, [], {})
        for layer, facts in layers.items():
            try:
                known = known._with(layer, facts)
            except (AttributeError, KeyError, TypeError, ValueError):
                expected = "expected 'left_alone', or a 'kind' and 'sensitivities' of candidates"
                raise ValueError(f"{path}: layer {layer!r}: {expected}") from None
        return known

    def _with(self, layer: str, facts: Mapping[str, Any]) -> KnownLayers:
        """Return what is known with one more layer."""
        if "left_alone" in facts:
            alone = {**self.left_alone, layer: str(facts["left_alone"])}
            return KnownLayers(self.kinds, self.candidates, self.pinned, alone)
        kind, row = facts["kind"], facts["sensitivities"]
        if kind not in get_args(Kind) or not row:
            raise ValueError
        for name, value in row.items():
            parse_rank(name, kind)
            if value is not None and not is_number(value):
                raise ValueError
        return KnownLayers(
            {**self.kinds, layer: kind},
            {**self.candidates, layer: row},
            [*self.pinned, layer] if facts.get("pinned") is True else self.pinned,
            self.left_alone,
        )
