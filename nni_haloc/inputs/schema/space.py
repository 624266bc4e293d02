"""The section ``rank_space``."""

from __future__ import annotations

from typing import Annotated, Literal

from nni_haloc.inputs.options import Decomposition, Kind
from nni_haloc.inputs.schema.section import Section, Words
from nni_haloc.inputs.schema.values import Count, Pin, Step


class Space(Section):
    """The rank space (see `nni_haloc.AllowedRanks`), and how its candidates are made."""

    step: Step = None
    """Distance between ranks. Without it, each layer has its own: the largest power of two that is
    at most an eighth of the smaller channel count, from 2 to 32; from 1024 channels on, 32 for each
    512. `paper` is coarser: 2 up to 16 channels, 4 up to 32, 8 up to 64, then 32. `auto` takes
    multiples of the device's stairs (`haloc steps`), read off `cost.table`, above the first one."""
    dense: bool = True
    """Whether the layer as it was is a candidate."""
    equal: bool | None = None
    """Whether r1 = r2. Without it they are equal, except under the [rule](reference/rules.md)
    `sensitivity-knapsack` where every cost is counted (`macs`, `params`, `activation_bytes`): pairs
    are many, and each one that is measured takes its time."""
    kinds: list[Kind] = ["conv", "pointwise"]
    """Kinds of layers to compress."""
    exclude: Annotated[list[str], Words("list of patterns")] = []
    """Name patterns of layers to leave alone. A pattern that matches no layer is an error."""
    pin: Annotated[dict[str, Pin], Words("patterns to ranks")] = {}
    """Name patterns to the one rank of the layers that they match:
    `{"layer1.*": 16, conv1: dense, fc: [8, 4]}`, where r1 is of the outputs and r2 of the inputs.
    Such layers are decomposed and trained, not searched. A pattern that matches no layer is an
    error."""
    decomposition: Decomposition | Literal["auto"] = "auto"
    """How candidates are made: fitted to the outputs on the training images (`data`, which `auto`
    stands for), or to the weights alone: `warm_hooi`, `hosvd` (the paper's) or `hooi` (tensorly's,
    to convergence)."""
    calibration_images: Count = 512
    """Training images that the decomposition is fitted to."""
