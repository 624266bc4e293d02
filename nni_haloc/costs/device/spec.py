"""List everything that a device has to time: `Specification`, with its file ``spec.json``.

A specification holds layer shapes and operations, neither the network's code nor its weights.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import itertools
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nni_haloc.space.names import DENSE
from nni_haloc.utils.files import read_json, write_json

if TYPE_CHECKING:
    from torch import nn

SPEC_VERSION = 1
_MOST_BYTES = 1 << 30
"""Bytes that a specification may have; one may carry an ONNX model for each entry."""


@dataclass(frozen=True)
class Entry:
    """One distinct thing to time: a layer's geometry at one rank.

    Attributes:
        layer: the fields of `LayerSpec` without its name.
        rank: the rank, None for the dense layer.
        onnx: the same as an ONNX model, for devices without PyTorch.
    """

    layer: Mapping[str, Any]
    rank: tuple[int, ...] | None
    onnx: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Specification:
    """The entries of a rank space, and the whole network.

    Attributes:
        model: the network's name.
        input: shape of its input, batch included.
        layers: layer name to candidate name to index into ``entries``; layers of one shape share
            their entries.
        entries: what is timed.
        program: the network's operations (see `Replay`); may be missing.
        onnx: the network as an ONNX model; may be missing.
        module: the network itself if it is at hand; not in the file.
    """

    model: str
    input: tuple[int, ...]
    layers: Mapping[str, Mapping[str, int]]
    entries: tuple[Entry, ...]
    program: list[Any] | None = field(default=None, repr=False)
    onnx: bytes | None = field(default=None, repr=False)
    module: nn.Module | None = field(default=None, repr=False, compare=False)

    def first_users(self) -> dict[int, tuple[str, str]]:
        """Map each entry to the first (layer, candidate) that uses it.

        That is the entry's name in a file of measurements.
        """
        users: dict[int, tuple[str, str]] = {}
        for layer, row in self.layers.items():
            for candidate, index in row.items():
                users.setdefault(index, (layer, candidate))
        return users

    def geometry(self) -> dict[str, str]:
        """Map each layer to a digest of its shape and of its inputs' shapes."""
        dense = {
            layer: json.dumps(dict(self.entries[row[DENSE]].layer), sort_keys=True)
            for layer, row in self.layers.items()
        }
        return {
            layer: hashlib.sha256(text.encode()).hexdigest()[:12] for layer, text in dense.items()
        }

    def digest(self) -> str:
        """Return a digest of what is measured: it differs where entries or their order do."""
        entries = [[dict(e.layer), e.rank] for e in self.entries]
        what = [self.model, self.input, {k: dict(row) for k, row in self.layers.items()}, entries]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]

    def layers_with(self, entry: int) -> list[str]:
        """Return the layers that have an entry among their candidates."""
        return [layer for layer, row in self.layers.items() if entry in row.values()]

    def save(self, path: str | Path) -> None:
        """Write ``spec.json``."""
        content = {
            "version": SPEC_VERSION,
            "model": self.model,
            "input": list(self.input),
            "layers": {layer: dict(row) for layer, row in self.layers.items()},
            "entries": [
                {
                    "layer": dict(e.layer),
                    "rank": None if e.rank is None else list(e.rank),
                    "onnx": _text(e.onnx),
                }
                for e in self.entries
            ],
            "program": self.program,
            "onnx": _text(self.onnx),
        }
        write_json(path, content)

    @classmethod
    def load(cls, path: str | Path) -> Specification:
        """Read ``spec.json``.

        Raises:
            ValueError: if the file is damaged; the message names it and what is wrong.
        """
        content = read_json(path, "layer specification", SPEC_VERSION, most=_MOST_BYTES)
        try:
            entries = tuple(map(_entry, content["entries"]))
            layers = {
                layer: {name: int(index) for name, index in row.items()}
                for layer, row in content["layers"].items()
            }
            for layer, row in layers.items():
                if DENSE not in row or not all(0 <= index < len(entries) for index in row.values()):
                    raise ValueError(
                        f"layer {layer!r}: expected a {DENSE!r} entry and indices below "
                        f"{len(entries)}, found {row}"
                    )
            shape = tuple(int(n) for n in content["input"])
            program, onnx = content.get("program"), _bytes(content.get("onnx"))
            return cls(str(content["model"]), shape, layers, entries, program, onnx)
        except KeyError as error:
            raise ValueError(f"{path}: {error.args[0]}: missing") from None
        except (AttributeError, TypeError, ValueError, binascii.Error) as error:
            raise ValueError(f"{path}: {error}") from None


def _entry(fields: Mapping[str, Any]) -> Entry:
    """Read an entry from its JSON form."""
    rank = None if fields["rank"] is None else tuple(int(r) for r in fields["rank"])
    return Entry(dict(fields["layer"]), rank, _bytes(fields.get("onnx")))


def share(spec: Specification, part: int, of: int) -> list[int]:
    """Return the entries that one of several workers measures.

    Every worker measures the dense layers, by which the workers' speeds are compared.

    Args:
        spec: what is measured.
        part: the worker's number, from 0.
        of: the number of workers.
    """
    return [
        index
        for i, (index, (_, candidate)) in enumerate(spec.first_users().items())
        if i % of == part or candidate == DENSE
    ]


def draw(spec: Specification, fraction: float, seed: int = 0) -> list[int]:
    """Draw a sample of the entries.

    For each layer shape it holds the dense layer and at least one other entry, spread over the
    shape's ranks.

    Args:
        spec: what is measured.
        fraction: share of each shape's entries, above 0 and at most 1.
        seed: of the random draw.

    Raises:
        ValueError: if the fraction is out of its range.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"sample: expected a share above 0 and at most 1, found {fraction}")
    generator, drawn = random.Random(seed), []
    rows = dict.fromkeys(tuple(row.values()) for row in spec.layers.values())
    for dense, *others in rows:
        drawn.append(dense)
        if not others:
            continue
        count = min(len(others), max(1, round(fraction * (1 + len(others))) - 1))
        cuts = [round(i * len(others) / count) for i in range(count + 1)]
        for low, high in itertools.pairwise(cuts):
            if high > low:
                drawn.append(others[generator.randrange(low, high)])
    return drawn


def _text(data: bytes | None) -> str | None:
    return None if data is None else base64.b64encode(data).decode("ascii")


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else base64.b64decode(text, validate=True)
