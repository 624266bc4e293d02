"""What there is to time: `Specification`, of a model and its rank space without model or weights, and its file ``spec.json``."""

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
from typing import Any

from nni_haloc.space.names import DENSE
from nni_haloc.utils.files import read_json, write_json

SPEC_VERSION = 1


@dataclass(frozen=True)
class Entry:
    """One distinct thing to time: a layer's geometry (fields of `LayerSpec` without its name) at one rank, None for dense.

    ``onnx``: the same as an ONNX model, for devices without PyTorch.
    """

    layer: Mapping[str, Any]
    rank: tuple[int, ...] | None
    onnx: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Specification:
    """Which entry each candidate of each layer is, and the whole network.

    ``input``: shape, batch included. ``layers``: layer to candidate name to index into ``entries``; layers of one shape share theirs.
    ``program``: the network's operations (`Replay`); ``onnx``: the network as an ONNX model; either may be missing.
    """

    model: str
    input: tuple[int, ...]
    layers: Mapping[str, Mapping[str, int]]
    entries: tuple[Entry, ...]
    program: list[Any] | None = field(default=None, repr=False)
    onnx: bytes | None = field(default=None, repr=False)

    def homes(self) -> dict[int, tuple[str, str]]:
        """Of each entry, the first layer and candidate that it is: its name in a file of measurements."""
        found: dict[int, tuple[str, str]] = {}
        for layer, row in self.layers.items():
            for candidate, index in row.items():
                found.setdefault(index, (layer, candidate))
        return found

    def geometry(self) -> dict[str, str]:
        """Of each layer a digest of its shape and of what it is fed."""
        dense = {
            layer: json.dumps(dict(self.entries[row[DENSE]].layer), sort_keys=True)
            for layer, row in self.layers.items()
        }
        return {
            layer: hashlib.sha256(text.encode()).hexdigest()[:12] for layer, text in dense.items()
        }

    def alike(self, index: int) -> list[str]:
        """The layers that have an entry among their candidates."""
        return [layer for layer, row in self.layers.items() if index in row.values()]

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
        """Read ``spec.json``; ValueError names the file and what is wrong in it."""
        content = read_json(path, "layer specification", SPEC_VERSION)
        try:
            entries = tuple(
                Entry(
                    dict(e["layer"]),
                    None if e["rank"] is None else tuple(int(r) for r in e["rank"]),
                    _bytes(e.get("onnx")),
                )
                for e in content["entries"]
            )
            layers = {
                layer: {name: int(index) for name, index in row.items()}
                for layer, row in content["layers"].items()
            }
            for layer, row in layers.items():
                if DENSE not in row or not all(0 <= index < len(entries) for index in row.values()):
                    raise ValueError(
                        f"layer {layer!r}: expected a {DENSE!r} entry and indices below {len(entries)}, found {row}"
                    )
            shape = tuple(int(n) for n in content["input"])
            return cls(
                str(content["model"]),
                shape,
                layers,
                entries,
                content.get("program"),
                _bytes(content.get("onnx")),
            )
        except KeyError as error:
            raise ValueError(f"{path}: {error.args[0]}: missing") from None
        except (AttributeError, TypeError, ValueError, binascii.Error) as error:
            raise ValueError(f"{path}: {error}") from None


def share(spec: Specification, part: int, of: int) -> list[int]:
    """The entries that one of several workers measures; all of them measure the dense layers, to be compared by."""
    return [
        index
        for i, (index, home) in enumerate(spec.homes().items())
        if i % of == part or home[1] == DENSE
    ]


def draw(spec: Specification, fraction: float, seed: int = 0) -> list[int]:
    """A sample of the entries: of each shape's a ``fraction``, the dense layer and at least one other among them, spread over its ranks.

    ValueError unless the fraction is above 0 and at most 1.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"sample: expected a share above 0 and at most 1, found {fraction}")
    generator, found = random.Random(seed), []
    rows = dict.fromkeys(tuple(row.values()) for row in spec.layers.values())
    for dense, *others in rows:
        if not others:
            found.append(dense)
            continue
        count = min(len(others), max(1, round(fraction * (1 + len(others))) - 1))
        cuts = [round(i * len(others) / count) for i in range(count + 1)]
        found += [
            dense,
            *(
                others[generator.randrange(low, high)]
                for low, high in itertools.pairwise(cuts)
                if high > low
            ),
        ]
    return found


def _text(data: bytes | None) -> str | None:
    return None if data is None else base64.b64encode(data).decode("ascii")


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else base64.b64decode(text, validate=True)
