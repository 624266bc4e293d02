"""Cycles and energy on an Eyeriss-like array of 14 x 12 processing elements.

The model is ZigZag's (the package ``zigzag-dse``).
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from torch import nn

from nni_haloc.costs.table import CostTable
from nni_haloc.space.layers import LayerSpec
from nni_haloc.space.modules import Example, input_shape
from nni_haloc.space.names import DENSE, Rank
from nni_haloc.space.ranks import AllowedRanks, find_layers
from nni_haloc.utils.errors import needs
from nni_haloc.utils.files import make_folder, read_json, write_json
from nni_haloc.utils.progress import Progress

ROWS, COLUMNS = 14, 12
CACHE = (
    Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    / "nni-haloc"
    / "accelerator.json"
)
_LOOP_ORDERS = 5
"""ZigZag's ``lpf_limit``: a sixth loop order takes five times as long and gains one per cent."""
_BITS = {"W": 8, "I": 8, "O": 16, "O_final": 8}
Part = tuple[int, ...]
"""Channels in and out, kernel rows and columns, output rows and columns, stride along both."""
_PART = (
    "channels in, channels out, kernel rows, kernel columns, output rows, output columns, stride, "
    "stride across"
)


def accelerator_table(
    model: nn.Module,
    example_input: Example,
    allowed: AllowedRanks = AllowedRanks(),
    metric: str = "cycles",
    *,
    cache: str | Path | None = None,
    progress: Progress = lambda done, of: None,
) -> CostTable:
    """Model what every candidate costs on the array for one image, at 8 bits.

    Each factor is modelled by itself. ``fixed`` is the other ungrouped convolutions and linear
    layers; everything else is taken to be free.

    Args:
        model: the original network.
        example_input: one input or a batch.
        allowed: the rank space.
        metric: ``cycles`` or ``energy_pj``.
        cache: a JSON file that keeps what has been modelled, because each convolution takes a
            second or two (None: keep nothing).
        progress: called with the numbers of convolutions done and to do.

    Raises:
        MissingPackage: if ``zigzag-dse`` is not installed.
        ValueError: if the cache is damaged, or ZigZag can't map a convolution onto the array.
    """
    layers = find_layers(model, example_input, allowed)
    everything = find_layers(
        model, example_input, AllowedRanks(1, kinds=("conv", "pointwise", "linear")), frozen=False
    ).specs
    candidates = {name: {DENSE: None, **row} for name, row in layers.candidates(allowed).items()}
    searched = [
        (layers.specs[name], rank) for name, row in candidates.items() for rank in row.values()
    ]
    others = [(spec, None) for name, spec in everything.items() if name not in candidates]
    modelled = iter(accelerator_costs([*searched, *others], metric, cache, progress))
    costs = {
        name: {candidate: next(modelled) for candidate in row} for name, row in candidates.items()
    }
    identity = {
        "input": input_shape(example_input),
        "device": f"Eyeriss-like {ROWS}x{COLUMNS}",
        "runtime": f"zigzag-dse {_version()}",
    }
    return CostTable(metric, costs, sum(modelled), identity)


def accelerator_costs(
    wanted: Sequence[tuple[LayerSpec, Rank]],
    metric: str,
    cache: str | Path | None = None,
    progress: Progress = lambda done, of: None,
) -> list[float]:
    """Model what each layer costs at its rank; for the arguments see `accelerator_table`."""
    modelled = _Modelled(cache)
    parts = [_parts(spec, rank) for spec, rank in wanted]
    distinct = dict.fromkeys(part for row in parts for part in row)
    missing = [part for part in distinct if part not in modelled.known]
    for done, part in enumerate(missing):
        progress(done, len(missing))
        modelled.add(part)
    progress(len(missing), len(missing))
    return [sum(modelled.known[part][metric] for part in row) for row in parts]


class _Modelled:
    """The costs of the parts that have been modelled, and the file that keeps them."""

    def __init__(self, path: str | Path | None) -> None:
        self.path, self.version = path, _version()
        self.known: dict[Part, dict[str, float]] = {}
        if path is not None and Path(path).exists():
            try:
                content = read_json(path)
                if content["zigzag"] == self.version:
                    self.known = {
                        tuple(part): {k: float(v) for k, v in costs.items()}
                        for part, costs in content["parts"]
                    }
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{path}: not a cache of the accelerator model ({error}); delete it"
                ) from None

    def add(self, part: Part) -> None:
        self.known[part] = _model(part)
        if self.path is not None:
            make_folder(Path(self.path).parent)
            write_json(
                self.path,
                {
                    "zigzag": self.version,
                    "parts": [[list(p), costs] for p, costs in self.known.items()],
                },
            )


def _parts(spec: LayerSpec, rank: Rank) -> list[Part]:
    """List the convolutions that a layer becomes, for each of its calls."""
    convolutions: list[Part] = []
    parts = spec.parts(rank)
    strided = 1 if len(parts) == 3 else 0
    for shape in spec.input_shapes:
        tokens = (math.prod(shape[1:-1]), 1)  # as rows
        before = tokens if spec.kind == "linear" else shape[2:]
        after = spec.output_shape(shape)[2:] if spec.kind != "linear" else before
        for i, (inputs, outputs, kernel) in enumerate(parts):
            rows, columns = before if i < strided else after
            size = spec.kernel_size[0] if kernel > 1 else 1
            stride = spec.stride if i == strided else (1, 1)
            convolutions.append((inputs, outputs, size, kernel // size, rows, columns, *stride))
    return convolutions


def _model(part: Part) -> dict[str, float]:
    """Return ZigZag's cycles and picojoules, for the better of two mappings onto the array."""
    install = "nni-haloc[accelerator]"
    with needs("matplotlib", what="the accelerator model", install=install), _quiet():
        import zigzag
        from zigzag.api import get_hardware_performance_zigzag

    hardware = str(Path(zigzag.__file__).parent / "inputs" / "hardware" / "eyeriss_like.yaml")
    results = []
    for mapping in _mappings(part):
        with TemporaryDirectory() as folder, _quiet():
            file = os.path.join(folder, "mapping.yaml")
            Path(file).write_text(yaml.safe_dump([mapping]), encoding="utf-8")
            try:
                energy, cycles, *_ = get_hardware_performance_zigzag(
                    [_workload(part)],
                    hardware,
                    file,
                    dump_folder=folder,
                    lpf_limit=_LOOP_ORDERS,
                    loma_show_progress_bar=False,
                )
            except ValueError as error:
                raise ValueError(
                    f"ZigZag has no mapping of a convolution of {part} ({_PART}): {error}"
                ) from None
        results.append({"cycles": float(cycles), "energy_pj": float(energy)})
    return min(results, key=lambda costs: costs["cycles"])


def _workload(part: Part) -> dict[str, Any]:
    inputs, outputs, height, width, rows, columns, down, across = part
    return {
        "id": 0,
        "name": "layer",
        "operator_type": "Conv",
        "equation": "O[b][k][oy][ox]+=W[k][c][fy][fx]*I[b][c][iy][ix]",
        "dimension_relations": [f"ix={across}*ox+1*fx", f"iy={down}*oy+1*fy"],
        "loop_dims": ["B", "K", "C", "OY", "OX", "FY", "FX"],
        "loop_sizes": [1, outputs, inputs, rows, columns, height, width],
        "operand_precision": _BITS,
        "operand_source": {"I": 0, "W": 0},
        "pr_loop_dims": ["IX", "IY"],
        "pr_loop_sizes": [across * (columns - 1) + width, down * (rows - 1) + height],
        "padding": [[0, 0], [0, 0]],
    }


def _mappings(part: Part) -> list[dict[str, Any]]:
    """Return the mappings to try.

    The first has output rows along the array, as in Eyeriss, and filter rows and channels across;
    the second has channels along and across.
    """
    inputs, outputs, height, _, rows, *_ = part
    along = min(rows, ROWS)
    first = [f"OY, {along}"] + (
        [f"K, {min(outputs, ROWS // along)}"] if ROWS // along > 1 and outputs > 1 else []
    )
    tall = min(height, COLUMNS)
    deep = min(inputs, COLUMNS // tall)
    second = ([f"FY, {tall}"] if tall > 1 else []) + (
        [f"C, {deep}"] if deep > 1 or tall == 1 else []
    )
    ways: list[tuple[Sequence[str], Sequence[str]]] = [(first, second)]
    if height == 1:
        ways.append(([f"K, {min(outputs, ROWS)}"], [f"C, {min(inputs, COLUMNS)}"]))
    links = {"O": "O", "W": "I2", "I": "I1"}
    return [
        {
            "name": "default",
            "spatial_mapping": {"D1": list(d1), "D2": list(d2)},
            "memory_operand_links": links,
        }
        for d1, d2 in ways
    ]


@contextmanager
def _quiet() -> Iterator[None]:
    """Undo what ZigZag does to the root logger and to the fonts of later plots; hide its log."""
    import matplotlib

    root, before = logging.getLogger(), logging.root.manager.disable
    handlers, level = list(root.handlers), root.level
    logging.disable(logging.CRITICAL)
    try:
        with matplotlib.rc_context():
            yield
    finally:
        logging.disable(before)
        root.setLevel(level)
        for handler in [h for h in root.handlers if h not in handlers]:
            root.removeHandler(handler)


def _version() -> str:
    try:
        return version("zigzag-dse")
    except PackageNotFoundError:
        return "none"
